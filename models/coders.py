"""Conversion of boxes to regression targets and back. All boxes are (..., 4) xyxy."""
import math

import torch
from torch import Tensor

from data.ranges import Positive

from .layers import from_host


class DeltaXYWHBBoxCoder:
    """Shifts of the centre and logarithms of the size, relative to an anchor (R-CNN, arXiv:1311.2524, appendix C).

    Args:
        target_means, target_stds: mean and standard deviation that normalise the four deltas.
        wh_ratio_clip: the ratio of decoded size to anchor size is clipped to this value and its inverse.
    """

    def __init__(self, target_means: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
                 target_stds: tuple[Positive, Positive, Positive, Positive] = (1.0, 1.0, 1.0, 1.0),
                 wh_ratio_clip: Positive = 16 / 1000):
        self.means, self.stds = list(target_means), list(target_stds)
        self.max_log_ratio = abs(math.log(wh_ratio_clip))

    def encode(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """Deltas (..., 4) from anchors to boxes. The boxes must have positive size."""
        size, target_size = anchors[..., 2:] - anchors[..., :2], boxes[..., 2:] - boxes[..., :2]
        shift = ((boxes[..., :2] + boxes[..., 2:]) / 2 - (anchors[..., :2] + anchors[..., 2:]) / 2) / size
        deltas = torch.cat([shift, (target_size / size).log()], dim=-1)
        return (deltas - from_host(self.means, deltas)) / from_host(self.stds, deltas)

    def decode(self, anchors: Tensor, deltas: Tensor) -> Tensor:
        """Boxes (..., 4) from anchors (..., 4) and deltas (..., 4)."""
        deltas = deltas * from_host(self.stds, deltas) + from_host(self.means, deltas)
        size = anchors[..., 2:] - anchors[..., :2]
        center = (anchors[..., :2] + anchors[..., 2:]) / 2 + size * deltas[..., :2]
        half = size * deltas[..., 2:].clamp(-self.max_log_ratio, self.max_log_ratio).exp() / 2
        return torch.cat([center - half, center + half], dim=-1)


class DistancePointBBoxCoder:
    """Distances from a point to the four sides (FCOS, arXiv:1904.01355, eq. 1)."""

    def encode(self, points: Tensor, boxes: Tensor, max_dis: float | None = None, eps: float = 0.1) -> Tensor:
        """Distances (..., 4) left, top, right, bottom from points (..., 2); `max_dis` clamps to [0, max_dis - eps]."""
        distances = torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)
        return distances if max_dis is None else distances.clamp(min=0, max=max_dis - eps)

    def decode(self, points: Tensor, distances: Tensor) -> Tensor:
        """Boxes (..., 4) from points (..., 2) and distances (..., 4)."""
        return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


CODERS = {"DeltaXYWHBBoxCoder": DeltaXYWHBBoxCoder}  # the heads on points have no choice


def clip_boxes(boxes: Tensor, size: tuple[float, float]) -> Tensor:
    """Boxes (..., 4) clipped to an image of (height, width)."""
    height, width = size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)
