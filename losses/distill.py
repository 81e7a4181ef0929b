"""Losses that compare a student's prediction or feature with a teacher's. The target never gets a gradient."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .reduce import at_least_float32, reduce_loss


def kd_quality_focal_loss(pred: Tensor, target: Tensor, weight: Tensor | None = None, beta: float = 1.0,
                          reduction: str = "mean", avg_factor: float | Tensor | None = None) -> Tensor:
    """Quality focal loss to a teacher's scores (CrossKD, arXiv:2306.11369, section 3.3).

    Args:
        pred, target: (..., C) logits of student and teacher.
        weight: (...) or (..., C).
    """
    pred = at_least_float32(pred)
    target = at_least_float32(target).detach().sigmoid()
    loss = F.binary_cross_entropy_with_logits(pred, target, reduction="none")
    loss = loss * (pred.sigmoid() - target).abs().pow(beta)
    return reduce_loss(loss, weight, reduction, avg_factor)


def kd_kl_div_loss(pred: Tensor, target: Tensor, weight: Tensor | None = None, T: float = 10.0,
                   class_reduction: str = "mean", reduction: str = "mean",
                   avg_factor: float | Tensor | None = None) -> Tensor:
    """KL divergence of softened distributions times T^2 (Hinton et al., arXiv:1503.02531, section 2).

    Args:
        pred, target: (..., C) logits of student and teacher.
        weight: (...).
        T: temperature.
        class_reduction: "mean" or "sum" over the C entries.
    """
    if class_reduction not in ("mean", "sum"):
        raise ValueError(f'class_reduction must be "mean" or "sum", not "{class_reduction}"')
    pred = at_least_float32(pred)
    target = (at_least_float32(target).detach() / T).softmax(-1)
    loss = F.kl_div((pred / T).log_softmax(-1), target, reduction="none")
    loss = (loss.sum(-1) if class_reduction == "sum" else loss.mean(-1)) * T * T
    return reduce_loss(loss, weight, reduction, avg_factor)


def pkd_loss(pred: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """Half the squared difference of features normalised per channel over the batch (PKD, arXiv:2207.02039, eq. 5).

    Args:
        pred, target: maps (N, C, H, W) of student and teacher.
    """

    def normalised(x: Tensor) -> Tensor:
        std, mean = torch.std_mean(at_least_float32(x), (0, 2, 3), keepdim=True)
        return (x - mean) / (std + eps)

    return F.mse_loss(normalised(pred), normalised(target.detach())) / 2


class PKDLoss(nn.Module):
    """`pkd_loss` times `loss_weight`."""

    def __init__(self, loss_weight: float = 1.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.loss_weight * pkd_loss(pred, target)


class KDQualityFocalLoss(nn.Module):
    """`kd_quality_focal_loss` times `loss_weight`."""

    def __init__(self, use_sigmoid: bool = True, beta: float = 1.0, loss_weight: float = 1.0):
        super().__init__()
        if not use_sigmoid:
            raise ValueError("KDQualityFocalLoss: only use_sigmoid: true is supported, as in every reference")
        self.beta, self.loss_weight = beta, loss_weight

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean",
                avg_factor: float | Tensor | None = None) -> Tensor:
        return self.loss_weight * kd_quality_focal_loss(pred, target, weight, self.beta, reduction, avg_factor)


class KnowledgeDistillationKLDivLoss(nn.Module):
    """`kd_kl_div_loss` times `loss_weight`."""

    def __init__(self, class_reduction: str = "mean", T: float = 10.0, loss_weight: float = 1.0):
        super().__init__()
        if T < 1:
            raise ValueError(f"KnowledgeDistillationKLDivLoss: T must be at least 1, not {T}")
        self.class_reduction, self.T, self.loss_weight = class_reduction, T, loss_weight

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean",
                avg_factor: float | Tensor | None = None) -> Tensor:
        return self.loss_weight * kd_kl_div_loss(
            pred, target, weight, self.T, self.class_reduction, reduction, avg_factor)
