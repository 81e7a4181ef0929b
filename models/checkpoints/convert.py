"""Writes weights for other projects: as an mmdet checkpoint, with the names of torchvision's or detectron2's RetinaNet,
as a .safetensors file, or one part of an FGD file."""
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data.errors import one_line
from data.output import write_bytes, writing

from ..build import ConfigError
from ..detector import Detector, build_detector
from ..weights import check_finite, is_optional, open_checkpoint, summary
from .classes import checkpoint_classes
from .formats import Checkpoint, Weights
from .retinanets import check_retinanet, remarks, to_detectron2, to_torchvision
from .safetensors_file import need_safetensors, to_safetensors
from .unpickler import CheckpointError

__all__ = ["convert_checkpoint", "to_detectron2", "to_mmdet", "to_torchvision"]

_BY_RATIO = ("mmdet2", "mmdet3", "fgd", "torchvision")  # formats that order anchors by ratio, then by scale
TARGETS = ("mmdet", "torchvision", "detectron2", "safetensors", "student")


def convert_checkpoint(source: str | os.PathLike, to: str, out: str | os.PathLike, part: str | None = None,
                       config: Mapping | None = None, classes: Sequence[str] | None = None) -> str:
    """Converts a checkpoint of any format that `load_weights` reads, writes it to `out`, and returns a line that
    reports this.

    Args:
        to: `mmdet`; `torchvision` or `detectron2` (only for RetinaNet); `safetensors`, with our names; or `student`:
            the student of an FGD checkpoint as an mmdet checkpoint, or its teacher with `part="teacher"`.
        config: the configuration of the checkpoint; by default the one that it holds.
        classes: the names of its classes; by default those that it holds.
    Raises:
        CheckpointError: the file cannot be read or converted. MissingExtra: `safetensors` is not installed.
        OutputError: `out` cannot be written. `out` is written completely or not at all.
    """
    if to not in TARGETS:
        raise CheckpointError(f"cannot convert to {one_line(to, 40)}: choose {', '.join(TARGETS)}")
    if to == "safetensors":
        need_safetensors("writing a .safetensors file")
    if to == "student":
        part = part or "student"
    label, checkpoint = open_checkpoint(source, part)
    check_finite(f"{checkpoint.format} checkpoint {label}", checkpoint.weights, checkpoint.weights)
    classes = checkpoint_classes(checkpoint.meta) if classes is None else list(classes)
    out, said = Path(os.path.abspath(os.fspath(out))), []
    if to == "safetensors":
        if config is None:
            config = checkpoint.config
        else:
            _matching(label, config, checkpoint.weights, classes)
        write_bytes(out, to_safetensors(checkpoint.weights, {"config": config, "classes": classes}))
    else:
        if to in ("mmdet", "student"):
            content: dict[str, Any] = to_mmdet(checkpoint.weights, checkpoint.meta)
        else:
            content, said = _for_project(to, label, checkpoint, config, classes)
        with writing(out) as partial, open(partial, "wb") as file:
            torch.save(content, file)
    chosen = f" ({part})" if part else ""
    line = f"converted {checkpoint.format} checkpoint {label}{chosen}: {len(checkpoint.weights)} tensors to {out}"
    return "; ".join([line, *said])


def _for_project(to: str, label: str, checkpoint: Checkpoint, config: Mapping | None, classes: list[str] | None
                 ) -> tuple[dict, list[str]]:
    """The content of a file for torchvision or detectron2, and what the model there must be given."""
    config = checkpoint.config if config is None else config
    detector, source = None, checkpoint.format
    try:
        check_retinanet(checkpoint.weights, to)
        if config is not None:
            detector = _matching(label, config, checkpoint.weights, classes)
        elif source in _BY_RATIO and to == "detectron2" or source == "detectron2" and to != source:
            raise CheckpointError(f"{to} orders anchors otherwise than {source}, and how many there are is not known "
                                  "without the configuration: give --cfg")
        content: dict[str, Any] = {"torchvision": to_torchvision, "detectron2": to_detectron2}[to](checkpoint.weights,
                                                                                                   detector)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {label}: {error}") from None
    return content if to == "torchvision" else {"model": content}, remarks(detector, to)


def _matching(label: str, config: Mapping, weights: Weights, classes: list[str] | None) -> Detector:
    """The detector of a configuration, without values; CheckpointError if these weights are not its weights."""
    try:
        model = dict(config["model"])
        count = None if classes is None else len(classes)
        if count is None and "bbox_head.retina_reg.weight" in weights:
            anchors = len(weights["bbox_head.retina_reg.weight"]) // 4
            count = len(weights["bbox_head.retina_cls.weight"]) // max(anchors, 1)
        if model["head"].get("num_classes") is None and count is not None:
            model["head"] = dict(model["head"]) | {"num_classes": count}
        with torch.device("meta"):
            detector = build_detector(model, pretrained=False)
    except (AttributeError, ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the configuration of {label} cannot be used ({one_line(error)}): give --cfg") from None
    ours = {name: value.shape for name, value in detector.state_dict().items() if not is_optional(name)}
    theirs = {name: value.shape for name, value in weights.items() if not is_optional(name)}
    if wrong := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        raise CheckpointError(f"the configuration is not the one of {label}: {summary(wrong)} have other shapes or "
                              "are missing; give --cfg with the one that it was trained with")
    return detector


def to_mmdet(weights: Weights, meta: dict[str, Any] | None = None) -> dict[str, Any]:
    """An mmdet checkpoint from weights with our names, which are mmdet's. Versions 2 and 3 read it.

    Class names in `meta` (under `classes`, or already under mmdet's keys) are written where each version looks for
    them.
    """
    state = {name: value for name, value in weights.items() if not name.endswith("loss_normalizer")}
    # mmdet stores GFL's bin positions in a buffer, and a strict load needs it.
    if "bbox_head.gfl_reg.weight" in state and "bbox_head.integral.project" not in state:
        bins = state["bbox_head.gfl_reg.weight"].shape[0] // 4
        state["bbox_head.integral.project"] = torch.linspace(0, bins - 1, bins)
    meta = {name: value for name, value in (meta or {}).items() if _is_plain(value)}
    classes = meta.get("classes") or meta.get("CLASSES")
    if isinstance(classes, (list, tuple)):
        meta = {**meta, "CLASSES": tuple(classes),
                "dataset_meta": meta.get("dataset_meta", {"classes": tuple(classes)})}
    return {"meta": meta, "state_dict": state}


def _is_plain(value: object) -> bool:
    """Whether `torch.load(weights_only=True)` accepts the value, so that the written file can be read anywhere."""
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)
