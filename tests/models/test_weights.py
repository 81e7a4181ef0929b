"""Every checkpoint format loads into a model, from files that the tests write."""

import pickle
import re

import numpy as np
import pytest
import torch

from models import build_detector
from models.weights import CheckpointError, load_backbone_weights, load_weights, open_checkpoint


def detector(head="RetinaHead", depth=18, classes=3, seed=0, **neck):
    cfg = {
        "backbone": {"type": "ResNet", "depth": depth, "base_channels": 8, "stem_channels": 8},
        "neck": {"type": "FPN", "out_channels": 32, "start_level": 1, "num_outs": 5, "add_extra_convs": "on_output"},
        "head": {"type": head, "num_classes": classes, "stacked_convs": 2, "feat_channels": 32},
    }
    cfg["neck"].update(neck)
    torch.manual_seed(seed)
    model = build_detector(cfg)
    with torch.no_grad():  # also norms, otherwise half of the tensors would be ones and zeros
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value))
    return model


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def tensors(state):
    """The tensors to compare: parameters and running statistics."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def assert_loaded(model, state):
    mine = tensors(model.state_dict())
    assert mine.keys() == tensors(state).keys()
    for name, value in mine.items():
        assert torch.equal(value, state[name]), name


def write(path, content):
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    return path


def arrays(state):
    return {name: value.numpy() for name, value in state.items()}


def to_detectron2(name):
    """detectron2's names for our weights, for a two-layer head without norm and levels 3 to 5."""
    rules = [
        (r"^backbone\.bn1\.", "backbone.bottom_up.stem.conv1.norm."),
        (r"^backbone\.conv1\.", "backbone.bottom_up.stem.conv1."),
        (r"^backbone\.layer(\d)", lambda match: f"backbone.bottom_up.res{int(match[1]) + 1}"),
        (r"\.bn(\d)\.", r".conv\1.norm."),
        (r"\.downsample\.0\.", ".shortcut."),
        (r"\.downsample\.1\.", ".shortcut.norm."),
        (r"^neck\.lateral_convs\.(\d)\.conv", lambda match: f"backbone.fpn_lateral{int(match[1]) + 3}"),
        (r"^neck\.fpn_convs\.([012])\.conv", lambda match: f"backbone.fpn_output{int(match[1]) + 3}"),
        (r"^neck\.fpn_convs\.([34])\.conv", lambda match: f"backbone.top_block.p{int(match[1]) + 3}"),
        (r"^bbox_head\.cls_convs\.(\d)\.conv", lambda match: f"head.cls_subnet.{int(match[1]) * 2}"),
        (r"^bbox_head\.reg_convs\.(\d)\.conv", lambda match: f"head.bbox_subnet.{int(match[1]) * 2}"),
        (r"^bbox_head\.retina_cls", "head.cls_score"),
        (r"^bbox_head\.retina_reg", "head.bbox_pred"),
    ]
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def to_caffe2(name):
    """Caffe2's names for the weights of our ResNet."""
    name = re.sub(r"^bn1\.", "res_conv1_bn_", name)
    name = re.sub(r"^layer(\d)\.(\d+)\.", lambda match: f"res{int(match[1]) + 1}_{match[2]}_", name)
    name = re.sub(r"(conv|bn)(\d)\.", lambda m: f"branch2{'abc'[int(m[2]) - 1]}_{'bn_' if m[1] == 'bn' else ''}", name)
    name = name.replace("downsample.0.", "branch1_").replace("downsample.1.", "branch1_bn_")
    if name == "branch2a_weight":  # the stem
        return "conv1_w"
    ending = {"running_mean": "rm", "running_var": "riv", "bias": "b"}
    for ours, theirs in {**ending, "weight": "s" if "bn_" in name else "w"}.items():
        name = name.replace(ours, theirs)
    return name


