"""A detector with its weights and class names, which needs no data to evaluate on."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data import find_data, read_data_config
from data.annotations import load_coco_json
from models import ConfigError, Detector, build_detector, without_pretraining
from models.weights import load_weights, open_checkpoint

from ..config.sections import EvalConfig


@dataclass
class Classes:
    """What a detector's labels stand for."""

    names: list[str]
    ids: list[int]  # category ids, for COCO results

    @property
    def categories(self) -> list[dict]:
        """As in a COCO-format file."""
        return [{"id": number, "name": name} for number, name in zip(self.ids, self.names)]


def load_named(cfg: dict, checkpoint: str | Path, device: torch.device, part: str | None = None,
               names: Sequence[str] | None = None) -> tuple[Detector, Classes]:
    """The configuration's detector with a checkpoint's weights, in evaluation mode, and its classes.

    The names are those given, else those in the checkpoint, else those of data.val's annotations, whose category ids
    are taken wherever the names are the same; other ids count from 1. With `eval.class_map` only the classes that it
    selects are left, which are data.val's.

    Raises:
        ConfigError, DataError, CheckpointError: bad input, as when nobody knows the names.
    """
    class_map = EvalConfig(**cfg.get("eval", {})).class_map
    annotated = annotated_classes(cfg)
    if names is None and class_map is None:
        names = checkpoint_classes(open_checkpoint(checkpoint, part)[1].meta)
    if names is None:
        if annotated is None:
            raise ConfigError("", f"the names of the classes are not known: neither {checkpoint} nor annotations of "
                                  "data.val say them; give --classes")
        names = annotated.names
    names = [str(name) for name in names]
    classes = annotated if annotated and annotated.names == names else Classes(names, list(range(1, len(names) + 1)))
    model = cfg["model"]
    count = model["head"].get("num_classes")
    if class_map is None and count is None:
        model = model | {"head": model["head"] | {"num_classes": len(names)}}
    elif len(names) != (count if class_map is None else len(class_map)):
        where, number = ("model.head.num_classes", count) if class_map is None else ("eval.class_map", len(class_map))
        raise ConfigError(where, f"says {number} classes, and there are {len(names)} names: {', '.join(names)}")
    elif count is None:
        raise ConfigError("model.head.num_classes", "missing: eval.class_map selects from so many classes")
    detector = build_detector(without_pretraining(model))
    load_weights(detector, checkpoint, part)
    if class_map is not None:
        detector.bbox_head.select_classes(class_map)
    return detector.to(device).eval(), classes


def checkpoint_classes(meta: Mapping) -> list[str] | None:
    """The names of the classes that our checkpoints and mmdet's say, None where one does not."""
    inner = meta.get("dataset_meta")
    inner = inner if isinstance(inner, Mapping) else {}
    for found in (meta.get("classes"), inner.get("classes"), inner.get("CLASSES"), meta.get("CLASSES")):
        if isinstance(found, (list, tuple)) and found and all(isinstance(name, str) for name in found):
            return list(found)
    return None


def check_class_order(checkpoint: str | Path, part: str | None, classes: Sequence[str], key: str) -> None:
    """Refuse a checkpoint that has the data's classes in another order, for all it finds would bear a wrong name.

    Args:
        key: of the map that puts it right, as `eval.class_map`.
    Raises:
        ConfigError: it has.
    """
    names = checkpoint_classes(open_checkpoint(checkpoint, part)[1].meta)
    if names and names != list(classes) and sorted(names) == sorted(classes) and len(set(names)) == len(names):
        order = ",".join(str(names.index(name)) for name in classes)
        count = f" model.head.num_classes={len(names)}" if key == "eval.class_map" else ""
        raise ConfigError(key, f"missing: the classes of {checkpoint} are {', '.join(names)}, and the data's "
                               f"{', '.join(classes)}: say {key}=[{order}]{count}")


def annotated_classes(cfg: dict) -> Classes | None:
    """The classes of data.val's annotations, None where there are none."""
    val = read_data_config(cfg["data"]).val if cfg.get("data") else None
    file = find_data(val.annotations) if val else None
    if file is None or not file.is_file():
        return None
    categories = sorted(load_coco_json(file)["categories"], key=lambda category: category["id"])
    return Classes([str(category["name"]) for category in categories], [category["id"] for category in categories])
