"""A RetinaNet's weights for torchvision and detectron2: their names, their order of anchors, and what they lack.

Each project has one RetinaNet. `check_settings` compares ours with it, because most of the differences do not show in
the weights: a file would load there, and detect something else.
"""
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from data.errors import counted, one_line

from ..anchors import AnchorGenerator
from ..backbones.resnet import Bottleneck, ResNet
from ..detector import Detector
from .formats import Weights
from .unpickler import CheckpointError

EPS = 1e-5          # of both projects' batch norms
TOWER = 4           # convolutions in a tower of torchvision's head
WIDTH = 64          # of the first stage of torchvision's ResNets, and of all with basic blocks in detectron2

_UNUSED = re.compile(r"bbox_head\.loss_normalizer|.*\.num_batches_tracked")
_STAGE_LAYERS = ((r"bn(\d)\.", r"conv\1.norm."), (r"downsample\.0\.", "shortcut."),
                 (r"downsample\.1\.", "shortcut.norm."))
_OURS = (r"backbone\.(?:conv1|bn1|layer[1-4]\.\d+\.\w+(?:\.[01])?)\.\w+|neck\.(?:lateral|fpn)_convs\.\d+\.\w+\.\w+|"
         r"bbox_head\.(?:(?:cls|reg)_convs\.\d+\.\w+|retina_(?:cls|reg))\.\w+")

