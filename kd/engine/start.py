"""AP of teachers and student before the first step, which shows a useless teacher before a long run."""
from collections.abc import Sequence
from dataclasses import replace

import torch

from data import CocoDataset, build_dataset
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
    dataset = first_of_val(cfg, classes, cfg.train.check_images)

    def ap_of(detector: Detector) -> float | None:
        """The AP of the classes that the detector knows."""
        shared = not detector.sharded  # all processes must run a sharded one on the same images
        loader = eval_loader(cfg, dataset, shared)
        figures = evaluate(detector, loader, device, cfg.train.amp, shared=shared)
        known = detector.bbox_head.known
        return figures["AP"] if known is None else mean_ap(figures, [dataset.classes[k] for k in known.numbers])

    lines = [f"AP on the first {counted(len(dataset), 'image')} of data.val, before training"]
    for i, teacher in enumerate(model.teachers):
        if reason := without_ap(teacher, dataset.num_classes):
            lines.append(f"  teacher {i}: none, {reason}")
            continue
        ap = ap_of(teacher)
        lines.append(f"  teacher {i}: {show(ap)}{knowledge(teacher, dataset.classes)}")
        if ap is not None and ap < SUSPICIOUS:
            lines.append("  WARNING: this teacher detects next to nothing. Are its weights, the order of its classes "
                         "and its preprocess (means, channel order) those that it was trained with?")
    own = show(ap_of(model.student)) if starts_trained(cfg) else "untrained"
    return "\n".join([*lines, f"  student:   {own}"])


def first_of_val(cfg: Config, classes: Sequence[str], count: int) -> CocoDataset:
    """The first images of data.val. `classes` are the names of data.train's classes."""
    first = replace(cfg.data.val, first=min(count, cfg.data.val.first or count))
    return build_dataset(replace(cfg.data, val=first), "val", training=False, classes=classes)


def without_ap(teacher: Detector, num_classes: int) -> str:
    """Why a teacher has no AP on data with so many classes; empty if it has one."""
    if teacher.bbox_head is None:
        return "it gives feature maps only"
    classes = teacher.bbox_head.num_classes
    if classes == num_classes:
        return ""
    return (f"it has {counted(classes, 'class')} and the data {num_classes}: set distill.teacher.class_map to map "
            "them")


def starts_trained(cfg: Config) -> bool:
    """Whether the head of a run's student starts with the weights of another detector."""
    return cfg.train.init is not None or bool(cfg.distill and cfg.distill.init_student)


def mean_ap(figures: dict, names: Sequence[str]) -> float | None:
    """The AP of some classes; None if the data have no object of them."""
    found = [figures["per_class"][name] for name in names if figures["per_class"][name] is not None]
    return sum(found) / len(found) if found else None


def show(ap: float | None) -> str:
    return "no objects to measure it on" if ap is None else points(ap)
