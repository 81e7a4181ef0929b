"""Losses that compare a student's prediction or feature with a teacher's. The target never gets a gradient."""
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.ranges import NonNegative, Temperature

from .channels import rescaled_channels
from .reduce import at_least_float32, modulate, reduce_loss
from .sliced import EXACT, summed_loss, towards


def kd_quality_focal_loss(pred: Tensor, target: Tensor, weight: Tensor | None = None, beta: float = 1.0,
                          reduction: str = "mean", avg_factor: float | Tensor | None = None) -> Tensor:
    """Quality focal loss towards the teacher's scores (CrossKD, arXiv:2306.11369, section 3.3).

    Args:
        pred, target: (..., C) logits of student and teacher.
        weight: (...) or (..., C).
    """
    def entries(pred: Tensor, target: Tensor) -> Tensor:
        pred, target = at_least_float32(pred), at_least_float32(target).sigmoid()
        loss = F.binary_cross_entropy_with_logits(pred, target, reduction="none")
        return loss * modulate((pred.sigmoid() - target).abs(), beta)

    def terms(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = towards(pred, target.to(pred.dtype).sigmoid(), beta)
        return loss.sum(-1), gradient

    return summed_loss(terms, entries, pred, (target.detach(),), weight, reduction, avg_factor)


def kd_kl_div_loss(pred: Tensor, target: Tensor, weight: Tensor | None = None, T: float = 10.0,
                   class_reduction: str = "mean", reduction: str = "mean",
                   avg_factor: float | Tensor | None = None) -> Tensor:
    """KL divergence between softened distributions, times T^2 (Hinton et al., arXiv:1503.02531, section 2).

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


def pkd_loss(pred: Tensor, target: Tensor, eps: float = 1e-6, sync_stats: bool = False) -> Tensor:
    """Half the mean squared error of features normalised per channel over the batch (PKD, arXiv:2207.02039, eq. 5).

    Args:
        pred, target: maps (N, C, H, W) of student and teacher.
        sync_stats: normalise over the batches of all processes, not only this process's batch.
    """
    own, = rescaled_channels([pred], eps=eps, sync=sync_stats)
    other, = rescaled_channels([target.detach()], eps=eps, sync=sync_stats)
    return F.mse_loss(own, other) / 2


def channel_wise_divergence(pred: Tensor, target: Tensor, tau: float = 1.0) -> Tensor:
    """KL divergence of each channel's distribution over positions, times tau^2 (CWD, arXiv:2011.13256, eq. 3, 4).

    The result is the mean over channels and images.

    Args:
        pred, target: maps (N, C, H, W) of student and teacher.
        tau: temperature.
    """
    pred = (at_least_float32(pred).flatten(2) / tau).log_softmax(-1)
    target = (at_least_float32(target).detach().flatten(2) / tau).softmax(-1)
    return F.kl_div(pred, target, reduction="none").sum(-1).mean() * tau ** 2


def binary_kd_loss(pred: Tensor, target: Tensor, weight: Tensor | None = None, T: float = 1.0,
                   reduction: str = "mean", avg_factor: float | Tensor | None = None) -> Tensor:
    """KL divergence of softened sigmoids, times T^2: Hinton's distillation (arXiv:1503.02531), two outcomes per class.

    Args:
        pred, target: (..., C) logits of student and teacher.
        weight: (...) or (..., C).
        T: temperature.
    """
    def entries(pred: Tensor, target: Tensor) -> Tensor:
        pred, target = at_least_float32(pred) / T, at_least_float32(target) / T
        loss = F.binary_cross_entropy_with_logits(pred, target.sigmoid(), reduction="none")
        return (loss - F.binary_cross_entropy_with_logits(target, target.sigmoid(), reduction="none")) * T ** 2

    def terms(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        pred, target = pred / T, target.to(pred.dtype) / T
        score = target.sigmoid()
        loss, gradient = towards(pred, score, 0)
        least = F.softplus(target, threshold=EXACT).addcmul_(target, score, value=-1)
        return (loss - least).sum(-1) * T ** 2, gradient * T

    return summed_loss(terms, entries, pred, (target.detach(),), weight, reduction, avg_factor)


def dkd_loss(pred: Tensor, target: Tensor, labels: Tensor, weight: Tensor | None = None, alpha: float = 1.0,
             beta: float = 8.0, T: float = 4.0, reduction: str = "mean",
             avg_factor: float | Tensor | None = None) -> Tensor:
    """Decoupled distillation of softened class probabilities, times T^2 (DKD, arXiv:2203.08679, eq. 5, 7).

    Args:
        pred, target: (..., C) logits of student and teacher, C at least 2.
        labels: (...) int64, the true classes.
        weight: (...).
        alpha: weight of the divergence between the true class and all others together.
        beta: weight of the divergence among the other classes.
        T: temperature.
    """
    pred, target = at_least_float32(pred) / T, at_least_float32(target).detach() / T
    true = F.one_hot(labels, pred.shape[-1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (..., 2) of true class and others together, and (..., C) among the others alone."""
        others = logits.masked_fill(true, float("-inf"))
        both = torch.stack([logits.masked_fill(~true, float("-inf")).logsumexp(-1), others.logsumexp(-1)], -1)
        return both.log_softmax(-1), others.log_softmax(-1).masked_fill(true, 0)

    (own, own_others), (teacher, teacher_others) = parts(pred), parts(target)
    target_class = F.kl_div(own, teacher, reduction="none", log_target=True).sum(-1)
    # The true class has no share among the others: its entries are zero on both sides.
    other_classes = (teacher_others.exp().masked_fill(true, 0) * (teacher_others - own_others)).sum(-1)
    return reduce_loss((alpha * target_class + beta * other_classes) * T ** 2, weight, reduction, avg_factor)


class PKDLoss(nn.Module):
    """`pkd_loss` times `loss_weight`."""

    def __init__(self, loss_weight: float = 1.0, sync_stats: bool = False):
        super().__init__()
        self.loss_weight, self.sync_stats = loss_weight, sync_stats

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.loss_weight * pkd_loss(pred, target, sync_stats=self.sync_stats)


class KDQualityFocalLoss(nn.Module):
    """`kd_quality_focal_loss` times `loss_weight`."""

    takes = "logits of both sides"

    def __init__(self, use_sigmoid: bool = True, beta: NonNegative = 1.0, loss_weight: NonNegative = 1.0):
        super().__init__()
        if not use_sigmoid:
            raise ValueError("KDQualityFocalLoss: use_sigmoid must be true, as in every reference configuration")
        self.beta, self.loss_weight = beta, loss_weight

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean",
                avg_factor: float | Tensor | None = None) -> Tensor:
        return self.loss_weight * kd_quality_focal_loss(pred, target, weight, self.beta, reduction, avg_factor)


class KnowledgeDistillationKLDivLoss(nn.Module):
    """`kd_kl_div_loss` times `loss_weight`."""

    takes = "distributions of both sides"

    def __init__(self, class_reduction: Literal["mean", "sum"] = "mean", T: Temperature = 10.0,
                 loss_weight: NonNegative = 1.0):
        super().__init__()
        if T < 1:
            raise ValueError(f"KnowledgeDistillationKLDivLoss: T must be at least 1, not {T}")
        self.class_reduction, self.T, self.loss_weight = class_reduction, T, loss_weight

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean",
                avg_factor: float | Tensor | None = None) -> Tensor:
        return self.loss_weight * kd_kl_div_loss(
            pred, target, weight, self.T, self.class_reduction, reduction, avg_factor)