OURS = {
    "densekd": lambda s: {"format": "densekd", "model": s, "epoch": 3, "optimizer": {"state": {}}},
    "state-dict": lambda s: s,
    "mmdet2": lambda s: {"meta": {"mmdet_version": "2.11.0", "CLASSES": ("a", "b")}, "state_dict": s, "optimizer": {}},
    "mmdet3": lambda s: {"meta": {"mmengine_version": "0.10.7"}, "state_dict": s, "message_hub": {}},
}


@pytest.mark.parametrize("format_name", OURS)
@pytest.mark.parametrize("head", ["RetinaHead", "GFLHead"])
def test_own_names(tmp_path, reported, format_name, head):
    state = state_of(detector(head))
    path = write(tmp_path / "weights.pth", OURS[format_name](state))
    model = detector(head, seed=1)
    report = load_weights(model, path)
    assert_loaded(model, state)
    count = len(tensors(state))
    assert (report.format, report.matched, report.total) == (format_name, count, count)
    assert not (report.missing or report.unexpected or report.mismatched)
    assert reported() == f"loaded {format_name} checkpoint {path}: {count} of {count} tensors\n"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.",
                                    "module.module.", "model.", "module.model._orig_mod."])
def test_wrapper_prefix(prefix):
    state = state_of(detector())
    model = detector(seed=1)
    load_weights(model, {"model": {prefix + name: value for name, value in state.items()}})
    assert_loaded(model, state)


@pytest.mark.parametrize("wrap", [
    lambda state: {"n_averaged": torch.tensor(3)} | {f"module.{name}": value for name, value in state.items()},
    lambda state: {re.sub(r"^(backbone|neck|bbox_head)\.", r"\1._orig_mod.", name): v for name, v in state.items()},
    lambda state: {"state_dict": {f"model.{name}": v for name, v in state.items()}, "pytorch-lightning_version": "2.5"},
    lambda state: {"state_dict": {f"model.{name}": v for name, v in state.items()} | {"criterion.w": torch.ones(2)}},
    lambda state: {"epoch": 3, "model": {"state_dict": state}},
    lambda state: {"epoch": 3, "ema": {f"module.{name}": v for name, v in state.items()}},
    lambda state: {"module": {f"_forward_module.{name}": v for name, v in state.items()}},
    lambda state: {re.sub(r"^backbone\.", "_fsdp_wrapped_module.backbone._fsdp_wrapped_module.", k): v
                   for k, v in state.items()},
    lambda state: {k.replace("layer1.", "layer1._checkpoint_wrapped_module."): v for k, v in state.items()},
    lambda state: {re.sub(r"^backbone\.", "backbone.module.", k): v for k, v in state.items()},
], ids=["AveragedModel", "compiled parts", "Lightning", "Lightning's criterion", "containers", "moving average",
        "DeepSpeed", "FSDP", "activation checkpoints", "DDP inside"])
