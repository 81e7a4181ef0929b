"""Assigners choose which anchor learns which box. They process whole batches at once, with padded boxes.

Every assigner takes
    priors: `Priors` with P anchors
    valid: (N, P) bool, true for anchors that take part
    boxes: (N, G, 4) xyxy in pixels, padded, G at least 1; real: (N, G) bool, false for padding
    ignored: (N, M, 4) and ignored_real (N, M), padded regions that are neither object nor background
and returns (N, P) int64: the index of the box that the anchor learns, or NEGATIVE, or IGNORED.
"""
from collections.abc import Iterator
from typing import Annotated

import torch
from torch import Tensor

from data.ranges import Count, Range, Share

from .anchors import Priors
from .build import ConfigError
from .layers import from_host

NEGATIVE, IGNORED = -1, -2
MAX_PAIRS = 2 ** 25  # pairs of box and anchor in memory at once: at most about 2 GB, for any number of boxes
ShareOrMinusOne = Annotated[float, Range(-1, 1)]
FAR = 1e8  # the references' distance for an ignored anchor: it is chosen only if no other anchor is left


def pairwise_overlap(boxes: Tensor, others: Tensor, mode: str = "iou", eps: float = 1e-6) -> Tensor:
    """IoU (..., G, P) of boxes (..., G, 4) and others (..., P, 4); mode "iof" divides by the area of `boxes`."""
    a, b = boxes.unsqueeze(-2), others.unsqueeze(-3)
    width = (torch.min(a[..., 2], b[..., 2]) - torch.max(a[..., 0], b[..., 0])).clamp(min=0)
    height = (torch.min(a[..., 3], b[..., 3]) - torch.max(a[..., 1], b[..., 1])).clamp(min=0)
    inter = width * height
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    if mode == "iof":
        return inter / area_a.clamp(min=eps)
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    return inter / (area_a + area_b - inter).clamp(min=eps)


def in_ignored_region(priors: Tensor, ignored: Tensor, ignored_real: Tensor, threshold: float,
                      wrt_priors: bool = True) -> Tensor:
    """(N, P) bool: intersection with a region / area of anchor (not `wrt_priors`: of region) exceeds `threshold`."""
    if wrt_priors:
        share = pairwise_overlap(priors, ignored, "iof").transpose(-1, -2)
    else:
        share = pairwise_overlap(ignored, priors, "iof")
    return ((share > threshold) & ignored_real.unsqueeze(-1)).any(1)


