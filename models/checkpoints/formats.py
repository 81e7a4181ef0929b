"""The names that other projects give to a detector's weights, and their translation to our names, which are mmdet's.

`parse_checkpoint` recognises a format by the names of its weights and by the other entries of the file. A translation
is a function from a dict of tensors to a dict of tensors with our names. It does not change names that it does not
know, and the load report lists them as unexpected.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.errors import one_line

from .classifiers import densenet_name, efficientnet_names
from .unpickler import CheckpointError
from .wrappers import Weights, check_size, find_weights
from .wrappers import rename as _rename

OUR_FORMAT = "densekd"
_PARTS = ("student", "teacher")


@dataclass
class Checkpoint:
    """Weights with our names, the file's format, and its other information (in our format `classes` and `config`)."""

    format: str
    weights: Weights
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict | None:
        """The configuration in a checkpoint of ours; those of other projects have texts under this name."""
        found = self.meta.get("config")
        return found if self.format == OUR_FORMAT and isinstance(found, dict) else None


def parse_checkpoint(content: Any, part: str | None = None, preferred: str | None = None) -> Checkpoint:
    """Finds the weights in the result of `read_checkpoint` and gives them our names.

    `part` chooses `student` or `teacher` of an FGD checkpoint, `preferred` does so only where the file has both. Raises
    `CheckpointError` if there are no weights, if the file has two parts and none is chosen, or if the chosen part is
    missing.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a {type(content).__name__} instead of weights")
    weights = find_weights(content)
    weights, has_parts = _choose_part(weights, part, preferred)
    format_name, translate = _recognise(weights, content)
    if has_parts and format_name in ("mmdet2", "mmdet3", "state-dict"):
        format_name = "fgd"
    meta = dict(content["meta"]) if isinstance(content.get("meta"), dict) else {}
    if format_name == OUR_FORMAT:
        meta |= {key: content[key] for key in ("classes", "config") if key in content}
    check_size(meta)
    return Checkpoint(format_name, _rpn_to_bbox_head(translate(weights)), meta)


def foreign(content: Any, names: Callable[[str], str]) -> Checkpoint:
    """Finds the weights of a model that is not of this project; `names` translates the file's names to the model's."""
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a {type(content).__name__} instead of weights")
    return Checkpoint("state-dict", _rename(find_weights(content), names))


def _choose_part(weights: Weights, part: str | None, preferred: str | None) -> tuple[Weights, bool]:
    """The weights of one part, without its prefix, and whether the file has parts."""
    present = [name for name in _PARTS if any(key.startswith(f"{name}.") for key in weights)]
    if len(present) > 1:
        part = part or preferred
    if part is None and len(present) > 1:
        raise CheckpointError(
            f"holds {' and '.join(present)}: choose the part to load, part='{present[0]}' or part='{present[1]}'"
        )
    if part is not None and part not in present:
        raise CheckpointError(
            f"holds no part '{one_line(part, 40)}', only {' and '.join(present) or 'the weights of one model'}"
        )
    if not present:
        return weights, False
    prefix = f"{part or present[0]}."
    # The other part and the distillation losses are left out here, so the report does not list them as unexpected.
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}, True


def _recognise(weights: Weights, content: dict) -> tuple[str, Callable[[Weights], Weights]]:
    def has(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in weights)

    if has(r"backbone\.bottom_up\."):
        return "detectron2", _from_detectron2
    if has(r"backbone\.body\."):
        return "torchvision", _from_torchvision
    if has(r"conv1_w$|res\d_\d+_branch"):
        return "caffe2-backbone", _from_caffe2_backbone
    if has(r"res\d\.\d+\."):
        return "detectron2-backbone", _from_detectron2_backbone
    if content.get("format") == OUR_FORMAT:
        return OUR_FORMAT, dict
    if isinstance(content.get("state_dict"), dict):
        meta = content.get("meta") if isinstance(content.get("meta"), dict) else {}
        is_mmengine = "message_hub" in content or "mmengine_version" in meta or "dataset_meta" in meta
        return ("mmdet3" if is_mmengine else "mmdet2"), _from_mmdet
    if has(r"features\.denseblock1\."):
        return "densenet-backbone", lambda weights: _rename(weights, densenet_name)
    if has(r"_blocks\.\d+\._project_conv\."):
        return "efficientnet-backbone", lambda weights: _rename(weights, efficientnet_names(weights).__getitem__)
    if has(r"conv1\.weight$") and has(r"layer1\."):
        return "resnet-backbone", dict  # torchvision's, or caffe weights with the same names
    return "state-dict", _from_mmdet


def _rpn_to_bbox_head(weights: Weights) -> Weights:
    """Renames a two-stage detector's proposal head to a single-stage head, as mmdet's single-stage detector does."""
    if any(name.startswith("bbox_head.") for name in weights):
        return weights
    return _rename(weights, lambda name: re.sub(r"^rpn_head\.", "bbox_head.", name))


def _from_mmdet(weights: Weights) -> Weights:
    # Names in the FCOS heads of mmdet 1.
    return _rename(_from_mmdet_swin(weights),
                   lambda name: re.sub(r"^bbox_head\.fcos_(cls|reg|centerness)\.", r"bbox_head.conv_\1.", name))


_SWIN_NAMES = (  # torchvision numbers patches, blocks and merging layers in one sequence
    (r"patch_embed\.projection\.", lambda match: "features.0.0."),
    (r"patch_embed\.norm\.", lambda match: "features.0.2."),
    (r"stages\.(\d+)\.blocks\.", lambda match: f"features.{2 * int(match[1]) + 1}."),
    (r"stages\.(\d+)\.downsample\.", lambda match: f"features.{2 * int(match[1]) + 2}."),
    (r"(features\.\d+\.\d+)\.attn\.w_msa\.", r"\1.attn."),
    (r"(features\.\d+\.\d+)\.ffn\.layers\.0\.0\.", r"\1.mlp.0."),
    (r"(features\.\d+\.\d+)\.ffn\.layers\.1\.", r"\1.mlp.3."),
)


def _from_mmdet_swin(weights: Weights) -> Weights:
    """mmdet's SwinTransformer with torchvision's names, and with output norms numbered from 0.

    Both have the same layout of windows, queries and bias tables. Their results differ if a map is no larger than a
    window (7 cells: images up to 224 pixels at stride 32): there mmdet shifts the window, torchvision does not.
    """
    prefix = next((p for p in ("backbone.", "") if f"{p}patch_embed.projection.weight" in weights), None)
    if prefix is None:
        return weights
    norms = sorted({int(match[1]) for name in weights if (match := re.match(rf"{prefix}norm(\d+)\.", name))})

    def new_name(name: str) -> str:
        if not name.startswith(prefix):
            return name
        name = name.removeprefix(prefix)
        for pattern, replacement in _SWIN_NAMES:
            name = re.sub(f"^{pattern}", replacement, name)
        return prefix + re.sub(r"^norm(\d+)(?=\.)", lambda match: f"norm{norms.index(int(match[1]))}", name)

    merging = re.compile(rf"{prefix}stages\.\d+\.downsample\.")
    return _rename(
        {
            name: _unfolded_to_grids(value) if merging.match(name) else value
            for name, value in weights.items()
            if not name.endswith(".relative_position_index")  # depends only on the window's size; its shape differs
        },
        new_name,
    )


def _unfolded_to_grids(value: Tensor) -> Tensor:
    """Changes the inputs of Swin's patch merging, the last axis of `value`, from mmdet's order to torchvision's.

    mmdet unfolds: for each channel, the 2x2 neighbours row by row. torchvision concatenates four grids, one per
    neighbour and column by column, each with all of its channels.
    """
    neighbours = value.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]]
    return neighbours.transpose(-1, -2).flatten(-2)


# --- detectron2 and Caffe2 -------------------------------------------------------------------------------------------


def _resnet_name(name: str) -> str:
    """`stem.conv1.norm.weight` -> `bn1.weight`, `res2.0.shortcut.norm.bias` -> `layer1.0.downsample.1.bias`."""
    name = re.sub(r"^stem\.conv1\.norm\.", "bn1.", name)
    name = re.sub(r"^stem\.conv1\.", "conv1.", name)
    if not re.match(r"res[2-5]\.", name):
        return name
    name = f"layer{int(name[3]) - 1}{name[4:]}"
    name = re.sub(r"\.conv(\d)\.norm\.", r".bn\1.", name)
    name = name.replace(".shortcut.norm.", ".downsample.1.")
    return name.replace(".shortcut.", ".downsample.0.")


def _from_detectron2_backbone(weights: Weights) -> Weights:
    return _fill_statistics(_rename(weights, _resnet_name))


def _fill_statistics(weights: Weights) -> Weights:
    """Adds zero mean and unit variance, as detectron2 does, if an old caffe model has them in its scale and bias."""
    filled = dict(weights)
    for name, value in weights.items():
        norm = re.fullmatch(r"(.*(?:bn\d|downsample\.1))\.weight", name)
        if norm and f"{norm[1]}.running_mean" not in weights:
            filled[f"{norm[1]}.running_mean"] = torch.zeros_like(value)
            filled[f"{norm[1]}.running_var"] = torch.ones_like(value)
    return filled


_CAFFE2_ENDINGS = {
    "bn_s": "norm.weight", "bn_gamma": "norm.weight", "bn_b": "norm.bias", "bn_beta": "norm.bias",
    "bn_rm": "norm.running_mean", "bn_running_mean": "norm.running_mean",
    "bn_riv": "norm.running_var", "bn_running_var": "norm.running_var", "w": "weight", "b": "bias",
}  # fmt: skip
_CAFFE2_NAME = re.compile(rf"(res_conv1|conv1|res\d_\d+_branch(?:1|2[abc]))_({'|'.join(_CAFFE2_ENDINGS)})")


def _caffe2_name(name: str) -> str:
    """`res2_0_branch2a_bn_s` -> `res2.0.conv1.norm.weight`; `branch1`: shortcut; `res_conv1_bn`: the stem's."""
    match = _CAFFE2_NAME.fullmatch(name)
    if not match:
        return name
    layer, ending = match[1], _CAFFE2_ENDINGS[match[2]]
    if layer in ("conv1", "res_conv1"):
        return f"stem.conv1.{ending}"
    stage, block, branch = layer.split("_")
    layer = "shortcut" if branch == "branch1" else f"conv{'abc'.index(branch[-1]) + 1}"
    return f"{stage}.{block}.{layer}.{ending}"