def test_weights_from_wrappers(wrap):
    state = state_of(detector())
    model = detector(seed=1)
    assert not load_weights(model, wrap(state)).unexpected
    assert_loaded(model, state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    state = state_of(detector())
    name = next(name for name in state if name.endswith("weight"))
    state[name] = state[name].clone()
    state[name].view(-1)[0] = value
    model = detector(seed=1)
    before = state_of(model)
    with pytest.raises(CheckpointError, match=rf"NaN or infinite values in 1 \({re.escape(name)}\): .*earlier"):
        load_weights(model, state)
    assert_loaded(model, before)


@pytest.mark.parametrize("ending, value, what", [("conv1.weight", 1e300, "NaN or infinite values"),
                                                 ("running_var", -5.0, "variances below zero")])
def test_weights_that_become_infinite_or_nan_are_refused(ending, value, what):
    """In the model's precision, or as soon as they are used."""
    state = {name: tensor.double() for name, tensor in state_of(detector().float()).items()}
    name = next(name for name in state if name.endswith(ending))
    state[name].view(-1)[0] = value
    with pytest.raises(CheckpointError, match=rf"{what} in 1 \({re.escape(name)}\): .*earlier"):
        load_weights(detector(seed=1).float(), state)


@pytest.mark.parametrize("shape", [lambda value: [value, value], lambda value: [value]], ids=["wide", "deep"])
def test_a_configuration_that_is_endless_to_walk_is_refused(shape):
    """A pickle stores forty lists, each of which holds the one before twice, in a few hundred bytes."""
    value = 1
    for _ in range(40 if len(shape(0)) == 2 else 5000):
        value = shape(value)
    weights = {"a.weight": torch.ones(1)}
    for content in ({"format": "densekd", "model": weights, "config": {"model": value}},
                    {"state_dict": weights, "meta": {"CLASSES": value}}):
        with pytest.raises(CheckpointError, match="its configuration or names have more than 100000 entries, or are"):
            open_checkpoint(content)


def test_source_may_be_a_dict_and_model_keeps_its_dtype():
    state = state_of(detector())
    model = detector(seed=1).double()
    load_weights(model, {name: value.half() for name, value in state.items()})
    for name, value in tensors(model.state_dict()).items():
        assert value.dtype == torch.float64
        assert torch.equal(value, state[name].half().double()), name


def test_running_normaliser_is_optional():
    state = state_of(detector())
    model = detector(seed=1)
    model.bbox_head.register_buffer("loss_normalizer", torch.tensor(100.0), persistent=True)
    report = load_weights(model, state)
    assert report.matched == report.total == len(tensors(state))
    assert model.bbox_head.loss_normalizer == 100
    load_weights(model, {**state, "bbox_head.loss_normalizer": torch.tensor(7.0)})
    assert model.bbox_head.loss_normalizer == 7


def test_gfl_bin_positions_are_not_unexpected():
    state = state_of(detector("GFLHead"))
    report = load_weights(detector("GFLHead", seed=1), {**state, "bbox_head.integral.project": torch.arange(17.0)})
    assert not report.unexpected


def test_fgd_parts(tmp_path):
    student, teacher = state_of(detector("GFLHead")), state_of(detector("GFLHead", depth=50))
    content = {f"student.{name}": value for name, value in student.items()}
    content |= {f"teacher.{name}": value for name, value in teacher.items()}
    content |= {"distill_losses.loss_fgd_fpn_0.conv_mask_s.weight": torch.ones(1), "student_neck_fpn_convs_0_conv": 1}
    path = write(tmp_path / "fgd.pth", {"meta": {"mmdet_version": "2.11.0"}, "state_dict": content})
    for part, state, depth in (("student", student, 18), ("teacher", teacher, 50)):
        model = detector("GFLHead", depth=depth, seed=1)
        report = load_weights(model, path, part=part)
        assert_loaded(model, state)
        assert report.format == "fgd" and not report.unexpected
    with pytest.raises(CheckpointError, match="holds student and teacher: choose the part to load"):
        load_weights(detector("GFLHead"), path)


def test_part_that_is_not_there():
    state = state_of(detector())
    with pytest.raises(CheckpointError, match="holds no part 'student', only the weights of one model"):
        load_weights(detector(), state, part="student")
    only = {f"student.{name}": value for name, value in state.items()}
    with pytest.raises(CheckpointError, match="holds no part 'teacher', only student"):
        load_weights(detector(), {"state_dict": only}, part="teacher")
    load_weights(detector(), {"state_dict": only})  # nothing to choose


def test_two_stage_proposal_head(reported):
    state = state_of(detector())
    renamed = {name.replace("bbox_head.", "rpn_head."): value for name, value in state.items()}
    renamed["roi_head.bbox_head.fc_cls.weight"] = torch.ones(1)
    model = detector(seed=1)
    report = load_weights(model, {"meta": {}, "state_dict": renamed})
    assert_loaded(model, state)
    assert report.unexpected == ["roi_head.bbox_head.fc_cls.weight"]
    assert "in the file only: 1 (roi_head.bbox_head.fc_cls.weight)" in reported()


def test_proposal_head_beside_a_box_head_stays():
    state = state_of(detector())
    report = load_weights(detector(), {**state, "rpn_head.retina_cls.weight": torch.ones(1)})
    assert report.unexpected == ["rpn_head.retina_cls.weight"]


# --- detectron2 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("depth", [18, 50])
def test_detectron2(tmp_path, suffix, depth):
    state = state_of(detector(depth=depth))
    renamed = {to_detectron2(name): value for name, value in tensors(state).items()}
    renamed |= {"pixel_mean": torch.ones(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    renamed["anchor_generator.cell_anchors.0"] = torch.ones(9, 4)
    content = {"model": arrays(renamed) if suffix == ".pkl" else renamed, "__author__": "Detectron2 Model Zoo"}
    model = detector(depth=depth, seed=1)
    report = load_weights(model, write(tmp_path / f"d2{suffix}", content))
    assert_loaded(model, state)
    assert report.format == "detectron2" and not report.unexpected


def test_detectron2_norms_in_neck_and_towers():
    kernel, vector = torch.ones(4, 4, 3, 3), torch.ones(4)
    content = {"backbone.bottom_up.stem.conv1.weight": kernel}
    for i, value in enumerate((kernel, vector, None, kernel, vector, None)):  # convolution, norm, activation
        if value is not None:
            content[f"head.cls_subnet.{i}.weight"] = value
    content |= {"backbone.fpn_lateral3.weight": kernel, "backbone.fpn_lateral3.norm.weight": vector}
    content |= {"backbone.fpn_output3.norm.weight": vector, "backbone.fpn_output3.norm.running_mean": vector}
    report = load_weights(torch.nn.Module(), {"model": content})
    expected = {"backbone.conv1.weight", "neck.lateral_convs.0.conv.weight", "neck.lateral_convs.0.gn.weight"}
    expected |= {"neck.fpn_convs.0.bn.weight", "neck.fpn_convs.0.bn.running_mean"}
    expected |= {f"bbox_head.cls_convs.{i}.{kind}.weight" for i in range(2) for kind in ("conv", "gn")}
    assert set(report.unexpected) == expected


@pytest.mark.parametrize("with_statistics", [True, False])
@pytest.mark.parametrize("names", ["caffe2", "converted"])
def test_detectron2_backbones(tmp_path, with_statistics, names):
    state = state_of(detector(depth=50).backbone)
    kept = {name: v for name, v in tensors(state).items() if with_statistics or "running" not in name}
    if names == "caffe2":
        content = arrays({to_caffe2(name): value for name, value in kept.items()})
        content |= {"fc1000_w": np.ones((2, 2), np.float32), "conv1_w_momentum": np.ones(1, np.float32)}
        assert "res_conv1_bn_s" in content and "res2_0_branch2a_w" in content and "res2_0_branch1_bn_b" in content
    else:
        renamed = {to_detectron2(f"backbone.{name}"): value for name, value in kept.items()}
        renamed = {name.removeprefix("backbone.bottom_up."): value for name, value in renamed.items()}
        content = {"model": arrays(renamed), "__author__": "torchvision", "matching_heuristics": True}
        assert "stem.conv1.norm.weight" in renamed and "res2.0.shortcut.weight" in renamed
    model = detector(depth=50, seed=1)
    path = write(tmp_path / "R-50.pkl", content)
    report = load_backbone_weights(model.backbone, path)
    assert report.unexpected == (["fc1000_w"] if names == "caffe2" else [])
    for name, value in tensors(model.backbone.state_dict()).items():
        if with_statistics or "running" not in name:
            assert torch.equal(value, state[name]), name
        else:
            assert torch.equal(value, torch.full_like(value, float("var" in name))), name


# --- torchvision ------------------------------------------------------------------------------------------------------


def torchvision_retinanet(norm_layer=None):
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.retinanet import RetinaNetHead
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    extra = LastLevelP6P7(256, 256)
    options = {"weights": None, "returned_layers": [2, 3, 4], "extra_blocks": extra}
    backbone = resnet_fpn_backbone(backbone_name="resnet18", norm_layer=torch.nn.BatchNorm2d, **options)
    model = RetinaNet(backbone, num_classes=4, head=RetinaNetHead(256, 9, 4, norm_layer=norm_layer))
    torch.manual_seed(2)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value))
    return model


def full_width_retinanet(norm_cfg=None):
    head = {"type": "RetinaHead", "num_classes": 4}
    if norm_cfg:
        head["norm_cfg"] = norm_cfg
    neck = {"type": "FPN", "start_level": 1, "num_outs": 5, "add_extra_convs": "on_output", "out_channels": 256}
    return build_detector({"backbone": {"type": "ResNet", "depth": 18}, "neck": neck, "head": head})


def older_names(name):
    """The names before torchvision 0.14: convolutions were not nested in blocks."""
    name = re.sub(r"(inner_blocks|layer_blocks)\.(\d)\.0\.", r"\1.\2.", name)
    return re.sub(r"_head\.conv\.(\d)\.0\.", lambda match: f"_head.conv.{int(match[1]) * 2}.", name)


@pytest.mark.parametrize("rename", [str, older_names], ids=["current", "older"])
def test_torchvision_retinanet(tmp_path, rename):
    theirs = torchvision_retinanet().state_dict()
    content = {rename(name): value for name, value in theirs.items()}
    assert (rename is str) == (content.keys() == theirs.keys())
    model = full_width_retinanet()
    report = load_weights(model, write(tmp_path / "retinanet.pth", content))
    assert report.format == "torchvision" and not report.unexpected
    pairs = {
        "backbone.layer3.1.bn2.running_var": "backbone.body.layer3.1.bn2.running_var",
        "neck.lateral_convs.2.conv.bias": "backbone.fpn.inner_blocks.2.0.bias",
        "neck.fpn_convs.0.conv.weight": "backbone.fpn.layer_blocks.0.0.weight",
        "neck.fpn_convs.3.conv.weight": "backbone.fpn.extra_blocks.p6.weight",
        "neck.fpn_convs.4.conv.weight": "backbone.fpn.extra_blocks.p7.weight",
        "bbox_head.cls_convs.3.conv.weight": "head.classification_head.conv.3.0.weight",
        "bbox_head.reg_convs.1.conv.bias": "head.regression_head.conv.1.0.bias",
        "bbox_head.retina_cls.weight": "head.classification_head.cls_logits.weight",
        "bbox_head.retina_reg.bias": "head.regression_head.bbox_reg.bias",
    }
    for ours, name in pairs.items():
        assert torch.equal(model.state_dict()[ours], theirs[name]), ours


def test_torchvision_retinanet_v2_with_group_norm():
    theirs = torchvision_retinanet(norm_layer=lambda channels: torch.nn.GroupNorm(32, channels)).state_dict()
    model = full_width_retinanet({"type": "GN", "num_groups": 32})
    report = load_weights(model, theirs)
    assert not report.unexpected
    assert torch.equal(model.bbox_head.reg_convs[2].gn.weight, theirs["head.regression_head.conv.2.1.weight"])


def test_torchvision_backbone(tmp_path):
    from torchvision.models import resnet18

    theirs = resnet18(weights=None).state_dict()
    path = write(tmp_path / "resnet18.pth", theirs)
    model = full_width_retinanet()
    report = load_backbone_weights(model.backbone, path)
    assert report.format == "resnet-backbone" and report.matched == report.total == 100
    assert report.unexpected == ["fc.weight", "fc.bias"]
    assert torch.equal(model.backbone.layer4[1].conv2.weight, theirs["layer4.1.conv2.weight"])
