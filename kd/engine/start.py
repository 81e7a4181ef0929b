"""AP of teachers and student before the first step, which shows a useless teacher before a long run."""
from collections.abc import Sequence
from dataclasses import replace

import torch

from data import build_dataset
from data.errors import counted
from data.tables import points
from models import Detector

from ..config import Config
from ..distiller import Distiller
from ..evaluation.evaluate import eval_loader, evaluate
from ..inference.detectors import knowledge

SUSPICIOUS = 0.01  # a teacher with a lower AP gets a warning


def starting_points(model: Distiller, cfg: Config, classes: Sequence[str], device: torch.device) -> str:
    """AP of every teacher and of the student on the first images of data.val, as text for people.

    `classes` are the names of data.train's classes.
    """
    first = replace(cfg.data.val, first=min(cfg.train.check_images, cfg.data.val.first or cfg.train.check_images))
    dataset = build_dataset(replace(cfg.data, val=first), "val", training=False, classes=classes)

    def ap_of(detector: Detector) -> float | None:
        """The AP of the classes that the detector knows."""
        shared = not detector.sharded  # all processes must run a sharded one on the same images
        loader = eval_loader(cfg, dataset, shared)
        figures = evaluate(detector, loader, device, cfg.train.amp, shared=shared)
        known = detector.bbox_head.known
        return figures["AP"] if known is None else mean_ap(figures, [dataset.classes[k] for k in known.numbers])

    lines = [f"AP on the first {counted(len(dataset), 'image')} of data.val, before training"]
    for i, teacher in enumerate(model.teachers):
        if teacher.bbox_head is None:
            lines.append(f"  teacher {i}: none, it gives feature maps only")
            continue
        classes = teacher.bbox_head.num_classes
        if classes != dataset.num_classes:
            lines.append(f"  teacher {i}: none, it has {counted(classes, 'class')} and the data {dataset.num_classes}: "
                         "set distill.teacher.class_map to map them")
            continue
        ap = ap_of(teacher)
        lines.append(f"  teacher {i}: {show(ap)}{knowledge(teacher, dataset.classes)}")
        if ap is not None and ap < SUSPICIOUS:
            lines.append("  WARNING: this teacher detects next to nothing. Are its weights, the order of its classes "
                         "and its preprocess (means, channel order) those that it was trained with?")
    return "\n".join([*lines, f"  student:   {show(ap_of(model.student))}"])


def mean_ap(figures: dict, names: Sequence[str]) -> float | None:
    """The AP of some classes; None if the data have no object of them."""
    found = [figures["per_class"][name] for name in names if figures["per_class"][name] is not None]
    return sum(found) / len(found) if found else None


def show(ap: float | None) -> str:
    return "no objects to measure it on" if ap is None else points(ap)
