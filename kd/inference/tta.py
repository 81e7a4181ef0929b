"""Test-time augmentation: detections on several views of every image, merged."""
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from data.transforms import flip_boxes, flip_image
from models import Detector
from models.postprocess import TestConfig, class_nms

from ..config import TTAConfig


class Mirrored(nn.Module):
    """A detector that sees every image mirrored left to right, and returns boxes in the image before that.

    Its inputs and outputs are those of a `Detector` in evaluation.
    """

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector, self.training = detector, detector.training

    def preprocess(self, images: Tensor, targets: list[dict]) -> Tensor:
        """Mirror each uint8 image of a batch (N, 3, H, W) within its own `image_size`, and normalise the batch."""
        mirrored = images.clone()
        for out, image, target in zip(mirrored, images, targets):
            h, w = target["image_size"]
            out[:, :h, :w] = flip_image(image[:, :h, :w])
        return self.detector.preprocess(mirrored, targets)

    def predict(self, images: Tensor, targets: list[dict]) -> list[dict]:
        found = self.detector.predict(images, targets)
        return [one | {"boxes": flip_boxes(one["boxes"], target["original_size"][1])}
                for one, target in zip(found, targets)]


def views(detector: Detector, tta: TTAConfig, scale: tuple[int, int]) -> tuple[list[nn.Module], list[tuple[int, int]]]:
    """Detectors and scales: each pair of them is a view. `scale` is the one without augmentation."""
    return [detector] + [Mirrored(detector)] * tta.flip, tta.scales or [scale]


def best(boxes: Tensor, scores: Tensor, labels: Tensor, test: TestConfig) -> Tensor:
    """Indices of the detections to keep from those on all views, best first.

    Of overlapping boxes of one class, non-maximum suppression keeps the best; then at most `max_per_img` are kept.
    """
    keep = class_nms(boxes, scores, labels, test.nms_iou_threshold)
    return keep if test.max_per_img < 0 else keep[:test.max_per_img]


def merge(found: Sequence[dict], test: TestConfig) -> dict:
    """Merge one image's detections on several views, in original pixels; those on a single view do not change.

    Args:
        found: a dict of boxes (n, 4), scores (n,) and labels (n,) for each view.
    """
    if len(found) == 1:
        return found[0]
    together = {key: torch.cat([one[key] for one in found]) for key in ("boxes", "scores", "labels")}
    keep = best(**together, test=test)
    return {key: value[keep] for key, value in together.items()}


def merge_results(runs: Sequence[list[tuple]], test: TestConfig) -> list[tuple]:
    """The same as `merge` for results of `evaluate.detect`: a list of image ids and rows (n, 6) for each view."""
    if len(runs) == 1:
        return runs[0]
    merged = []
    for views_of_one in zip(*runs):
        rows = torch.from_numpy(np.concatenate([rows for _, rows in views_of_one]))
        boxes = torch.cat([rows[:, :2], rows[:, :2] + rows[:, 2:4]], dim=1)
        merged.append((views_of_one[0][0], rows[best(boxes, rows[:, 4], rows[:, 5].long(), test)].numpy()))
    return merged
