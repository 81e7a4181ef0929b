"""How good a detector is on the first images of data.val."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data import CocoDataset
from data.coco.annotations import SIZES
from models import Detector

from ...config import Config
from ...evaluation.analyze import found_from
from ...evaluation.coco import ImageResult, coco_evaluation, ordered_ids, read_figures
from ...evaluation.evaluate import detect, eval_loader
from ...evaluation.tide import image_aps, judge
from ...processes import distributed
from ..start import mean_ap


@dataclass
class Quality:
    """What a detector finds, of the classes that it knows. None stands for classes or sizes without objects."""

    images: int
    lowest: float                           # detections have this score or more
    ap: float | None
    per_class: dict[str, float | None]      # AP
    objects: int
    found: float | None                     # share of the objects with a detection of their class, at IoU 0.5
    found_by_class: dict[str, float | None]
    found_by_size: dict[str, float | None]
    own: dict[int | str, float]             # AP of each image with objects by its id, see `image_aps`

def measure(detector: Detector, cfg: Config, dataset: CocoDataset, labels: Sequence[int], device: torch.device
            ) -> Quality:
    """The quality of a detector on a data set, on every process.

    Args:
        labels: the classes that count.
    """
    shared = not detector.sharded  # all processes must run a sharded one on the same images
    results = detect(detector, eval_loader(cfg, dataset, shared), device, cfg.train.amp, shared)
    found = summed_up(results, dataset, labels, detector.test.score_thr) if distributed.rank() == 0 else None
    return distributed.from_first(found)


def summed_up(results: list[ImageResult], dataset: CocoDataset, labels: Sequence[int], lowest: float) -> Quality:
    """The quality that detections show."""
    evaluation = coco_evaluation(results, dataset, fast=False, matches=True)
    figures, judged, names = read_figures(evaluation, dataset), judge(evaluation), dataset.classes
    found, counts = found_from(judged, lowest), np.isin(judged.object_label, labels)

    def share(chosen: np.ndarray) -> float | None:
        chosen = chosen & counts
        return float(found[chosen].mean()) if chosen.any() else None

    area, own = judged.object_area, image_aps(evaluation, labels)
    return Quality(
        len(dataset), lowest, mean_ap(figures, [names[k] for k in labels]),
        {names[k]: figures["per_class"][names[k]] for k in labels}, int(counts.sum()), share(counts),
        {names[k]: share(judged.object_label == k) for k in labels},
        {size: share((area >= low) & (area < high)) for size, (low, high) in SIZES.items()},
        {image_id: own[number] for number, image_id in enumerate(ordered_ids(dataset)) if number in own})


def compared(ours: dict, theirs: dict) -> tuple[float, float, int]:
    """By how much the first has a higher `Quality.own`: the mean over images that both have, its standard error, and
    the number of images."""
    differences = np.array([ours[image] - theirs[image] for image in ours if image in theirs])
    count = len(differences)
    if count < 2:
        return 0.0, float("inf"), count
    return float(differences.mean()), float(differences.std(ddof=1) / count ** 0.5), count
