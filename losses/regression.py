"""Losses for box offsets and for the distributions of box sides."""
import torch
from torch import Tensor, nn

from data.ranges import NonNegative

from .reduce import at_least_float32, reduce_loss


def l1_loss(pred: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean",
            avg_factor: float | Tensor | None = None) -> Tensor:
    """|pred - target| over (..., D)."""
    return reduce_loss((at_least_float32(pred) - target).abs(), weight, reduction, avg_factor)


def smooth_l1_loss(pred: Tensor, target: Tensor, weight: Tensor | None = None, beta: float = 1.0,
                   reduction: str = "mean", avg_factor: float | Tensor | None = None) -> Tensor:
    """Smooth L1 over (..., D) (Fast R-CNN, arXiv:1504.08083, eq. 3): quadratic below `beta`, linear above; 0 is L1."""
    diff = (at_least_float32(pred) - target).abs()
    if beta > 0:
        diff = torch.where(diff < beta, 0.5 * diff * diff / beta, diff - 0.5 * beta)
    return reduce_loss(diff, weight, reduction, avg_factor)


def distribution_focal_loss(pred: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean",
                            avg_factor: float | Tensor | None = None) -> Tensor:
    """Distribution focal loss (GFL, arXiv:2006.04388, eq. 6): cross-entropy with the two bins next to the target.

    Args:
        pred: (..., n + 1) logits over the distances 0..n.
        target: (...) distances in [0, n).
        weight: (...).
    """
    log_prob = at_least_float32(pred).log_softmax(-1)
    target = at_least_float32(target)
    left = target.long()
    to_left = log_prob.gather(-1, left.unsqueeze(-1)).squeeze(-1)
    to_right = log_prob.gather(-1, left.unsqueeze(-1) + 1).squeeze(-1)
    loss = -(to_left * (left + 1 - target) + to_right * (target - left))
    return reduce_loss(loss, weight, reduction, avg_factor)


class L1Loss(nn.Module):
    """`l1_loss` times `loss_weight`."""

    takes = "numbers"

    def __init__(self, loss_weight: NonNegative = 1.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean",
                avg_factor: float | Tensor | None = None) -> Tensor:
        return self.loss_weight * l1_loss(pred, target, weight, reduction, avg_factor)


class SmoothL1Loss(nn.Module):
    """`smooth_l1_loss` times `loss_weight`."""

    takes = "numbers"

    def __init__(self, beta: NonNegative = 1.0, loss_weight: NonNegative = 1.0):
        super().__init__()
        self.beta, self.loss_weight = beta, loss_weight

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean",
                avg_factor: float | Tensor | None = None) -> Tensor:
        return self.loss_weight * smooth_l1_loss(pred, target, weight, self.beta, reduction, avg_factor)


class DistributionFocalLoss(nn.Module):
    """`distribution_focal_loss` times `loss_weight`."""

    takes = "distributions and numbers"

    def __init__(self, loss_weight: NonNegative = 1.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean",
                avg_factor: float | Tensor | None = None) -> Tensor:
        return self.loss_weight * distribution_focal_loss(pred, target, weight, reduction, avg_factor)
