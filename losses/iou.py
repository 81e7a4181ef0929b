"""IoU of aligned boxes, and losses that use it. All boxes are (..., 4) xyxy, in any unit."""
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from data.ranges import NonNegative, Positive

from .reduce import at_least_float32, reduce_loss


def _overlap(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intersection and union areas (...), and the width and height (..., 2) of the smallest enclosing box."""
    pred, target = at_least_float32(pred), at_least_float32(target)
    size = (torch.min(pred[..., 2:], target[..., 2:]) - torch.max(pred[..., :2], target[..., :2])).clamp(min=0)
    inter = size[..., 0] * size[..., 1]
    pred_size, target_size = pred[..., 2:] - pred[..., :2], target[..., 2:] - target[..., :2]
    union = pred_size[..., 0] * pred_size[..., 1] + target_size[..., 0] * target_size[..., 1] - inter
    enclose = (torch.max(pred[..., 2:], target[..., 2:]) - torch.min(pred[..., :2], target[..., :2])).clamp(min=0)
    return inter, union, enclose


def aligned_iou(pred: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """IoU (...) of each box in `pred` with the box at the same index in `target`."""
    inter, union, _ = _overlap(pred, target)
    return inter / union.clamp(min=eps)


def iou_loss(pred: Tensor, target: Tensor, weight: Tensor | None = None, mode: str = "log", eps: float = 1e-6,
             reduction: str = "mean", avg_factor: float | Tensor | None = None) -> Tensor:
    """IoU loss (UnitBox, arXiv:1608.01471): -log IoU; 1 - IoU with mode "linear", 1 - IoU^2 with mode "square"."""
    iou = aligned_iou(pred, target).clamp(min=eps)
    if mode == "log":
        loss = -iou.log()
    elif mode == "linear":
        loss = 1 - iou
    elif mode == "square":
        loss = 1 - iou ** 2
    else:
        raise ValueError(f'IoU loss mode must be "log", "linear" or "square", not "{mode}"')
    return reduce_loss(loss, weight, reduction, avg_factor)


def giou_loss(pred: Tensor, target: Tensor, weight: Tensor | None = None, eps: float = 1e-6,
              reduction: str = "mean", avg_factor: float | Tensor | None = None) -> Tensor:
    """1 - GIoU (arXiv:1902.09630, algorithm 1)."""
    inter, union, enclose = _overlap(pred, target)
    union = union.clamp(min=eps)
    area = (enclose[..., 0] * enclose[..., 1]).clamp(min=eps)
    loss = 1 - inter / union + (area - union) / area
    return reduce_loss(loss, weight, reduction, avg_factor)


def _distance_terms(pred: Tensor, target: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """IoU, and the squared distance between the centres, divided by the squared diagonal of the enclosing box."""
    inter, union, enclose = _overlap(pred, target)
    pred, target = at_least_float32(pred), at_least_float32(target)
    diagonal = (enclose ** 2).sum(-1) + eps
    centre_shift = (target[..., :2] + target[..., 2:] - pred[..., :2] - pred[..., 2:]) / 2
    return inter / (union + eps), (centre_shift ** 2).sum(-1) / diagonal


def diou_loss(pred: Tensor, target: Tensor, weight: Tensor | None = None, eps: float = 1e-6,
              reduction: str = "mean", avg_factor: float | Tensor | None = None) -> Tensor:
    """1 - DIoU (arXiv:1911.08287, eq. 7)."""
    iou, distance = _distance_terms(pred, target, eps)
    return reduce_loss(1 - iou + distance, weight, reduction, avg_factor)


def ciou_loss(pred: Tensor, target: Tensor, weight: Tensor | None = None, eps: float = 1e-6,
              reduction: str = "mean", avg_factor: float | Tensor | None = None) -> Tensor:
    """1 - CIoU (arXiv:1911.08287, eq. 10); the aspect term counts only above IoU 0.5; its factor has no gradient."""
    pred, target = at_least_float32(pred), at_least_float32(target)
    iou, distance = _distance_terms(pred, target, eps)

    def angle(box: Tensor) -> Tensor:
        return torch.atan((box[..., 2] - box[..., 0]) / (box[..., 3] - box[..., 1] + eps))

    aspect = 4 / math.pi ** 2 * (angle(target) - angle(pred)) ** 2
    with torch.no_grad():
        # Without the clamp, a perfect box gives 0/0 if eps is lost in the rounding of its area.
        alpha = (iou > 0.5) * aspect / (1 - iou + aspect).clamp(min=torch.finfo(iou.dtype).tiny)
    ciou = iou - distance - alpha * aspect
    return reduce_loss(1 - ciou.clamp(-1, 1), weight, reduction, avg_factor)


class _BoxLoss(nn.Module):
    """A box loss from this file, times `loss_weight`."""

    takes = "boxes"
    function: Callable[..., Tensor]

    def __init__(self, eps: Positive = 1e-6, loss_weight: NonNegative = 1.0):
        super().__init__()
        self.options = {"eps": eps}
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean",
                avg_factor: float | Tensor | None = None) -> Tensor:
        return self.loss_weight * type(self).function(
            pred, target, weight, reduction=reduction, avg_factor=avg_factor, **self.options)


class IoULoss(_BoxLoss):
    """`iou_loss` times `loss_weight`."""

    function = staticmethod(iou_loss)

    def __init__(self, mode: Literal["log", "linear", "square"] = "log", eps: Positive = 1e-6,
                 loss_weight: NonNegative = 1.0):
        super().__init__(eps, loss_weight)
        self.options["mode"] = mode


class GIoULoss(_BoxLoss):
    """`giou_loss` times `loss_weight`."""

    function = staticmethod(giou_loss)


class DIoULoss(_BoxLoss):
    """`diou_loss` times `loss_weight`."""

    function = staticmethod(diou_loss)


class CIoULoss(_BoxLoss):
    """`ciou_loss` times `loss_weight`."""

    function = staticmethod(ciou_loss)
