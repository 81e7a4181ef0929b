"""torchvision's models as backbones: the same numbers, layouts, frozen parts, use in a detector, weights."""
import copy

import pytest
import torch
import torchvision
from small_models import make_batch, small_config
from torch import nn
from torchvision.ops import StochasticDepth

from models import BACKBONES, ConfigError, build_detector
from models.backbones.torchvision import TorchvisionBackbone
from models.build import build
from models.checkpoints import sources as checkpoint_sources
from models.checkpoints.formats import parse_checkpoint
from models.weights import CheckpointError, load_weights

MOBILENET = ["features.1", "features.3", "features.8", "features.11"]  # of mobilenet_v3_small
SWIN = ["features.1", "features.3", "features.5", "features.7"]


def images(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def hooked(model, nodes, x):
    """Outputs of a model's modules, in their own layout."""
    seen, hooks = {}, []
    for node in nodes:
        def keep(module, args, output, node=node):
            seen[node] = output
        hooks.append(model.get_submodule(node).register_forward_hook(keep))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return [seen[node] for node in nodes]


@pytest.mark.parametrize("name, nodes, channels, strides", [
    ("swin_t", SWIN, [96, 192, 384, 768], [4, 8, 16, 32]),
    ("mobilenet_v3_small", MOBILENET, [16, 24, 48, 96], [4, 8, 16, 32]),
    ("regnet_x_400mf", ["trunk_output.block2", "trunk_output.block4"], [64, 400], [8, 32])])
def test_equals_torchvision(name, nodes, channels, strides):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name).eval()
    ours = TorchvisionBackbone(name, nodes).eval()
    assert ours.state_dict().keys() < theirs.state_dict().keys()  # their names, and no classifier
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in ours.state_dict()}, strict=True)
    assert ours.out_channels == channels and ours.out_strides == strides
    x = images(2, 3, 96, 160)
    with torch.no_grad():
        outs = ours(x)
    for out, expected, c, stride in zip(outs, hooked(theirs, nodes, x), channels, strides, strict=True):
        assert out.shape == (2, c, 96 // stride, 160 // stride) and out.is_contiguous()
        torch.testing.assert_close(out, expected.permute(0, 3, 1, 2) if name == "swin_t" else expected, rtol=0, atol=0)


def test_building_changes_no_statistics_and_draws_no_more_than_the_model():
    torch.manual_seed(0)
    torchvision.models.mobilenet_v3_small()
    expected = torch.rand(1)
    torch.manual_seed(0)
    model = TorchvisionBackbone("mobilenet_v3_small", MOBILENET, out_norm=True)
    assert torch.rand(1) == expected and model.training
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.num_batches_tracked or norm.running_mean.any() for norm in norms)


