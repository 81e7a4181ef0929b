"""Detectors with their weights and the names of their classes."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data import CocoDataset, build_dataset, find_data
from data.annotations import read_categories
from data.errors import counted, listed
from models import ConfigError, Detector, build_detector
from models.weights import load_weights, open_checkpoint

from ..config import Config
from .precision import memory_format


@dataclass
class Classes:
    """The names and category ids of a detector's labels."""

    names: list[str]
    ids: list[int]  # category ids, for COCO results

    @property
    def categories(self) -> list[dict]:
        """The `categories` of a COCO-format file."""
        return [{"id": number, "name": name} for number, name in zip(self.ids, self.names)]


def load_named(cfg: Config, checkpoint: str | Path, device: torch.device, part: str | None = None,
               names: Sequence[str] | None = None) -> tuple[Detector, Classes]:
    """Load the configuration's detector with a checkpoint's weights, in evaluation mode, and its classes.

    No data are needed. The names are `names`, or those in the checkpoint, or those of data.val's annotations. Category
    ids are data.val's if it has the same names, otherwise they count from 1. With `eval.class_map`, only the classes
    that it selects are left, which are those of data.val.
    Raises:
        ConfigError, DataError, CheckpointError: bad input, for example names that are not known.
    """
    class_map, annotated = cfg.eval.class_map, annotated_classes(cfg)
    own = checkpoint_classes(open_checkpoint(checkpoint, part)[1].meta) if class_map is None else None
    if names is not None and own is not None and len(own) != len(names):
        raise ConfigError("", f"--classes gives {said(names)}, and {checkpoint} has {said(own)}: give as many names")
    names = own if names is None else names
    if names is None:
        if annotated is None:
            raise ConfigError("", f"the names of the classes are not known: neither {checkpoint} nor annotations of "
                                  "data.val contain them; give --classes")
        names = annotated.names
    names = [str(name) for name in names]
    classes = annotated if annotated and annotated.names == names else Classes(names, list(range(1, len(names) + 1)))
    count = cfg.model.head.get("num_classes")
    expected, where = (count, "model.head.num_classes") if class_map is None else (len(class_map), "eval.class_map")
    if expected not in (None, len(names)):
        there = f"there {'is' if len(names) == 1 else 'are'} {counted(len(names), 'name')}"
        raise ConfigError(where, f"says {counted(expected, 'class')}, and {there}: {', '.join(names)}")
    if class_map is not None and count is None:
        raise ConfigError("model.head.num_classes", "missing: the number of classes that eval.class_map selects from")
    return load(cfg.with_num_classes(len(names)), checkpoint, part).to(device), classes


def load_with_data(cfg: Config, checkpoint: str | Path, device: torch.device,
                   part: str | None = None) -> tuple[Detector, CocoDataset]:
    """Load a checkpoint into the configuration's detector, in evaluation mode, and data.val; raises as `load_named`."""
    if cfg.data is None:
        raise ConfigError("data", "missing: give data.val, which is evaluated on")
    dataset, class_map = build_dataset(cfg.data, "val", training=False), cfg.eval.class_map
    if class_map is None:
        cfg = with_classes(cfg, dataset)
    elif len(class_map) != dataset.num_classes or cfg.model.head.get("num_classes") is None:
        raise ConfigError("eval.class_map", f"has {counted(len(class_map), 'entry', 'entries')}: it needs one for "
                                            f"each of the data's {counted(dataset.num_classes, 'class')}, and "
                                            "model.head.num_classes must be set")
    if class_map is None:
        check_classes(checkpoint, part, dataset.classes, "eval.class_map")
    detector = load(cfg, checkpoint, part)
    return detector.to(device, memory_format=memory_format(cfg.train)), dataset


def load(cfg: Config, checkpoint: str | Path, part: str | None) -> Detector:
    """The configuration's detector in evaluation mode, with a checkpoint's weights and `eval.class_map`'s classes."""
    detector = build_detector(cfg.model, pretrained=False)
    load_weights(detector, checkpoint, part)
    if cfg.eval.class_map is not None:
        detector.bbox_head.select_classes(cfg.eval.class_map)
    return detector.eval()


def with_classes(cfg: Config, dataset: CocoDataset) -> Config:
    """The configuration with the class count of a data set; ConfigError if it sets another count."""
    given = cfg.model.head.get("num_classes")
    if given not in (None, dataset.num_classes):
        raise ConfigError("model.head.num_classes", f"is {given}, and {dataset.annotation_file} has "
                                                    f"{counted(dataset.num_classes, 'class')}")
    return cfg.with_num_classes(dataset.num_classes)


def checkpoint_classes(meta: Mapping) -> list[str] | None:
    """The names of the classes in the metadata of our checkpoints and mmdet's, or None if there are none."""
    inner = meta.get("dataset_meta")
    inner = inner if isinstance(inner, Mapping) else {}
    for found in (meta.get("classes"), inner.get("classes"), inner.get("CLASSES"), meta.get("CLASSES")):
        if isinstance(found, (list, tuple)) and found and all(isinstance(name, str) for name in found):
            return list(found)
    return None


def check_classes(checkpoint: str | Path, part: str | None, classes: Sequence[str], key: str) -> None:
    """Compare the class names in a checkpoint with the data's: other names, or another order, would mislabel all boxes.

    Args:
        key: the setting that maps the classes.
    Raises:
        ConfigError: they differ, and the checkpoint contains names.
    """
    names = checkpoint_classes(open_checkpoint(checkpoint, part)[1].meta)
    if not names or names == list(classes):
        return
    advice = f"train it on the data's classes, or say with {key} which of its classes stands for each of the data's"
    if set(classes) <= set(names) and len(set(names)) == len(names):
        count = f" model.head.num_classes={len(names)}" if key == "eval.class_map" else ""
        advice = f"say {key}=[{','.join(str(names.index(name)) for name in classes)}]{count}"
    raise ConfigError(key, f"missing: {checkpoint} has {said(names)}, and the data {said(classes)}: {advice}")


def said(classes: Sequence[str]) -> str:
    """`2 classes (cat, dog)`, without the last names of a long list."""
    return f"{counted(len(classes), 'class')} ({listed(classes, ', ')})"


def annotated_classes(cfg: Config) -> Classes | None:
    """The classes of data.val's annotations, or None if there are none."""
    file = find_data(cfg.data.val.annotations) if cfg.data and cfg.data.val else None
    if file is None or not file.is_file():
        return None
    return Classes(*read_categories(file))