def _from_caffe2_backbone(weights: Weights) -> Weights:
    return _from_detectron2_backbone(_rename(weights, _caffe2_name))


def _from_detectron2(weights: Weights) -> Weights:
    levels = sorted({int(match[1]) for name in weights if (match := re.match(r"backbone\.fpn_lateral(\d)\.", name))})
    prefixes = {"backbone.top_block.p6.": f"neck.fpn_convs.{len(levels)}.conv.",
                "backbone.top_block.p7.": f"neck.fpn_convs.{len(levels) + 1}.conv.",
                "head.cls_score.": "bbox_head.retina_cls.", "head.bbox_pred.": "bbox_head.retina_reg.",
                **_tower(weights, "head.cls_subnet.", "bbox_head.cls_convs"),
                **_tower(weights, "head.bbox_subnet.", "bbox_head.reg_convs")}
    for i, level in enumerate(levels):
        for theirs, ours in (("fpn_lateral", "lateral_convs"), ("fpn_output", "fpn_convs")):
            norm = f"backbone.{theirs}{level}.norm."
            prefixes[norm] = f"neck.{ours}.{i}.{_norm_name(weights, norm)}."
            prefixes[f"backbone.{theirs}{level}."] = f"neck.{ours}.{i}.conv."

    def new_name(name: str) -> str:
        if name.startswith("backbone.bottom_up."):
            return f"backbone.{_resnet_name(name.removeprefix('backbone.bottom_up.'))}"
        return _replace_prefix(name, prefixes)

    return _fill_statistics(_rename(weights, new_name))