@pytest.mark.parametrize("norm_eval", [True, False])
def test_modes_and_what_is_frozen(norm_eval):
    model = TorchvisionBackbone("efficientnet_b0", ["features.2", "features.3"], frozen=("features.0", "features.2.0"),
                                norm_eval=norm_eval)
    for mode in (True, False, True):
        model.train(mode)
        for name, module in model.named_modules():
            frozen = name.startswith(("features.0.", "features.2.0."))
            norm = isinstance(module, nn.BatchNorm2d)
            if name.startswith("features.") and isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.SiLU)):
                assert module.training == (mode and not frozen and not (norm and norm_eval)), name
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sum(out.sum() for out in model(images(2, 3, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("features.0.", "features.2.0."))
        assert parameter.requires_grad != frozen and (parameter.grad is None) == frozen, name
        assert frozen or parameter.grad.isfinite().all()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert bool(moved) != norm_eval and not any(k.startswith(("features.0.", "features.2.0.")) for k in moved)


def test_stochastic_depth_is_of_training_and_of_what_is_not_frozen():
    def repeats(model):
        torch.manual_seed(1)
        first, second = (model(images(8, 3, 32, 32))[0] for _ in range(2))
        return torch.equal(first, second)

    def often(model):
        for module in model.modules():
            if isinstance(module, StochasticDepth):
                module.p = 0.5
        return model

    model = often(TorchvisionBackbone("efficientnet_b0", ["features.3"]))
    assert not repeats(model.train()) and repeats(model.eval()) and not repeats(model.train())
    assert repeats(often(TorchvisionBackbone("efficientnet_b0", ["features.3"], frozen=("features",))).train())


@pytest.mark.parametrize("name, nodes", [("swin_t", SWIN[:2]), ("mobilenet_v3_small", MOBILENET[:2])])
def test_output_norms(name, nodes):
    torch.manual_seed(0)
    model = TorchvisionBackbone(name, nodes, out_norm=True).eval()
    x = images(1, 3, 32, 64)
    outs, model.out_norm = model(x), False
    for i, (out, raw) in enumerate(zip(outs, model(x), strict=True)):
        centred = raw - raw.mean(1, keepdim=True)
        expected = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert out.is_contiguous()
        norm = getattr(model, f"norm{i}")
        (grad,) = torch.autograd.grad(out.pow(2).sum(), norm.weight)
        assert norm.weight.numel() == model.out_channels[i] and (grad > 0).all()


@pytest.mark.parametrize("name, nodes", [("swin_t", SWIN[:2]), ("mobilenet_v3_small", MOBILENET)])
def test_a_copy_is_its_own_model_in_any_precision(name, nodes):
    model = TorchvisionBackbone(name, nodes, frozen=("features.0",)).eval()
    double = copy.deepcopy(model).double()
    assert double.state_dict().keys() == model.state_dict().keys() and double.frozen == ("features.0",)
    x = images(1, 3, 64, 32)
    with torch.no_grad():
        before = model(x)
        for out, expected in zip(double(x.double()), before, strict=True):
            assert out.dtype == torch.float64
            torch.testing.assert_close(out.float(), expected, rtol=1e-3, atol=1e-4)
        for value in double.parameters():
            value.zero_()
        assert not any(out.any() for out in double.train()(x.double()))
        assert all(torch.equal(a, b) for a, b in zip(model(x), before))


@pytest.mark.parametrize("args, message", [
    ({"name": "mobilenet_v3_smal"}, 'name: .*no classification model.*did you mean "mobilenet_v3_small"'),
    ({"nodes": []}, "nodes: must be a list with at least one entry"),
    ({"nodes": ["features.99"]}, 'nodes: .*no node "features.99"; did you mean "features.9"'),
    ({"nodes": ["layer1"]}, 'no node "layer1"; valid: .*features.0, features.1, '),
    ({"nodes": ["features.3", "features.1"]}, r"nodes: must go from fine to coarse, but have strides \[8, 4\]"),
    ({"nodes": ["features.2", "features.3"]}, r"strides \[8, 8\]"),
    ({"nodes": ["features.1"] * 2}, "nodes: name the same output more than once: features.1, features.1"),
    ({"nodes": ["avgpool"]}, r'nodes: "avgpool" gives \[1, 576, 1, 1\] for an image of 64x96, not a map'),
    ({"nodes": ["classifier"]}, 'nodes: "classifier" gives .*not a map'),
    ({"nodes": ["features.1"], "frozen": ("features.2",)}, 'frozen: .*no module "features.2"; did you mean "features.'),
    ({"name": "vit_b_16", "nodes": ["encoder"]}, "name: vit_b_16 cannot run on an image of 64x96"),
    ({"name": "squeezenet1_1", "nodes": ["features.5"]}, "not a map with stride 1, 2, 4, 8, 16 or 32")])
def test_refuses(args, message):
    with pytest.raises(ConfigError, match=message):
        build({"type": "TorchvisionBackbone", "name": "mobilenet_v3_small", "nodes": MOBILENET} | args, BACKBONES,
              "backbone")


def detector_config(**backbone):
    backbone = {"type": "TorchvisionBackbone", "name": "mobilenet_v3_small", "nodes": MOBILENET} | backbone
    return small_config() | {"backbone": backbone}


def test_in_a_detector():
    cfg = detector_config(frozen=["features.0"], weights="torchvision://mobilenet_v3_small")
    torch.manual_seed(0)
    detector = build_detector(cfg, pretrained=False).double().train()
    assert detector.neck.in_channels == [16, 24, 48, 96]  # start_level 1 leaves out the first
    batch = make_batch(sizes=((96, 160), (70, 110)))
    losses = detector.loss(*batch)
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        if not name.startswith("backbone.features.0."):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    torch.manual_seed(1)
    other = build_detector(cfg, pretrained=False).double().train()
    report = load_weights(other, {"format": "densekd", "model": detector.state_dict()})
    assert report.format == "densekd" and report.matched == report.total and not report.unexpected
    again = other.loss(*batch)
    assert all(torch.equal(losses[k], again[k]) for k in losses)
    assert len(detector.eval().predict(*batch)) == 2


@pytest.mark.parametrize("args, key", [
    ({"nodes": "features.1"}, "model.backbone.nodes"), ({"nodes": [1]}, "model.backbone.nodes.0"),
    ({"frozen": [None]}, "model.backbone.frozen.0"), ({"out_norm": 1}, "model.backbone.out_norm"),
    ({"depth": 50}, "model.backbone.depth"), ({"nodes": ["features.99"]}, "model.backbone.nodes"),
    ({"name": "resnet"}, "model.backbone.name")])
def test_configuration_errors_name_their_key(args, key):
    with pytest.raises(ConfigError) as caught:
        build_detector(detector_config(**args))
    assert caught.value.key == key


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_of_a_classifier(tmp_path, reported):
    torch.manual_seed(0)
    source = torchvision.models.mobilenet_v3_small()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = TorchvisionBackbone("mobilenet_v3_small", MOBILENET, weights=str(tmp_path / "w.pth"), out_norm=True)
    for name, value in model.state_dict().items():
        assert name.startswith("norm") or torch.equal(value, source.state_dict()[name]), name
    printed = reported()
    assert "left as they were: 8 (norm0.weight" in printed and "in the file only" in printed
    assert "classifier" in str(load_weights(model, source.state_dict(), allow_missing="norm*").unexpected)
    detector = build_detector(detector_config(), pretrained=False)
    load_weights(detector, source.state_dict(), allow_missing=["neck.*", "bbox_head.*"])
    assert torch.equal(detector.backbone.features.get_submodule("0.0").weight, source.features[0][0].weight)


def test_incomplete_weights_are_refused():
    state = torchvision.models.mobilenet_v3_small().state_dict()
    del state["features.0.0.weight"]
    with pytest.raises(CheckpointError, match=r"missing 1 \(features.0.0.weight\)"):
        load_weights(TorchvisionBackbone("mobilenet_v3_small", MOBILENET), state)


def test_default_weights_are_the_ones_that_torchvision_recommends(monkeypatch, tmp_path):
    urls, source = [], torchvision.models.mobilenet_v3_large()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    monkeypatch.setattr(checkpoint_sources, "_download", lambda url: urls.append(url) or str(tmp_path / "w.pth"))
    model = TorchvisionBackbone("mobilenet_v3_large", ["features.3"], weights="DEFAULT")
    assert urls == ["https://download.pytorch.org/models/mobilenet_v3_large-5c1a4163.pth"]  # version 2
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_old_names_of_densenet():
    with torch.device("meta"):
        names = torchvision.models.densenet121().state_dict()
    old = {name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value for name, value in names.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    for given in (old, names):
        checkpoint = parse_checkpoint(given)
        assert checkpoint.format == "densenet-backbone" and checkpoint.weights.keys() == names.keys()
