"""A whole detector in one module, from pixels to detections in tensors of fixed size, as exporters need it."""
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from .anchors import Priors
from .build import ConfigError
from .detector import Detector
from .heads.dense import flatten

Suppress = Callable[[Tensor, Tensor, Tensor, int, float, int], Tensor]
Best = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, num_classes: int, iou_threshold: float,
             max_per_class: int) -> Tensor:
    """Non-maximum suppression within each class of each image.

    Args:
        boxes: (N, K, 4) xyxy; scores: (N, K), 0 where there is no box; labels: (N, K) int64, below `num_classes`.
        max_per_class: the number of boxes per class that must be kept; more are allowed.
    Returns:
        scores (N, K), set to 0 where a box is suppressed.
    """
    low, span = boxes.min().double(), (boxes.max() - boxes.min() + 1).double()
    image = torch.arange(boxes.shape[0], device=boxes.device).unsqueeze(1)
    apart = (labels + num_classes * image).unsqueeze(-1) * span  # see `class_nms`
    # Two extra boxes, far from all others: torch.export assumes that suppression leaves at least two.
    corners = low - torch.arange(1, 3, device=boxes.device).unsqueeze(-1) * span
    others = torch.cat([corners, corners, corners + 1, corners + 1], dim=1)
    spread = torch.cat([(boxes.double() + apart).reshape(-1, 4), others])
    flat = torch.cat([scores.reshape(-1), scores.new_ones(2)])
    real = (flat > 0).nonzero().squeeze(1)
    keep = real[nms(spread[real], flat[real].double(), iou_threshold)]
    return torch.zeros_like(flat).index_put((keep,), flat[keep])[:-2].reshape(scores.shape)


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` best of each row of scores (N, P) and their places, (N, k) each; of equal scores, the first come first.

    `topk` takes equal scores in any order, and a stable sort of all scores takes two to three times as long as this.
    """
    least, size = scores.topk(k).values[:, -1:], scores.shape[1]
    # All keys differ: first those above the least score, then those equal to it, each in their order.
    key = (scores > least).int().add(scores >= least) * size
    index = (key - torch.arange(size, dtype=torch.int32, device=scores.device)).topk(k).indices
    scores, order = scores.gather(1, index).sort(dim=1, descending=True, stable=True)
    return scores, index.gather(1, order)


class DeployedDetector(nn.Module):
    """Takes pixels and returns a fixed number of detections.

    Args:
        detector: its `test` section controls the detections. It is set to evaluation mode.
        with_nms: suppress overlaps; otherwise all candidates are returned, and the caller must suppress overlaps.
        end2end: also return the number of detections. There are then always `max_per_img` entries.
        suppress, best: the functions that suppress overlaps and take the best scores; an exporter may give its own.
    Raises:
        ConfigError: nms_pre or max_per_img of the `test` section is below 1: the output size is not fixed.
    """

    def __init__(self, detector: Detector, with_nms: bool = True, end2end: bool = False,
                 suppress: Suppress = suppress, best: Best = best):
        super().__init__()
        for name in ("nms_pre", "max_per_img"):
            if getattr(detector.test, name) < 1:
                raise ConfigError(f"model.test.{name}", "must be at least 1, so that the output size is fixed")
        self.detector, self.with_nms, self.end2end = detector, with_nms or end2end, end2end
        self.suppress, self.best = suppress, best
        self.eval()

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        """Detections of a batch.

        Args:
            images: uint8 (N, 3, H, W), RGB, resized; padded with any values at right and bottom to multiples of 32.
            image_sizes: int64 (N, 2), height and width before padding.
        Returns:
            boxes (N, K, 4) xyxy in pixels of `images`, scores (N, K) and labels (N, K) int64. With suppression, K
            is `max_per_img`, best first; without it, K is `nms_pre` per level. Unused entries have score 0. With
            `end2end`, before them num_dets (N, 1) int32: the entries from there on are unused, with box 0 and label -1.
        """
        features = self.detector.extract_features(self._normalise(images, image_sizes))
        levels = [self._candidates(feature, level, images.shape[2:]) for level, feature in enumerate(features)]
        boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*levels))
        test = self.detector.test
        if test.clip == "before":
            boxes, scores = self._clip(boxes, scores, image_sizes)
        if self.with_nms:
            scores = self.suppress(boxes, scores, labels, self.detector.bbox_head.num_classes, test.nms_iou_threshold,
                                   test.max_per_img)
            boxes, scores, labels = self._best(boxes, scores, labels, len(levels) * test.nms_pre)
            if test.clip == "after":
                boxes, scores = self._clip(boxes, scores, image_sizes)
        return self._counted(boxes, scores, labels) if self.end2end else (boxes, scores, labels)

    def _best(self, boxes: Tensor, scores: Tensor, labels: Tensor, there: int) -> tuple[Tensor, Tensor, Tensor]:
        """The `max_per_img` best detections in order, or all if `there` are fewer."""
        scores, index = self.best(scores, min(self.detector.test.max_per_img, there))
        return boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4)), scores, labels.gather(1, index)

    def _counted(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The number of detections (N, 1), and `max_per_img` entries of each kind: the detections, then unused ones."""
        if self.detector.test.clip == "after":  # which may have emptied entries between others
            boxes, scores, labels = self._best(boxes, scores, labels, scores.shape[1])
        missing, real = self.detector.test.max_per_img - scores.shape[1], scores > 0
        boxes, labels = torch.where(real.unsqueeze(-1), boxes, 0), torch.where(real, labels, -1)
        if missing:
            boxes, scores = F.pad(boxes, (0, 0, 0, missing)), F.pad(scores, (0, missing))
            labels = F.pad(labels, (0, missing), value=-1)
        return real.sum(1, keepdim=True).int(), boxes, scores, labels

    def _normalise(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """The normalised input of the detector's backbone, zero beyond each image."""
        height, width = image_sizes.unsqueeze(-1).unbind(1)
        rows = torch.arange(images.shape[2], device=images.device) < height
        columns = torch.arange(images.shape[3], device=images.device) < width
        batch = self.detector.preprocess.normalise(images)
        return batch * (rows.unsqueeze(-1) & columns.unsqueeze(1)).unsqueeze(1)

    def _candidates(self, feature: Tensor, level: int, padded: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (N, K, 4), scores (N, K) and labels (N, K): the best `nms_pre` of a level above the threshold.

        One level at a time: with symbolic sizes, one tensor of all levels is difficult for exporters.
        """
        head, test = self.detector.bbox_head, self.detector.test
        cls, box, centerness = head.run_level(feature, level)
        centerness = None if centerness is None else flatten([centerness], 1).squeeze(-1)
        scores = head.candidate_scores(flatten([cls], head.num_classes), centerness)
        priors = head.prior_generator.level(level, cls.shape[2:], padded, scores.dtype, scores.device)
        scores = torch.where(scores > test.score_thr, scores, 0).flatten(1)
        score, index = self.best(F.pad(scores, (0, test.nms_pre)), test.nms_pre)  # padded: a level may have fewer
        place, label = (index // head.num_classes).clamp(max=priors.boxes.shape[0] - 1), index % head.num_classes
        score = head.final_scores(score, None if centerness is None else centerness.gather(1, place))
        box = flatten([box], head.box_channels)
        box = box.gather(1, place.unsqueeze(-1).expand(-1, -1, box.shape[-1]))
        taken = Priors(priors.boxes[place], priors.cells[place], priors.strides[place], ())
        return head.decode(box, taken), score, label

    def _clip(self, boxes: Tensor, scores: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Clips boxes to their images; boxes that are too small afterwards get score 0."""
        height, width = image_sizes.to(boxes.dtype).unsqueeze(-1).unbind(1)
        x1, y1, x2, y2 = boxes.clamp(min=0).unbind(-1)
        boxes = torch.stack([x1.minimum(width), y1.minimum(height), x2.minimum(width), y2.minimum(height)], dim=-1)
        smallest = self.detector.test.min_bbox_size
        if smallest >= 0:
            scores = scores * ((boxes[..., 2:] - boxes[..., :2]) > smallest).all(-1)
        return boxes, scores