def box_chunks(boxes: Tensor, num_priors: int) -> Iterator[slice]:
    """Slices of boxes (N, G, 4) with at most MAX_PAIRS pairs of box and anchor each; usually there is only one."""
    size = max(1, MAX_PAIRS // (len(boxes) * num_priors))
    return (slice(start, start + size) for start in range(0, boxes.shape[1], size))


class MaxIoUAssigner:
    """Assigns by IoU thresholds (Faster R-CNN, arXiv:1506.01497, section 3.1.2). The defaults are RetinaNet's.

    Args:
        pos_iou_thr: an anchor with at least this IoU is positive.
        neg_iou_thr: an anchor below this IoU is negative; a pair also sets a lower bound. The rest is ignored.
        min_pos_iou: a box takes its best anchor by `match_low_quality` only if their IoU is at least this.
        match_low_quality: a box takes its best anchor even if their IoU is below `pos_iou_thr`.
        gt_max_assign_all: if several anchors are equally good, the box takes all of them and not only the first.
        low_quality_to_best: an anchor that is taken by `match_low_quality` learns the box that it overlaps most, as in
            detectron2 and torchvision. Otherwise it learns the box that took it, as in mmdet.
        ignore_iof_thr: an anchor is ignored if more than this share of it is in an ignored region; -1 turns this off.
        ignore_wrt_candidates: the share is a share of the anchor's area; otherwise of the region's area.
    """

    def __init__(self, pos_iou_thr: Share = 0.5, neg_iou_thr: Share | tuple[Share, Share] = 0.4,
                 min_pos_iou: Share = 0.0, match_low_quality: bool = True, gt_max_assign_all: bool = True,
                 low_quality_to_best: bool = False, ignore_iof_thr: ShareOrMinusOne = -1,
                 ignore_wrt_candidates: bool = True):
        self.pos_iou_thr, self.min_pos_iou = pos_iou_thr, min_pos_iou
        self.neg_iou_thr = (0.0, neg_iou_thr) if isinstance(neg_iou_thr, (int, float)) else tuple(neg_iou_thr)
        if self.neg_iou_thr[0] > self.neg_iou_thr[1]:
            raise ConfigError("neg_iou_thr", f"{list(neg_iou_thr)} must be a lower bound and an upper bound")
        if self.neg_iou_thr[1] > pos_iou_thr:
            raise ConfigError("neg_iou_thr", f"{neg_iou_thr} must not be above pos_iou_thr {pos_iou_thr}")
        self.match_low_quality, self.gt_max_assign_all = match_low_quality, gt_max_assign_all
        self.low_quality_to_best = low_quality_to_best
        self.ignore_iof_thr, self.ignore_wrt_candidates = ignore_iof_thr, ignore_wrt_candidates

    @torch.no_grad()
    def __call__(self, priors: Priors, valid: Tensor, boxes: Tensor, real: Tensor, ignored: Tensor,
                 ignored_real: Tensor) -> Tensor:
        usable = valid
        if self.ignore_iof_thr > 0 and ignored.shape[1]:
            usable = usable & ~in_ignored_region(
                priors.boxes, ignored, ignored_real, self.ignore_iof_thr, self.ignore_wrt_candidates)
        best = torch.full_like(valid, -1, dtype=boxes.dtype)
        best_box, taken = torch.zeros_like(valid, dtype=torch.long), torch.full_like(valid, NEGATIVE, dtype=torch.long)
        for part in box_chunks(boxes, len(priors.boxes)):
            overlaps = pairwise_overlap(boxes[:, part], priors.boxes)
            overlaps.masked_fill_(~(real[:, part].unsqueeze(-1) & usable.unsqueeze(1)), -1)
            overlap, box = overlaps.max(dim=1)
            best_box = torch.where(overlap > best, box + part.start, best_box)
            best = torch.maximum(best, overlap)
            if self.match_low_quality:
                taker = self._taker(overlaps)
                taken = torch.where(taker >= 0, taker + part.start, taken)
        assigned = torch.full_like(best_box, IGNORED)
        assigned.masked_fill_((best >= self.neg_iou_thr[0]) & (best < self.neg_iou_thr[1]), NEGATIVE)
        assigned = torch.where(best >= self.pos_iou_thr, best_box, assigned)
        assigned = torch.where(taken >= 0, best_box if self.low_quality_to_best else taken, assigned)
        # In an image without boxes, all anchors are background, also those in ignored regions.
        return assigned.masked_fill(~real.any(1, keepdim=True), NEGATIVE)

    def positive_threshold(self, priors: Priors, valid: Tensor, boxes: Tensor) -> Tensor:
        """The lowest IoU (N, G) with which an anchor may learn each box."""
        return boxes.new_full(boxes.shape[:2], self.pos_iou_thr)

    def _taker(self, overlaps: Tensor) -> Tensor:
        """(N, P): the box that takes the anchor as its best, from overlaps (N, G, P); the last of several, or -1."""
        best, best_anchor = overlaps.max(dim=2, keepdim=True)
        if self.gt_max_assign_all:
            taken = overlaps == best
        else:
            taken = torch.zeros_like(overlaps, dtype=torch.bool).scatter_(2, best_anchor, True)
        taken &= best >= max(self.min_pos_iou, 0)  # -1 marks pairs that take no part
        order = torch.arange(1, taken.shape[1] + 1, device=taken.device).view(1, -1, 1)
        return (taken * order).amax(dim=1) - 1


class ATSSAssigner:
    """Adaptive training sample selection (ATSS, arXiv:1912.02424, algorithm 1).

    Args:
        topk: candidates per box and level.
        ignore_iof_thr: an anchor is ignored if more than this share of it is in an ignored region; -1 turns this off.
    """

    def __init__(self, topk: Count = 9, ignore_iof_thr: ShareOrMinusOne = -1):
        self.topk, self.ignore_iof_thr = topk, ignore_iof_thr

    @torch.no_grad()
    def __call__(self, priors: Priors, valid: Tensor, boxes: Tensor, real: Tensor, ignored: Tensor,
                 ignored_real: Tensor) -> Tensor:
        assigned = torch.full(valid.shape, NEGATIVE, dtype=torch.long, device=valid.device)
        if not valid.is_cuda and not valid.all():
            for i, keep, image in self._each_image(priors, valid, boxes, real, ignored, ignored_real):
                assigned[i, keep] = self(*image)[0]
            return assigned
        region = None
        if self.ignore_iof_thr > 0 and ignored.shape[1]:
            region = in_ignored_region(priors.boxes, ignored, ignored_real, self.ignore_iof_thr)
            region &= real.any(1, keepdim=True)
            assigned.masked_fill_(region, IGNORED)
        best = torch.full_like(valid, -1, dtype=boxes.dtype)
        for part in box_chunks(boxes, len(priors.boxes)):
            overlap, box = self._positives(priors, valid, boxes[:, part], real[:, part], region).max(dim=1)
            # If several boxes want an anchor, it goes to the box that it overlaps most.
            assigned = torch.where(overlap > best, box + part.start, assigned)
            best = torch.maximum(best, overlap)
        return assigned

    def _positives(self, priors: Priors, valid: Tensor, boxes: Tensor, real: Tensor, region: Tensor | None) -> Tensor:
        """(N, G, P): the overlap of a box with each anchor that may learn it, -1 for other anchors."""
        candidates, chosen, overlaps = self._candidates(priors, valid, boxes, region)
        positive = chosen & (overlaps >= self._threshold(overlaps, chosen).unsqueeze(-1))
        points = priors.centers[candidates]
        sides = torch.cat([points - boxes[:, :, None, :2], boxes[:, :, None, 2:] - points], dim=-1)
        positive &= (sides.amin(-1) > 0.01) & real.unsqueeze(-1)
        return overlaps.new_full((*boxes.shape[:2], valid.shape[1]), -1).scatter_(
            2, candidates, torch.where(positive, overlaps, -1))

    def positive_threshold(self, priors: Priors, valid: Tensor, boxes: Tensor) -> Tensor:
        """The lowest IoU (N, G) with which an anchor may learn each box."""
        if not valid.is_cuda and not valid.all():
            return torch.cat([self.positive_threshold(*image) for *_, image in self._each_image(priors, valid, boxes)])
        _, chosen, overlaps = self._candidates(priors, valid, boxes)
        return self._threshold(overlaps, chosen)

    def _candidates(self, priors: Priors, valid: Tensor, boxes: Tensor,
                    far: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Each box's nearest anchors: their indices, whether they are valid, and their IoU with it, (N, G, C) each.

        Anchors in `far` (N, P) are taken only if no others are left.
        """
        box_centers = (boxes[..., :2] + boxes[..., 2:]) / 2
        distances = (priors.centers - box_centers.unsqueeze(2)).pow(2).sum(-1).sqrt()  # (N, G, P)
        if far is not None:
            distances.masked_fill_(far.unsqueeze(1), FAR)
        distances.masked_fill_(~valid.unsqueeze(1), float("inf"))
        candidates = self._nearest(distances, priors.level_sizes)
        chosen = valid.unsqueeze(1).expand_as(distances).gather(2, candidates)
        return candidates, chosen, pairwise_overlap(boxes.unsqueeze(2), priors.boxes[candidates]).squeeze(2)

    @staticmethod
    def _each_image(priors: Priors, valid: Tensor, *truth: Tensor) -> Iterator[tuple[int, Tensor, tuple]]:
        """For each image its index, its valid anchors (P,), and the same arguments for only these anchors.

        Anchors at equal distances are common, because coordinates are often whole numbers. Which of them `topk` takes
        depends on its other inputs. The references pass only the valid anchors. On the CPU we do the same, so that our
        values can be compared with theirs.
        """
        for i, keep in enumerate(valid):
            counts = tuple(int(level.sum()) for level in keep.split(priors.level_sizes))
            own = priors.take(keep)._replace(level_sizes=counts)
            yield i, keep, (own, keep[keep].unsqueeze(0), *(t[i:i + 1] for t in truth))

    def _nearest(self, distances: Tensor, level_sizes: tuple[int, ...]) -> Tensor:
        """Indices (N, G, C) of the `topk` anchors of each level that are nearest to each box."""
        found, start = [], 0
        for size in level_sizes:
            level = distances[:, :, start:start + size]
            found.append(level.topk(min(self.topk, size), dim=2, largest=False).indices + start)
            start += size
        return torch.cat(found, dim=2)

    @staticmethod
    def _threshold(overlaps: Tensor, chosen: Tensor) -> Tensor:
        """Mean plus unbiased standard deviation (N, G) of each box's IoUs (N, G, C), over its chosen candidates."""
        count = chosen.sum(-1)
        mean = (overlaps * chosen).sum(-1) / count
        square = ((overlaps - mean.unsqueeze(-1)) * chosen).pow(2).sum(-1)
        return mean + (square / (count - 1)).sqrt()


class FCOSAssigner:
    """Assigns to each point the smallest box that it may learn (FCOS, arXiv:1904.01355, section 3.1 and 3.2).

    Args:
        regress_ranges: for each level, lower and upper bound of a point's largest distance to a side, in pixels.
        center_sampling: a point must lie in the box and within `center_sample_radius` strides of its centre.
    """

    def __init__(self, regress_ranges: list[tuple[float, float]], center_sampling: bool, center_sample_radius: float):
        self.regress_ranges, self.center_sampling = regress_ranges, center_sampling
        self.center_sample_radius = center_sample_radius

    @torch.no_grad()
    def __call__(self, priors: Priors, valid: Tensor, boxes: Tensor, real: Tensor, ignored: Tensor,
                 ignored_real: Tensor) -> Tensor:
        ranges = from_host(self.regress_ranges, boxes)
        bounds = torch.cat([row.expand(size, 2) for row, size in zip(ranges, priors.level_sizes)])  # (P, 2)
        assigned = torch.full_like(valid, NEGATIVE, dtype=torch.long)
        smallest = torch.full_like(valid, float("inf"), dtype=boxes.dtype)
        for part in box_chunks(boxes, len(priors.boxes)):
            allowed = self._allowed(priors, boxes[:, part], bounds) & real[:, part].unsqueeze(-1) & valid.unsqueeze(1)
            size = boxes[:, part, 2:] - boxes[:, part, :2]
            area, box = torch.where(allowed, size.prod(-1, keepdim=True), float("inf")).min(dim=1)
            assigned = torch.where(area < smallest, box + part.start, assigned)
            smallest = torch.minimum(smallest, area)
        return assigned

    def _allowed(self, priors: Priors, boxes: Tensor, bounds: Tensor) -> Tensor:
        """(N, G, P) bool: the point is in the allowed part of the box, and its largest distance suits its level."""
        points = priors.centers
        low, high = boxes[:, :, None, :2], boxes[:, :, None, 2:]  # (N, G, 1, 2)
        farthest = torch.cat([points - low, high - points], dim=-1).amax(-1)  # (N, G, P)
        if self.center_sampling:
            reach = (priors.strides * self.center_sample_radius).unsqueeze(-1)
            center = (low + high) / 2
            low, high = torch.max(low, center - reach), torch.min(high, center + reach)
        inside = torch.cat([points - low, high - points], dim=-1).amin(-1) > 0
        return inside & (farthest >= bounds[:, 0]) & (farthest <= bounds[:, 1])


ASSIGNERS = {"ATSSAssigner": ATSSAssigner, "MaxIoUAssigner": MaxIoUAssigner}