_TORCHVISION_PREFIXES = ((r"backbone\.", r"backbone.body."),
                         (r"neck\.lateral_convs\.(\d+)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
                         (r"neck\.fpn_convs\.(\d+)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
                         (r"bbox_head\.cls_convs\.(\d+)\.conv\.", r"head.classification_head.conv.\1.0."),
                         (r"bbox_head\.cls_convs\.(\d+)\.(?:gn|bn)\.", r"head.classification_head.conv.\1.1."),
                         (r"bbox_head\.reg_convs\.(\d+)\.conv\.", r"head.regression_head.conv.\1.0."),
                         (r"bbox_head\.reg_convs\.(\d+)\.(?:gn|bn)\.", r"head.regression_head.conv.\1.1."),
                         (r"bbox_head\.retina_cls\.", r"head.classification_head.cls_logits."),
                         (r"bbox_head\.retina_reg\.", r"head.regression_head.bbox_reg."))


def to_torchvision(weights: Weights, detector: Detector | None = None) -> dict[str, Tensor]:
    """The state dict of torchvision's `RetinaNet` (names of its current release) from weights with our names.

    Build torchvision's model with the same pixel statistics and class count. Its class 0 is our class 0. Anchors are
    not in the weights; those of our style `torchvision` are torchvision's.

    Args:
        detector: the model of these weights, to compare its settings, see `check_settings`; None if they are not known.
    Raises:
        CheckpointError: the head is not a RetinaHead, or torchvision's model has no counterpart of a part.
    """
    check_retinanet(weights, "torchvision")
    levels = count_levels(weights)
    extra = {f"backbone.fpn.layer_blocks.{levels + i}.0.": f"backbone.fpn.extra_blocks.p{6 + i}." for i in range(2)}
    renamed = {}
    for name, value in _used(weights, "torchvision", keep_counters=True):
        target = next((re.sub(f"^{pattern}", replacement, name) for pattern, replacement in _TORCHVISION_PREFIXES
                       if re.match(pattern, name)), None)
        if target is None:
            raise _no_counterpart("torchvision", one_line(name, 80))
        for layer_block, extra_block in extra.items():
            target = target.replace(layer_block, extra_block)
        renamed[target] = value
    _check_shapes(weights, "torchvision")
    if detector is not None:
        check_settings(detector, "torchvision")
        reorder(renamed, "head.classification_head.cls_logits", "head.regression_head.bbox_reg", detector, "mmdet")
    return renamed


def to_detectron2(weights: Weights, detector: Detector | None = None) -> dict[str, Tensor]:
    """The state dict of detectron2's `RetinaNet` from weights with our names, with the anchors in its order.

    Args:
        detector: the model of these weights; None if it is not known. Then the anchors must be in detectron2's order.
    Raises:
        CheckpointError: as `to_torchvision`.
    """
    check_retinanet(weights, "detectron2")
    levels, lowest = count_levels(weights), 6 - count_levels(weights)
    steps = {tower: 3 if any(f"bbox_head.{tower}.0.{norm}.weight" in weights for norm in ("gn", "bn")) else 2
             for tower in ("cls_convs", "reg_convs")}
    renamed = {}
    for name, value in _used(weights, "detectron2"):
        target = _detectron2_name(name, levels, lowest, steps)
        if target is None:
            raise _no_counterpart("detectron2", one_line(name, 80))
        renamed[target] = value
        # Its towers have a bias before a norm, too.
        if (unit := re.fullmatch(r"(head\.\w+_subnet\.\d+)\.weight", target)) and value.dim() == 4:
            if name.replace(".weight", ".bias") not in weights:
                renamed[f"{unit[1]}.bias"] = value.new_zeros(len(value))
    _check_shapes(weights, "detectron2")
    if detector is not None:
        check_settings(detector, "detectron2")
        reorder(renamed, "head.cls_score", "head.bbox_pred", detector, "detectron2")
    return renamed


def _detectron2_name(name: str, levels: int, lowest: int, steps: dict[str, int]) -> str | None:
    """`backbone.layer1.0.bn1.weight` -> `backbone.bottom_up.res2.0.conv1.norm.weight`; None for an unknown name."""
    part, _, rest = name.partition(".")
    if part == "backbone":
        rest = rest.replace("conv1.", "stem.conv1.", 1) if rest.startswith("conv1.") else rest
        rest = re.sub(r"^bn1\.", "stem.conv1.norm.", rest)
        if stage := re.match(r"layer(\d)\.(\d+)\.", rest):
            layer = rest[stage.end():]
            for pattern, replacement in _STAGE_LAYERS:
                layer = re.sub(f"^{pattern}", replacement, layer)
            rest = f"res{int(stage[1]) + 1}.{stage[2]}.{layer}"
        return f"backbone.bottom_up.{rest}"
    if found := re.fullmatch(r"(lateral|fpn)_convs\.(\d+)\.(conv|gn|bn)\.(\w+)", rest):
        number, kind = int(found[2]), "" if found[3] == "conv" else "norm."
        if found[1] == "fpn" and number >= levels:
            return None if kind else f"backbone.top_block.p{6 + number - levels}.{found[4]}"
        return f"backbone.fpn_{'lateral' if found[1] == 'lateral' else 'output'}{lowest + number}.{kind}{found[4]}"
    if found := re.fullmatch(r"(cls|reg)_convs\.(\d+)\.(conv|gn|bn)\.(\w+)", rest):
        place = int(found[2]) * steps[f"{found[1]}_convs"] + (found[3] != "conv")
        return f"head.{'cls' if found[1] == 'cls' else 'bbox'}_subnet.{place}.{found[4]}"
    found = re.fullmatch(r"retina_(cls|reg)\.(\w+)", rest)
    return found and f"head.{'cls_score' if found[1] == 'cls' else 'bbox_pred'}.{found[2]}"


def check_retinanet(weights: Weights, project: str) -> None:
    """Raise CheckpointError if these are not the weights of a RetinaNet."""
    if "bbox_head.retina_cls.weight" not in weights:
        raise CheckpointError(f"only a RetinaNet can be converted to {project}, and this model's head is not a "
                              "RetinaHead")


def count_levels(weights: Weights) -> int:
    """The levels of the pyramid that come from the backbone."""
    return len({match[1] for name in weights if (match := re.match(r"neck\.lateral_convs\.(\d+)\.", name))})


def _used(weights: Weights, project: str, keep_counters: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The weights that a RetinaNet with a ResNet has; CheckpointError for the first other one."""
    for name, value in weights.items():
        if _UNUSED.fullmatch(name) and not (keep_counters and name.endswith("num_batches_tracked")):
            continue
        if not re.fullmatch(_OURS, name):
            raise _no_counterpart(project, one_line(name, 80))
        yield name, value


def _no_counterpart(project: str, what: str) -> CheckpointError:
    return CheckpointError(f"{project}'s RetinaNet has no counterpart of {what}; docs/shipping.md lists the settings "
                           "of models that can be converted")


def _check_shapes(weights: Weights, project: str) -> None:
    """Raise CheckpointError for layers that the other project's RetinaNet cannot have."""
    problem = next(_shape_problems(weights, project), None)
    if problem is not None:
        raise _no_counterpart(project, problem)


def _shape_problems(weights: Weights, project: str) -> Iterator[str]:
    levels, first = count_levels(weights), weights.get("backbone.conv1.weight")
    extra = sum(bool(re.fullmatch(r"neck\.fpn_convs\.\d+\.conv\.weight", name)) for name in weights) - levels
    if not levels:
        yield "a detector without an FPN"
    elif extra != 2:
        yield f"{counted(max(extra, 0), 'extra level')} of the FPN: it has two, which are convolutions"
    basic = "backbone.layer1.0.conv3.weight" not in weights
    if first is not None and len(first) != WIDTH and (basic or project == "torchvision"):
        yield f"a ResNet that starts with {len(first)} channels: it has {WIDTH} (model.backbone.base_channels)"
    out = weights.get("neck.lateral_convs.0.conv.weight")
    for tower in ("cls_convs", "reg_convs"):
        found = [value for name, value in weights.items() if re.fullmatch(rf"bbox_head\.{tower}\.\d+\.conv\.weight",
                                                                          name)]
        if project == "torchvision" and len(found) != TOWER:
            yield f"a head with {counted(len(found), 'convolution')} in a tower: it has {TOWER} (stacked_convs)"
        if out is not None and any(len(value) != len(out) for value in found):
            yield f"a head that is not as wide as the FPN's {len(out)} channels (feat_channels)"
        norm = f"bbox_head.{tower}.0.gn.weight" in weights or f"bbox_head.{tower}.0.bn.weight" in weights
        if project == "torchvision" and norm and f"bbox_head.{tower}.0.conv.bias" in weights:
            yield "a bias before a norm in the head (conv_bias)"


def check_settings(detector: Detector, project: str) -> None:
    """Raise CheckpointError for the first setting that makes the other project's RetinaNet compute something else."""
    problem = next(_setting_problems(detector, project), None)
    if problem is not None:
        raise _no_counterpart(project, problem)


def _setting_problems(detector: Detector, project: str) -> Iterator[str]:
    backbone, neck, head = detector.backbone, detector.neck, detector.bbox_head
    if not isinstance(backbone, ResNet):
        yield f"the backbone {type(backbone).__name__}: it needs a ResNet"
        return
    block = backbone.layer2[0] if backbone.num_stages > 1 else None
    if project == "torchvision" and isinstance(block, Bottleneck) and block.conv1.stride != (1, 1):
        yield "model.backbone.style: caffe"
    norms = {module.eps for module in backbone.modules() if hasattr(module, "eps")}
    if project == "detectron2" and norms != {EPS}:
        yield f"model.backbone.norm_cfg.eps: {', '.join(f'{eps:g}' for eps in sorted(norms))}; it has {EPS:g}"
    source = {"torchvision": "on_output", "detectron2": "on_input"}[project]
    if neck.extra_source != source:
        # torchvision takes the backbone's last level only if it is not as wide as the FPN.
        wide = backbone.out_channels[-1] == neck.out_channels[0]
        if project == "detectron2" or neck.extra_source != "on_input" or wide:
            yield f"model.neck.add_extra_convs: {neck.extra_source}; it has {source}"
    if not neck.relu_before_extra_convs:
        yield "model.neck.relu_before_extra_convs: false; it has true"
    if neck.end_level != len(backbone.out_channels) - 1 or backbone.out_strides[-1] != 32:
        yield "an FPN without the backbone's last level"
    if neck.upsample.mode != "nearest":
        yield f"model.neck.upsample_cfg.mode: {neck.upsample.mode}"
    if not isinstance(neck.lateral_convs[0].activate, nn.Identity):
        yield "model.neck.act_cfg"
    coder, anchors = head.bbox_coder, head.prior_generator
    if coder.means != [0] * 4 or coder.stds != [1] * 4:
        yield "model.head.bbox_coder with means or deviations"
    if project == "torchvision" and anchors.center_offset:
        yield "model.head.anchor_generator.center_offset"
    if project == "detectron2" and anchors.style == "torchvision":
        yield "model.head.anchor_generator.style: torchvision, whose anchors are rounded"


def remarks(detector: Detector | None, project: str) -> list[str]:
    """What the weights do not say, and the other project's model must be given for the same detections."""
    if detector is None:
        return ["its settings are not known, so they were not compared, and anchors are in the same order as before: "
                "--cfg gives the settings"]
    found, preprocess = [], detector.preprocess
    mean, std = ([round(value, 3) for value in values] for values in preprocess.statistics)
    found.append(f"give {project} the pixel mean {mean} and deviation {std}, {preprocess.channel_order.upper()}")
    eps = {module.eps for module in detector.backbone.modules() if hasattr(module, "eps")}
    if eps != {EPS}:
        found.append(f"give its batch norms the eps {', '.join(f'{each:g}' for each in sorted(eps))}")
    anchors, stage = detector.bbox_head.prior_generator, detector.backbone.layer2[0]
    if project == "torchvision" and anchors.style != "torchvision":
        found.append("give it the anchors of this model, which torchvision rounds (docs/shipping.md)")
    elif not _are_default(anchors):
        found.append("give it the sizes, ratios and offset of this model's anchors, which are not its own")
    if project == "detectron2" and isinstance(stage, Bottleneck) and stage.conv1.stride == (1, 1):
        found.append("set MODEL.RESNETS.STRIDE_IN_1X1 to False")
    return found


def _are_default(anchors: AnchorGenerator) -> bool:
    """Whether anchors have the sizes and ratios of both projects: 32 pixels on the finest of five levels, doubled on
    each, times 1, 2^(1/3) and 2^(2/3)."""
    own = [size * scale for size in anchors.base_sizes for scale in anchors.scales]
    theirs = [32 * 2 ** (level + octave / 3) for level in range(5) for octave in range(3)]
    return (anchors.ratios == [0.5, 1, 2] and not anchors.center_offset and len(own) == len(theirs)
            and all(abs(a - b) < 1e-6 * b for a, b in zip(own, theirs)))


def reorder(state: dict[str, Tensor], classifier: str, regressor: str, detector: Detector, style: str) -> None:
    """Put the outputs of the last layers, in place, into the order of anchors of another style.

    In a cell, mmdet and torchvision order anchors by ratio, then by scale, detectron2 by scale, then by ratio.
    """
    anchors = detector.bbox_head.prior_generator
    ratios, scales = len(anchors.ratios), len(anchors.scales)
    ours, theirs = (each == "detectron2" for each in (anchors.style, style))
    if ours == theirs:
        return
    shape = (scales, ratios) if ours else (ratios, scales)
    order = torch.arange(ratios * scales).view(shape).T.flatten()
    for name in (f"{layer}.{kind}" for layer in (classifier, regressor) for kind in ("weight", "bias")):
        state[name] = state[name].unflatten(0, (ratios * scales, -1))[order].flatten(0, 1)