# --- torchvision -----------------------------------------------------------------------------------------------------


def _from_torchvision(weights: Weights) -> Weights:
    """torchvision's RetinaNet of any version (new ones nest convolutions one level deeper), and v2 with group norm."""
    laterals = {match[1] for name in weights if (match := re.match(r"backbone\.fpn\.inner_blocks\.(\d+)\.", name))}
    prefixes = {"backbone.body.": "backbone.", "backbone.fpn.extra_blocks.p6.": f"neck.fpn_convs.{len(laterals)}.conv.",
                "backbone.fpn.extra_blocks.p7.": f"neck.fpn_convs.{len(laterals) + 1}.conv.",
                "head.classification_head.cls_logits.": "bbox_head.retina_cls.",
                "head.regression_head.bbox_reg.": "bbox_head.retina_reg.",
                **_tower(weights, "head.classification_head.conv.", "bbox_head.cls_convs"),
                **_tower(weights, "head.regression_head.conv.", "bbox_head.reg_convs")}
    for theirs, ours in (("inner_blocks", "lateral_convs"), ("layer_blocks", "fpn_convs")):
        for i in range(len(laterals)):
            prefixes[f"backbone.fpn.{theirs}.{i}.0."] = f"neck.{ours}.{i}.conv."
            prefixes[f"backbone.fpn.{theirs}.{i}."] = f"neck.{ours}.{i}.conv."
    return _rename(weights, lambda name: _replace_prefix(name, prefixes))


def _replace_prefix(name: str, prefixes: dict[str, str]) -> str:
    """Replaces the first prefix that matches. A longer prefix must come before a shorter one that it contains."""
    for theirs, ours in prefixes.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _tower(weights: Weights, prefix: str, target: str) -> dict[str, str]:
    """Prefixes of a head's convolutions and norms. Other projects number them by their position in a Sequential.

    Positions can be `0, 3, 6` (one Sequential) or `0.0, 1.0, 2.0` (nested). A weight with four dimensions is a
    convolution, a vector is the norm after it.
    """
    units = {match[1] for name in weights if (match := re.match(rf"{re.escape(prefix)}(\d+(?:\.\d+)?)\.weight$", name))}
    names, convs = {}, 0
    for unit in sorted(units, key=lambda text: [int(number) for number in text.split(".")]):
        theirs = f"{prefix}{unit}."
        if weights[f"{theirs}weight"].dim() == 4:
            names[theirs] = f"{target}.{convs}.conv."
            convs += 1
        else:
            names[theirs] = f"{target}.{convs - 1}.{_norm_name(weights, theirs)}."
    return names


def _norm_name(weights: Weights, prefix: str) -> str:
    """mmcv names a norm by its type, and only batch norm has running statistics."""
    return "bn" if f"{prefix}running_mean" in weights else "gn"
