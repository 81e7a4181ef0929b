"""Writes weights for other projects: as an mmdet checkpoint, with torchvision's RetinaNet names, or one part of an FGD
file."""
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import one_line
from data.output import writing

from ..weights import check_finite, open_checkpoint
from .formats import Weights
from .unpickler import CheckpointError


def convert_checkpoint(source: str | os.PathLike, to: str, out: str | os.PathLike, part: str | None = None) -> str:
    """Converts a checkpoint of any format that `load_weights` reads, writes it to `out`, and returns a line that
    reports this.

    `to` is `mmdet`, `torchvision` (only for RetinaNet), or `student`: the student of an FGD checkpoint as an mmdet
    checkpoint, or its teacher with `part="teacher"`. Raises `CheckpointError` if the file cannot be read or converted,
    and `OutputError` if `out` cannot be written. `out` is written completely or not at all.
    """
    if to == "student":
        part = part or "student"
    label, checkpoint = open_checkpoint(source, part)
    check_finite(f"{checkpoint.format} checkpoint {label}", checkpoint.weights, checkpoint.weights)
    if to == "torchvision":
        content: dict[str, Any] = to_torchvision(checkpoint.weights)
    elif to in ("mmdet", "student"):
        content = to_mmdet(checkpoint.weights, checkpoint.meta)
    else:
        raise CheckpointError(f"cannot convert to {one_line(to, 40)}: choose mmdet, torchvision or student")
    out = os.path.abspath(os.fspath(out))
    with writing(Path(out)) as partial, open(partial, "wb") as file:
        torch.save(content, file)
    chosen = f" ({part})" if part else ""
    return f"converted {checkpoint.format} checkpoint {label}{chosen}: {len(checkpoint.weights)} tensors to {out}"


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


_TORCHVISION_PREFIXES = ((r"backbone\.", r"backbone.body."),
                         (r"neck\.lateral_convs\.(\d+)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
                         (r"neck\.fpn_convs\.(\d+)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
                         (r"bbox_head\.cls_convs\.(\d+)\.conv\.", r"head.classification_head.conv.\1.0."),
                         (r"bbox_head\.cls_convs\.(\d+)\.(?:gn|bn)\.", r"head.classification_head.conv.\1.1."),
                         (r"bbox_head\.reg_convs\.(\d+)\.conv\.", r"head.regression_head.conv.\1.0."),
                         (r"bbox_head\.reg_convs\.(\d+)\.(?:gn|bn)\.", r"head.regression_head.conv.\1.1."),
                         (r"bbox_head\.retina_cls\.", r"head.classification_head.cls_logits."),
                         (r"bbox_head\.retina_reg\.", r"head.regression_head.bbox_reg."))


def to_torchvision(weights: Weights) -> dict[str, Tensor]:
    """The state dict of torchvision's `RetinaNet` (names of its current release) from weights with our names.

    Only names change: build torchvision's model with the same anchors, pixel statistics and class count. Its class 0 is
    our class 0. Raises `CheckpointError` if the head is not a RetinaHead, or if torchvision's model lacks a part.
    """
    if "bbox_head.retina_cls.weight" not in weights:
        raise CheckpointError(
            "only a RetinaNet can be converted to torchvision, and this model's head is not a RetinaHead"
        )
    levels = len({match[1] for name in weights if (match := re.match(r"neck\.lateral_convs\.(\d+)\.", name))})
    extra = {f"backbone.fpn.layer_blocks.{levels + i}.0.": f"backbone.fpn.extra_blocks.p{6 + i}." for i in range(2)}
    renamed = {}
    for name, value in weights.items():
        if name.endswith("loss_normalizer"):
            continue
        for pattern, replacement in _TORCHVISION_PREFIXES:
            target, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                break
        else:
            raise CheckpointError(f"torchvision's RetinaNet has no counterpart of {one_line(name, 80)}")
        for layer_block, extra_block in extra.items():
            target = target.replace(layer_block, extra_block)
        renamed[target] = value
    return renamed
