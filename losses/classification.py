"""Losses for dense classification scores."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.ranges import NonNegative, Share

from .reduce import at_least_float32, modulate, reduce_loss
from .sliced import background, one_class, summed_loss, towards


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Boolean one-hot (..., C) of labels (...). A label outside [0, C) is background and gives zeros."""
    return labels.unsqueeze(-1) == torch.arange(num_classes, device=labels.device)


def sigmoid_focal_loss(pred: Tensor, labels: Tensor, weight: Tensor | None = None, gamma: float = 2.0,
                       alpha: float = 0.25, reduction: str = "mean",
                       avg_factor: float | Tensor | None = None) -> Tensor:
    """Focal loss (RetinaNet, arXiv:1708.02002, eq. 5) over sigmoid scores.

    Args:
        pred: (..., C) logits.
        labels: (...) int64 in [0, C]; C is background.
        weight: (...) or (..., C).
    """
    def entries(pred: Tensor, labels: Tensor) -> Tensor:
        pred, positive = at_least_float32(pred), one_hot(labels, pred.shape[-1])
        right = torch.where(positive, pred, -pred)  # the logit of p_t
        balance = torch.where(positive, pred.new_full((), -alpha), alpha - 1)  # two bare numbers would give float32
        return F.logsigmoid(right) * modulate((-right).sigmoid(), gamma) * balance

    def own(logit: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = background(-logit, gamma)
        return alpha * loss, -alpha * gradient

    def terms(pred: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return one_class(pred, labels, gamma, 1 - alpha, own)

    return summed_loss(terms, entries, pred, (labels,), weight, reduction, avg_factor)


def quality_focal_loss(pred: Tensor, target: tuple[Tensor, Tensor], weight: Tensor | None = None, beta: float = 2.0,
                       reduction: str = "mean", avg_factor: float | Tensor | None = None) -> Tensor:
    """Quality focal loss (GFL, arXiv:2006.04388, eq. 4): the positive class learns its box's IoU, the others zero.

    Args:
        pred: (..., C) logits.
        target: labels (...) int64 in [0, C], C is background; and quality scores (...).
        weight: (...).
    Returns:
        With reduction "none", (...): the sum over classes.
    """
    def entries(pred: Tensor, labels: Tensor, score: Tensor) -> Tensor:
        pred = at_least_float32(pred)
        quality = one_hot(labels, pred.shape[-1]) * score.to(pred.dtype).unsqueeze(-1)
        loss = F.binary_cross_entropy_with_logits(pred, quality, reduction="none")
        return (loss * modulate((quality - pred.sigmoid()).abs(), beta)).sum(-1)

    def terms(pred: Tensor, labels: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        quality = score.to(pred.dtype).unsqueeze(-1)
        return one_class(pred, labels, beta, 1.0, lambda logit: towards(logit, quality, beta))

    return summed_loss(terms, entries, pred, target, weight, reduction, avg_factor)


def binary_cross_entropy(pred: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean",
                         avg_factor: float | Tensor | None = None) -> Tensor:
    """Binary cross-entropy: logits (...), targets (...) in [0, 1]. FCOS's centerness loss (arXiv:1904.01355, 3.3)."""
    pred = at_least_float32(pred)
    loss = F.binary_cross_entropy_with_logits(pred, target.to(pred.dtype), reduction="none")
    return reduce_loss(loss, weight, reduction, avg_factor)


class FocalLoss(nn.Module):
    """`sigmoid_focal_loss` times `loss_weight`."""

    takes = "logits and labels"

    def __init__(self, use_sigmoid: bool = True, gamma: NonNegative = 2.0, alpha: Share = 0.25,
                 loss_weight: NonNegative = 1.0):
        super().__init__()
        if not use_sigmoid:
            raise ValueError("FocalLoss: use_sigmoid must be true, as in every reference configuration")
        self.gamma, self.alpha, self.loss_weight = gamma, alpha, loss_weight

    def forward(self, pred: Tensor, labels: Tensor, weight: Tensor | None = None, reduction: str = "mean",
                avg_factor: float | Tensor | None = None) -> Tensor:
        return self.loss_weight * sigmoid_focal_loss(
            pred, labels, weight, self.gamma, self.alpha, reduction, avg_factor)


class QualityFocalLoss(nn.Module):
    """`quality_focal_loss` times `loss_weight`."""

    takes = "logits, labels and qualities"

    def __init__(self, use_sigmoid: bool = True, beta: NonNegative = 2.0, loss_weight: NonNegative = 1.0):
        super().__init__()
        if not use_sigmoid:
            raise ValueError("QualityFocalLoss: use_sigmoid must be true, as in every reference configuration")
        self.beta, self.loss_weight = beta, loss_weight

    def forward(self, pred: Tensor, target: tuple[Tensor, Tensor], weight: Tensor | None = None,
                reduction: str = "mean", avg_factor: float | Tensor | None = None) -> Tensor:
        return self.loss_weight * quality_focal_loss(pred, target, weight, self.beta, reduction, avg_factor)


class CrossEntropyLoss(nn.Module):
    """`binary_cross_entropy` times `loss_weight`."""

    takes = "logits and probabilities"

    def __init__(self, use_sigmoid: bool = True, loss_weight: NonNegative = 1.0):
        super().__init__()
        if not use_sigmoid:
            raise ValueError("CrossEntropyLoss: use_sigmoid must be true, as the centerness loss needs it")
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean",
                avg_factor: float | Tensor | None = None) -> Tensor:
        return self.loss_weight * binary_cross_entropy(pred, target, weight, reduction, avg_factor)
