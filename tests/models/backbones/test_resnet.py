"""ResNet: shapes, the same numbers and names as torchvision, frozen parts, initialisation."""
import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import BACKBONES, ConfigError
from models.backbones.resnet import DEPTHS, BasicBlock, Bottleneck, ResNet
from models.build import build
from models.folding import PickingConv2d


def randomised(model):
    """Set every parameter and running statistic to random values, so that each has an effect."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(0.1 + 0.1 * torch.rand(value.shape, generator=g))
        for conv in model.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, generator=g)
    return model


def torchvision_features(model, x):
    """Outputs of the four stages of torchvision's ResNet."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    outs = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = layer(x)
        outs.append(x)
    return outs


@pytest.mark.parametrize("depth", DEPTHS)
def test_shapes(depth):
    model = ResNet(depth, base_channels=4, stem_channels=6).eval()
    expansion = 1 if depth < 50 else 4
    with torch.no_grad():
        outs = model(torch.zeros(2, 3, 64, 96))
    assert model.out_channels == [4 * expansion * 2 ** i for i in range(4)] and model.out_strides == [4, 8, 16, 32]
    assert [tuple(x.shape) for x in outs] == [
        (2, channels, 64 // stride, 96 // stride) for channels, stride in zip(model.out_channels, model.out_strides)]
    assert model.conv1.out_channels == 6


@pytest.mark.parametrize("depth", [18, 50])
def test_equals_torchvision(depth):
    ours = ResNet(depth)
    theirs = randomised(getattr(torchvision.models, f"resnet{depth}")()).eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    ours.load_state_dict(state, strict=True)  # the same names and shapes
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for out, expected in zip(ours.eval()(x), torchvision_features(theirs, x), strict=True):
            torch.testing.assert_close(out, expected)


def test_names_of_every_depth_are_torchvisions():
    for depth in DEPTHS:
        with torch.device("meta"):
            theirs = getattr(torchvision.models, f"resnet{depth}")().state_dict()
        ours = ResNet(depth, base_channels=1).state_dict().keys()
        assert list(ours) == [key for key in theirs if not key.startswith("fc.")]


@pytest.mark.parametrize("name, args", [
    ("resnext50_32x4d", {"depth": 50, "groups": 32, "base_width": 4}),
    ("resnext101_64x4d", {"depth": 101, "groups": 64, "base_width": 4}),
    ("wide_resnet50_2", {"depth": 50, "base_width": 128})])
def test_groups_equal_torchvisions_resnext(name, args):
    with torch.device("meta"):  # no initialisation: the weights are set below and loaded into ours
        theirs, ours = torchvision.models.get_model(name), ResNet(**args)
    theirs = theirs.to_empty(device="cpu").eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in theirs.state_dict().values():
            if value.dim() == 4:  # a range with which a layer keeps the scale of its input
                value.uniform_(-1, 1, generator=g).mul_(2.4 / value[0].numel() ** 0.5)
            elif value.is_floating_point():
                value.uniform_(0.5, 1, generator=g)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    ours.load_state_dict(state, strict=True, assign=True)
    x = torch.randn(1, 3, 64, 64, generator=g)
    with torch.no_grad():
        for out, expected in zip(ours.eval()(x), torchvision_features(theirs, x), strict=True):
            assert 0.1 < expected.std() < 1e4
            torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4 * expected.std().item())


def test_a_resnext_shrinks_with_its_base_channels():
    model = ResNet(50, base_channels=8, groups=4, base_width=2)
    assert [getattr(model, f"layer{i}")[0].conv2.out_channels for i in range(1, 5)] == [8, 16, 32, 64]
    assert model.layer1[0].conv2.groups == 4 and model.out_channels == [32, 64, 128, 256]
    assert ResNet(50, base_channels=8, groups=2).layer1[0].conv2.out_channels == 8  # two groups of 4, as in mmdet


@pytest.mark.parametrize("style, strides", [("pytorch", (1, 2)), ("caffe", (2, 1))])
def test_style_says_where_a_bottleneck_strides(style, strides):
    model = ResNet(50, base_channels=4, style=style)
    for layer in (model.layer2, model.layer3, model.layer4):
        assert (layer[0].conv1.stride[0], layer[0].conv2.stride[0]) == strides
        assert layer[0].downsample[0].stride == (2, 2)
        assert all(conv.stride == (1, 1) for conv in (layer[1].conv1, layer[1].conv2))
    assert model(torch.zeros(1, 3, 64, 64))[-1].shape[-2:] == (2, 2)


def test_out_indices_and_num_stages():
    model = ResNet(18, base_channels=4, out_indices=(0, 2), num_stages=3)
    assert [x.shape[1:] for x in model(torch.zeros(1, 3, 64, 64))] == [(4, 16, 16), (16, 4, 4)]
    assert model.out_channels == [4, 16] and model.out_strides == [4, 16] and not hasattr(model, "layer4")


@pytest.mark.parametrize("frozen", range(-1, 5))
def test_frozen_stages(frozen):
    model = ResNet(18, base_channels=4, frozen_stages=frozen, norm_eval=False).train()
    parts = [[model.conv1, model.bn1]] + [[getattr(model, f"layer{i}")] for i in range(1, 5)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(2, 3, 64, 64))
    for i, part in enumerate(parts):
        for module in part:
            assert all(p.requires_grad == (i > frozen) for p in module.parameters())
            assert all(m.training == (i > frozen) for m in module.modules())
    for key, value in model.state_dict().items():
        if "running" in key:
            stage = int(key[5]) if key.startswith("layer") else 0
            assert torch.equal(value, before[key]) == (stage <= frozen), key


@pytest.mark.parametrize("norm_eval", [True, False])
def test_norm_eval(norm_eval):
    model = ResNet(18, base_channels=4, norm_eval=norm_eval).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert model.training and all(norm.training != norm_eval for norm in norms)
    assert all(norm.weight.requires_grad for norm in norms)  # they learn either way
    assert not any(norm.training for norm in model.eval().modules())


def test_frozen_batch_norm_never_learns():
    model = ResNet(18, base_channels=4, norm_cfg="FrozenBN", norm_eval=False).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sum(x.sum() for x in model(torch.randn(2, 3, 64, 64))).backward()
    assert norms and not any(norm.training or norm.weight.requires_grad for norm in norms)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.conv1.weight.grad is not None
    plain = ResNet(18, base_channels=4)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_norm_settings_reach_the_layers():
    model = ResNet(18, base_channels=4, norm_cfg={"type": "BN", "eps": 1e-3, "momentum": 0.3, "requires_grad": False})
    norm = model.layer1[0].bn1
    assert norm.eps == 1e-3 and norm.momentum == 0.3 and not norm.weight.requires_grad
    group = ResNet(18, base_channels=4, norm_cfg={"type": "GN", "num_groups": 2}).layer1[0].bn1
    assert isinstance(group, nn.GroupNorm) and group.num_groups == 2


@pytest.mark.parametrize("depth, block, last", [(18, BasicBlock, "bn2"), (50, Bottleneck, "bn3")])
def test_initialisation(depth, block, last):
    torch.manual_seed(0)
    model = ResNet(depth, base_channels=16)
    blocks = [m for m in model.modules() if isinstance(m, block)]
    assert blocks and not any(getattr(b, last).weight.any() for b in blocks)
    assert all((b.bn1.weight == 1).all() for b in blocks)
    for conv in (model.conv1, model.layer2[0].conv2, model.layer4[1].conv1):
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert (getattr(ResNet(depth, base_channels=4, zero_init_residual=False).layer1[0], last).weight == 1).all()


@pytest.mark.parametrize("args, key", [
    ({"depth": 20}, "depth: must be one of 18, 34, 50, 101, 152, not an integer"),
    ({"depth": 18, "frozen_stages": 5}, "frozen_stages"),
    ({"depth": 18, "out_indices": (0, 4)}, "out_indices"), ({"depth": 18, "out_indices": []}, "out_indices"),
    ({"depth": 18, "out_indices": [2, 1]}, r"out_indices.*each once and in this order, not \[2, 1\]"),
    ({"depth": 18, "out_indices": [0, 0]}, "out_indices"), ({"depth": 18, "num_stages": 2}, "out_indices.*0..1"),
    ({"depth": 18, "num_stages": 2, "frozen_stages": 3}, "frozen_stages: must be from -1 to num_stages, 2, not 3"),
    ({"depth": 18, "groups": 32, "base_width": 4}, "groups.*bottlenecks of depth 50 and more, not depth 18"),
    ({"depth": 34, "base_width": 4}, "bottlenecks"), ({"depth": 50, "groups": 0}, "groups: must be at least 1, not 0"),
    ({"depth": 50, "base_width": 0}, "base_width: must be at least 1, not 0"),
    ({"depth": 18, "norm_cfg": "BM"}, 'norm_cfg: must be one of BN, SyncBN, FrozenBN, GN, not text .*BM'),
    ({"depth": 18, "norm_cfg": None}, "norm_cfg"), ({"depth": 18, "norm_cfg": {"type": "FrozenBN", "eps": -1}}, "eps"),
    ({"depth": 18, "norm_cfg": {"type": "FrozenBN", "requires_grad": True}}, "requires_grad: must be one of false"),
    ({"depth": 18, "norm_cfg": {"type": "BN", "epsilon": 1}}, 'did you mean "eps"'),
    ({"depth": 18, "base_channels": 4, "norm_cfg": {"type": "GN", "num_groups": 3}}, "3 groups")])
def test_refuses(args, key):
    with pytest.raises(ConfigError, match=key):
        build({"type": "ResNet", **args}, BACKBONES, "backbone")


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("norm_eval", [False, True])
@pytest.mark.parametrize("depth, style, base, picking", [(18, "pytorch", 8, 1), (18, "pytorch", 16, 0),
                                                         (50, "caffe", 2, 2)])
def test_no_strided_pointwise_convolution_of_few_channels_has_a_gradient(depth, style, base, picking, norm_eval):
    """oneDNN writes beyond its memory there (uxlfoundation/oneDNN#6035), and the process crashes some time later."""
    given = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator is torch.ops.aten.convolution_backward.default:
                weight, stride = args[2], args[4]
                given.append(tuple(weight.shape[2:]) == (1, 1) and max(stride) > 1 and weight.shape[1] < 16)
            return operator(*args, **kwargs or {})

    torch.manual_seed(0)
    model = randomised(ResNet(depth, base, style=style, norm_eval=norm_eval)).train().to(
        memory_format=torch.channels_last)
    x = torch.randn(2, 3, 62, 70)
    outs = model(x)
    with Watch():
        sum(out.square().mean() for out in outs).backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    assert len(given) > 15 and not any(given)
    found = [conv for conv in model.modules() if isinstance(conv, PickingConv2d)]
    assert len(found) == picking
    for conv in found:  # the same as PyTorch's convolution, without oneDNN
        conv.__class__ = nn.Conv2d
    model.zero_grad()
    with torch.backends.mkldnn.flags(enabled=False):
        expected = model(x)
        sum(out.square().mean() for out in expected).backward()
    torch.testing.assert_close(outs, expected, rtol=1e-4, atol=1e-4)
    for name, value in model.named_parameters():
        torch.testing.assert_close(gradients[name], value.grad, rtol=1e-3,
                                   atol=1e-3 * value.grad.abs().max().item() + 1e-5)
