"""Test-time augmentation: detections on several views of every image, merged."""
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from data import collate
from data.inputs.files import Sample, make_sample
from data.inputs.tiles import Window, tile_windows
from data.transforms import flip_boxes, flip_image
from models import Detector
from models.postprocess import TestConfig, class_nms

from ..config import TTAConfig

CUT_MARGIN = 0.01  # of a tile's longer edge: a box that comes nearer to the tile's border may be cut
AT_ONCE = 256  # boxes that are compared with all others at once


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


class Views:
    """Detects on every view of images that `eval.tta` asks for, and merges.

    Args:
        detector: in evaluation mode, on `device`.
        scale: (long edge, short edge), used unless `tta.scales` has others.
        antialias: smooth tiles when they become smaller.
        batch_size: tiles per step.
        within: see `make_sample`.
    Attributes: `scales`, which `make_sample` needs.
    """

    def __init__(self, detector: Detector, tta: TTAConfig, scale: tuple[int, int], antialias: bool,
                 device: torch.device, batch_size: int, within: tuple[int | None, int | None] = (None, None)):
        self.detectors, self.scales = views(detector, tta, scale)
        self.test, self.tiles, self.antialias = detector.test, tta.tiles, antialias
        self.device, self.batch_size, self.within = device, batch_size, within

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[dict]:
        """Detections of each sample, on the CPU: boxes (n, 4) xyxy in original pixels, scores (n,), labels (n,)."""
        if self.tiles is None:
            return [on_cpu(merge(found, self.test)) for found in zip(*self._detect(samples))]
        return [self._on_tiles(sample) for sample in samples]

    def _detect(self, samples: Sequence[Sample]) -> list[list[dict]]:
        """For each view, the detections of each sample as a whole."""
        found = []
        for view in range(len(self.scales)):
            images, targets = collate([(sample.views[view], sample.targets[view]) for sample in samples])
            for detector in self.detectors:
                batch = detector.preprocess(images.to(self.device), targets)
                found.append(detector.predict(batch, targets))
        return found

    def _on_tiles(self, sample: Sample) -> dict:
        """Detections of a sample on its tiles, cut from the image batch by batch, and as a whole."""
        height, width = size = tuple(sample.image.shape[1:])
        windows = tile_windows(size, self.tiles.size, self.tiles.overlap)
        if len(windows) == 1:
            return on_cpu(merge([one for one, in self._detect([sample])], self.test))
        found: list[tuple[Window, dict]] = []
        if self.tiles.whole:
            found += [((0, 0, width, height), on_cpu(one)) for one, in self._detect([sample])]
        for start in range(0, len(windows), self.batch_size):
            batch = windows[start:start + self.batch_size]
            tiles = [make_sample(sample.image[:, y1:y2, x1:x2], 0, self.scales, self.antialias, self.within)
                     for x1, y1, x2, y2 in batch]
            for view in self._detect(tiles):
                for window, one in zip(batch, map(on_cpu, view)):
                    found.append((window, one | {"boxes": one["boxes"] + one["boxes"].new_tensor(window[:2] * 2)}))
        return merge_tiles(found, size, self.test)


def on_cpu(found: dict) -> dict:
    return {key: value.cpu() for key, value in found.items()}


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


def merge_tiles(found: Sequence[tuple[Window, dict]], size: tuple[int, int], test: TestConfig) -> dict:
    """Merge the detections on an image's tiles, and on the image as a whole, in pixels of the image.

    The border of a tile inside the image may cut an object, and the whole image shows small objects badly. So a box
    that is cut, or that is from the whole image, is dropped if any tile shows its place uncut: that tile decides. What
    is left are the boxes that tiles show uncut, and objects that are larger than the overlap. Of these, a box that is
    cut is dropped if it lies in one that is not, see `parts`. Of overlapping boxes of one class, non-maximum
    suppression then keeps the best. `max_per_img` holds for each view, and not for the image.

    Args:
        found: for each view, its window and a dict of boxes (n, 4), scores (n,) and labels (n,).
        size: (h, w) of the image.
    """
    whole = (0, 0, size[1], size[0])
    tiles = sorted({window for window, _ in found} - {whole})
    margin = CUT_MARGIN * max(max(x2 - x1, y2 - y1) for x1, y1, x2, y2 in tiles)
    kept = []
    for window, one in found:
        cut = clearance(one["boxes"], window, size) <= margin
        shown = torch.stack([clearance(one["boxes"], tile, size) for tile in tiles]) > margin
        left = ~(shown.any(0) & (cut | (window == whole)))
        kept.append({key: value[left] for key, value in (one | {"cut": cut}).items()})
    together = {key: torch.cat([one[key] for one in kept]) for key in ("boxes", "scores", "labels", "cut")}
    cut = together.pop("cut")
    uncut, pieces = ({key: value[mask] for key, value in together.items()} for mask in (~cut, cut))
    alone = ~parts(pieces, uncut)
    together = {key: torch.cat([value, pieces[key][alone]]) for key, value in uncut.items()}
    keep = class_nms(**together, iou_threshold=test.nms_iou_threshold)
    return {key: value[keep] for key, value in together.items()}


def parts(pieces: dict, uncut: dict) -> Tensor:
    """Which of the pieces (n,) lie, with half of their area or more, in an uncut box of their class.

    That box must have at least half of the piece's score: a large box that is hardly more than noise proves nothing.
    """
    found = torch.zeros(len(pieces["scores"]), dtype=torch.bool)
    for own in torch.arange(len(found)).split(AT_ONCE):  # in small steps, because all pairs could take gigabytes
        boxes, others = pieces["boxes"][own, None], uncut["boxes"]
        shared = torch.minimum(boxes[..., 2:], others[:, 2:]) - torch.maximum(boxes[..., :2], others[:, :2])
        inside = shared.clamp(min=0).prod(-1) >= (boxes[..., 2:] - boxes[..., :2]).prod(-1) / 2
        alike = pieces["labels"][own, None] == uncut["labels"]
        found[own] = (inside & alike & (uncut["scores"] >= pieces["scores"][own, None] / 2)).any(1)
    return found


def clearance(boxes: Tensor, window: Window, size: tuple[int, int]) -> Tensor:
    """How far boxes (n, 4) are from the borders of a window that lie inside the image, in pixels (n,).

    It is negative for boxes that reach out of the window, and infinite if the window has no such border.
    """
    x1, y1, x2, y2 = window
    inner = boxes.new_tensor([x1 > 0, y1 > 0, x2 < size[1], y2 < size[0]]).bool()
    distances = (boxes - boxes.new_tensor(window)) * boxes.new_tensor([1, 1, -1, -1])
    return distances.masked_fill(~inner, torch.inf).amin(1)


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
