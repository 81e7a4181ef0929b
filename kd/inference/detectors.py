"""Detectors with their weights and the names of their classes."""
import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data import CocoDataset, DataError, build_dataset, find_data
from data.coco.annotations import read_categories
from data.errors import counted, listed
from models import ConfigError, Detector, build_detector
from models.checkpoints.classes import checkpoint_classes, known_classes
from models.checkpoints.formats import Checkpoint
from models.checkpoints.zoo import published_config
from models.weights import CheckpointError, load_weights, open_checkpoint

from ..config import Config, load_config, override_config, parse_config
from .precision import place

TEACHERS_MAP = "distill.teacher.class_map"

log = logging.getLogger("densekd")


@dataclass
class Classes:
    """The names and category ids of a detector's labels."""

    names: list[str]
    ids: list[int]  # category ids, for COCO results

    @property
    def categories(self) -> list[dict]:
        """The `categories` of a COCO-format file."""
        return [{"id": number, "name": name} for number, name in zip(self.ids, self.names)]


def find_config(checkpoint: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a published checkpoint (`zoo:NAME`), or the one that a run put into its checkpoint, with
    `key=value` overrides. What only training needs is left out of the latter: files may have moved since.

    Raises:
        ConfigError, CheckpointError: a wrong override, or a checkpoint without a configuration that this version reads.
    """
    path = published_config(str(checkpoint))
    if path is not None:
        return load_config(path, overrides)
    advice = "give cfg, a configuration file (--cfg)"
    stored = open_checkpoint(checkpoint, preferred="student")[1].config
    if stored is None:
        raise CheckpointError(f"checkpoint {checkpoint} holds no configuration: {advice}")
    kept = copy.deepcopy({key: stored[key] for key in ("model", "data", "eval") if key in stored})
    kept.get("eval", {}).pop("class_map", None)  # the run trained on the classes of its data
    try:
        parse_config(kept)
    except (ConfigError, DataError) as error:
        text = f"the configuration in checkpoint {checkpoint} cannot be used, {error}: {advice}"
        raise CheckpointError(text) from None
    return override_config(kept, {}, overrides, f"the configuration in {checkpoint}")


def load_named(cfg: Config, checkpoint: str | Path, device: torch.device, part: str | None = None,
               names: Sequence[str] | None = None, placed: bool = True) -> tuple[Detector, Classes]:
    """Load the configuration's detector with a checkpoint's weights, in evaluation mode, and its classes.

    It is ready to detect fast, see `place`; with `placed` false it is as it was built, for export.

    No data are needed. The names are `names`, or those in the checkpoint, or those of data.val's annotations, or COCO's
    for a published checkpoint. Category ids are data.val's if it has all of these names, otherwise they count from 1.
    With `eval.class_map`, only the classes that it selects are left, which are those of data.val.
    Raises:
        ConfigError, DataError, CheckpointError: bad input, for example names that are not known.
    """
    class_map, annotated, count = cfg.eval.class_map, annotated_classes(cfg), cfg.model.head.get("num_classes")
    content = open_checkpoint(checkpoint, part)[1]
    own = checkpoint_classes(content.meta) if class_map is None else None
    if names is not None and own is not None and len(own) != len(names):
        raise ConfigError("", f"--classes gives {said(names)}, and {checkpoint} has {said(own)}: give as many names")
    if names is not None and own is not None and list(names) != own:
        log.warning(f"--classes gives other names than {checkpoint}: " + listed(
            [f"{old} is called {new}" for old, new in zip(own, names) if old != new], ", "))
    names = own if names is None else names
    if names is None:
        names = annotated.names if annotated else selected_classes(content, count, class_map)
    if names is None:
        raise ConfigError("", f"the names of the classes are not known: neither {checkpoint} nor annotations of "
                              "data.val contain them; give --classes")
    names = [str(name) for name in names]
    classes = with_ids(names, annotated)
    expected, where = (count, "model.head.num_classes") if class_map is None else (len(class_map), "eval.class_map")
    if expected not in (None, len(names)):
        there = f"there {'is' if len(names) == 1 else 'are'} {counted(len(names), 'name')}"
        raise ConfigError(where, f"says {counted(expected, 'class')}, and {there}: {', '.join(names)}")
    if class_map is not None and count is None:
        raise ConfigError("model.head.num_classes", "missing: the number of classes that eval.class_map selects from")
    detector = load(cfg.with_num_classes(len(names)), checkpoint, part)
    return place(detector, device, cfg.train) if placed else detector.to(device), classes


def with_ids(names: list[str], annotated: Classes | None) -> Classes:
    """The classes of these names, with the annotations' ids if they have all of them, otherwise counted from 1."""
    ids = dict(zip(annotated.names, annotated.ids)) if annotated else {}
    return Classes(names, [ids[name] for name in names] if ids.keys() >= set(names) else
                   list(range(1, len(names) + 1)))


def selected_classes(checkpoint: Checkpoint, count: int | None, class_map: Sequence[int] | None) -> list[str] | None:
    """The names of those of a checkpoint's `count` classes that a class map selects; None if one is not known."""
    known = None if count is None else known_classes(checkpoint, count)
    if known is None:
        return None
    names = [known[0][k] if k < count else None for k in (range(count) if class_map is None else class_map)]
    return None if None in names else names


def load_with_data(cfg: Config, checkpoint: str | Path, device: torch.device,
                   part: str | None = None) -> tuple[Detector, CocoDataset]:
    """Load a checkpoint into the configuration's detector, in evaluation mode, and data.val; raises as `load_named`.

    Where the checkpoint names its classes, and all of the data's are among them, they are found by their names.
    """
    if cfg.data is None:
        raise ConfigError("data", "missing: give data.val, which is evaluated on")
    dataset, class_map = build_dataset(cfg.data, "val", training=False), cfg.eval.class_map
    if class_map is None:
        names, class_map = by_name(checkpoint, part, dataset.classes)
        if class_map is None:
            cfg = with_classes(cfg, dataset)
        else:
            log.info(f"{checkpoint} has {said(names)}: those of the data are found by their names")
            by_names = {"eval": cfg.get("eval", {}) | {"class_map": class_map}}
            cfg = parse_config(cfg.with_num_classes(len(names)) | by_names)
    elif len(class_map) != dataset.num_classes or cfg.model.head.get("num_classes") is None:
        raise ConfigError("eval.class_map", f"has {counted(len(class_map), 'entry', 'entries')}: it needs one for "
                                            f"each of the data's {counted(dataset.num_classes, 'class')}, and "
                                            "model.head.num_classes must be set")
    detector = load(cfg, checkpoint, part)
    return place(detector, device, cfg.train), dataset


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


def by_name(checkpoint: str | Path, part: str | None, classes: Sequence[str], key: str = "eval.class_map"
            ) -> tuple[list[str], list[int] | None]:
    """The class names in a checkpoint, and for each class of the data its number there: None if they are the same, or
    if the checkpoint has no names. Other names, or another order, would mislabel all boxes.

    Args:
        key: the setting that maps the classes.
    Raises:
        ConfigError: the checkpoint has names, and one of the data's is not among them.
    """
    return match_names(checkpoint_classes(open_checkpoint(checkpoint, part)[1].meta) or [], checkpoint, classes, key)


def match_names(names: list[str], source: str | Path, classes: Sequence[str], key: str = "eval.class_map"
                ) -> tuple[list[str], list[int] | None]:
    """`by_name` for the class names of any file, which `source` names in messages."""
    if not names or names == list(classes):
        return names, None
    if set(classes) <= set(names) and len(set(names)) == len(names):
        return names, [names.index(name) for name in classes]
    advice = f"train it on the data's classes, or say with {key} which of its classes stands for each of the data's"
    if key == TEACHERS_MAP and set(classes) & set(names):
        found = [names.index(name) if names.count(name) == 1 else None for name in classes]
        advice += f"; {key}={json.dumps(found, separators=(',', ':'))} lets it teach only the classes that it knows"
    raise ConfigError(key, f"missing: {source} has {said(names)}, and the data {said(classes)}: {advice}")


def said(classes: Sequence[str]) -> str:
    """`2 classes (cat, dog)`, without the last names of a long list."""
    return f"{counted(len(classes), 'class')} ({listed(classes, ', ')})"


def knowledge(detector: Detector, classes: Sequence[str]) -> str:
    """What to say after a teacher that does not know all of these classes; otherwise nothing."""
    known = None if detector.bbox_head is None else detector.bbox_head.known
    if known is None:
        return ""
    names = listed([classes[k] for k in known.numbers], ", ")
    return f", which knows {len(known.numbers)} of {counted(len(classes), 'class')} ({names})"


def annotated_classes(cfg: Config) -> Classes | None:
    """The classes of data.val's annotations, or None if there are none."""
    file = find_data(cfg.data.val.annotations) if cfg.data and cfg.data.val else None
    if file is None or not file.is_file():
        return None
    return Classes(*read_categories(file))
