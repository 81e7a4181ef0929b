"""Whether an exported file detects what PyTorch does, up to rounding."""
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor

from data.errors import counted
from data.inputs.files import Sample
from models import Detector
from models.coders import clip_boxes
from models.heads import HeadOutputs
from models.postprocess import TestConfig, decode, postprocess

from ..exceptions import ExportError
from .exported import finish
from .recipe import Recipe
from .runtimes import Run

TOLERANCE = 1e-3            # of scores, and of boxes in pixels
RELATIVE_TOLERANCE = 1e-5   # added for boxes: the precision of large coordinates in float32
ALIKE = 10                  # a detection is taken for at most so many candidates


@dataclass
class Agreement:
    """How far an exported file differs from PyTorch."""

    images: int = 0
    detections: int = 0  # compared
    box: float = 0.0    # largest difference of a coordinate, in pixels
    score: float = 0.0  # largest difference of a score
    agrees: bool = True

    def __str__(self) -> str:
        line = (f"{counted(self.detections, 'detection')} on {counted(self.images, 'image')}: boxes differ from "
                f"PyTorch's by at most {self.box:.1g} pixels, scores by {self.score:.1g}")
        return line if self.detections else f"{line}; without detections this says little: give others with --check"


@dataclass
class Candidates:
    """The detections on one image that suppression may choose from: all near or above the threshold and `nms_pre`."""

    boxes: Tensor   # (n, 4) as suppression sees them
    final: Tensor   # (n, 4) as they come out, clipped
    scores: Tensor  # (n,)
    labels: Tensor  # (n,)
    sure: Tensor    # (n,) bool: above the limits with more than rounding

    def nearest(self, box: Tensor, score: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Places of those with a detection's class and score, the nearest first, and their distances in pixels.

        Scores may differ by rounding, and a distance is the largest difference of a coordinate.
        """
        off = (self.scores - score).abs()
        places = ((self.labels == label) & (off <= TOLERANCE)).nonzero().squeeze(1)
        distances = (self.final[places] - box).abs().amax(1)
        order = (distances + off[places]).argsort(stable=True)[:ALIKE]
        return places[order], distances[order]



def candidates(detector: Detector, outputs: HeadOutputs, i: int, target: dict) -> Candidates:
    """The candidates of image `i` of a batch."""
    head, test, priors = detector.bbox_head, detector.test, detector.bbox_head.priors(outputs)
    scores = head.candidate_scores(outputs.cls[i], None if outputs.centerness is None else outputs.centerness[i])
    least = torch.full_like(scores, test.score_thr)
    for own, level in zip(least.split(priors.level_sizes), scores.split(priors.level_sizes)):
        if level.numel() > test.nms_pre:
            own.clamp_(min=level.flatten().topk(test.nms_pre).values[-1])
    index, labels = (scores > least - TOLERANCE).nonzero(as_tuple=True)
    own, least = scores[index, labels], least[index, labels]
    boxes, final_scores = decode(head, outputs, i, priors, index, own)
    final = clip_boxes(boxes, target["image_size"])
    large = (final[:, 2:] - final[:, :2] > test.min_bbox_size + margin(final)[:, None]).all(1)
    return Candidates(final if test.clip == "before" else boxes, final, final_scores, labels,
                      (own > least + TOLERANCE) & (large | (test.min_bbox_size < 0)))


def check_export(run: Run, detector: Detector, samples: Sequence[Sample], about: Recipe) -> Agreement:
    """Compare an exported file with the detector on each image and on one batch of all; ExportError if they differ.

    A file for a fixed number of images gets each image as often as it takes.
    """
    found = Agreement(images=len(samples))
    batches = [[sample] * (about.batch or 1) for sample in samples]
    if len(samples) > 1 and about.batch != 1:
        batches.append(list(islice(cycle(samples), about.batch or len(samples))))
    for number, batch in enumerate(batches):
        images, targets = pad_together(batch, about)
        results = run(images, torch.tensor([target["image_size"] for target in targets]))
        with torch.no_grad():
            outputs = detector.run(detector.preprocess(images, targets), targets).outputs
            expected = postprocess(detector.bbox_head, outputs, targets, detector.test, rescale=False)
            for i, (mine, target) in enumerate(zip(expected, targets)):
                theirs = finish(*(result[i] for result in results), detector.test, about.nms, target["image_size"])
                compare(mine, theirs, candidates(detector, outputs, i, target), detector.test, found)
                found.detections += len(theirs["scores"]) * (number < len(samples) and not i)
    if not found.agrees:
        raise ExportError(f"the exported file does not agree with PyTorch ({found}): is there a layer that "
                          "depends on the image's size, as Swin's windows do?")
    return found


def pad_together(samples: Sequence[Sample], about: Recipe) -> tuple[Tensor, list[dict]]:
    """Pad images to the largest as a file needs it; returns the batch (N, 3, H, W) and its targets."""
    targets = [sample.targets[0] for sample in samples]
    size = about.padded(*(max(target["pad_size"][axis] for target in targets) for axis in (0, 1)))
    images = torch.zeros(len(samples), 3, *size, dtype=torch.uint8)
    for image, sample in zip(images, samples):
        h, w = sample.targets[0]["image_size"]
        image[:, :h, :w] = sample.views[0]
    return images, targets


def compare(mine: dict, theirs: dict, possible: Candidates, test: TestConfig, found: Agreement) -> None:
    """Compare a file's detections on one image with the detector's, and note the largest differences.

    Scores that are equal up to rounding may change places. Then others pass `nms_pre`, suppress their neighbours or
    reach `max_per_img`, and the detections differ although the file is right. So we check what must hold then too: each
    of the file's detections is a candidate; no two of a class overlap; and each of the detector's is there, or
    overlaps a better one that is there, or is at a limit.
    """
    alike = []  # candidates that each of the file's detections may be
    for box, score, label in rows(theirs):
        places, distances = possible.nearest(box, score, label)
        alike.append(places[distances <= margin(box)])
        off = (possible.scores[alike[-1] if len(alike[-1]) else places] - score).abs()
        found.box = max(found.box, distances[0].item() if len(places) else 0)
        found.score = max(found.score, (off if len(places) else score).min().item())
    if not all(map(len, alike)) or overlapping(alike, possible, test.nms_iou_threshold):
        found.agrees = False
        return
    there = torch.cat([possible.labels.new_zeros(0), *alike])
    cut = len(alike) == test.max_per_img or alike and test.clip == "after"  # "after" drops boxes after the cap
    limit = theirs["scores"].min() if cut else 0
    for box, score, label in rows(mine):
        places, distances = possible.nearest(box, score, label)
        places = places[distances <= margin(box)]
        if score <= limit + TOLERANCE or not possible.sure[places].all() or torch.isin(places, there).any():
            continue
        better = there[(possible.labels[there] == label) & (possible.scores[there] >= score - TOLERANCE)]
        shared = overlap(possible.boxes[places[:1]], possible.boxes[better], 1)
        if not (shared >= test.nms_iou_threshold).any():
            found.agrees, found.score = False, max(found.score, score.item())


def overlapping(alike: Sequence[Tensor], possible: Candidates, iou_threshold: float) -> bool:
    """Whether any two detections of a class overlap too much, whichever of their candidates they are."""
    if len(alike) < 2:
        return False
    places, counts = torch.cat(list(alike)), list(map(len, alike))
    shared = overlap(possible.boxes[places], possible.boxes[places], -1)
    shared = torch.where(possible.labels[places, None] == possible.labels[places], shared, 0)
    shared = torch.stack([own.amin(0) for own in shared.split(counts)])
    shared = torch.stack([own.amin(1) for own in shared.split(counts, dim=1)])
    return bool((shared.fill_diagonal_(0) > iou_threshold).any())


def rows(detections: dict) -> zip:
    return zip(detections["boxes"], detections["scores"], detections["labels"])


def margin(boxes: Tensor) -> Tensor:
    """By how much rounding may change the boxes (n, 4), in pixels (n,)."""
    return TOLERANCE + RELATIVE_TOLERANCE * boxes.abs().amax(-1)


def overlap(a: Tensor, b: Tensor, sign: int) -> Tensor:
    """IoU (n, m) of boxes (n, 4) and (m, 4) that rounding may change: the largest for sign 1, the least for -1."""
    slack = sign * torch.maximum(margin(a)[:, None], margin(b)).unsqueeze(-1)
    sides = torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])
    common = (sides + slack).clamp(min=0).prod(-1)
    areas = sum((box[..., 2:] - box[..., :2] - slack).clamp(min=0).prod(-1) for box in (a[:, None], b))
    return common / (areas - common).clamp(min=1e-9)
