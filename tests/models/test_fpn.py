"""FPN: the same numbers as torchvision, and every variant of extra levels, norms, activations and upsampling."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from models import NECKS, ConfigError
from models.build import build
from models.fpn import FPN

CHANNELS = [4, 6, 8, 10]


def make_inputs(sizes=((24, 30), (12, 15), (6, 8), (3, 4))):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, c, *size, generator=g) for c, size in zip(CHANNELS, sizes)]


def make(num_outs, **args):
    torch.manual_seed(0)
    fpn = FPN(CHANNELS, 5, num_outs, **args)
    for name, value in fpn.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(value)
    return fpn


@pytest.mark.parametrize("extra", ["off", "on_input"])
def test_equals_torchvision(extra):
    inputs = dict(enumerate(make_inputs()))
    blocks = LastLevelMaxPool() if extra == "off" else LastLevelP6P7(CHANNELS[-1], 5)
    theirs = FeaturePyramidNetwork(CHANNELS, 5, extra_blocks=blocks)
    ours = make(5 if extra == "off" else 6, add_extra_convs=extra, relu_before_extra_convs=True)
    state = {}
    for i in range(4):
        for kind in ("weight", "bias"):
            state[f"lateral_convs.{i}.conv.{kind}"] = getattr(theirs.inner_blocks[i][0], kind)
            state[f"fpn_convs.{i}.conv.{kind}"] = getattr(theirs.layer_blocks[i][0], kind)
            if extra == "on_input" and i < 2:
                state[f"fpn_convs.{i + 4}.conv.{kind}"] = getattr(getattr(blocks, f"p{i + 6}"), kind)
    ours.load_state_dict(state, strict=True)
    for mine, other in zip(ours(list(inputs.values())), theirs(inputs).values(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("extra", ["on_input", "on_lateral", "on_output"])
def test_extra_levels(extra, relu):
    inputs = make_inputs()
    fpn = make(5, start_level=1, add_extra_convs=extra, relu_before_extra_convs=relu)
    outs = fpn(inputs)
    source = {"on_input": inputs[-1], "on_lateral": fpn.lateral_convs[-1](inputs[-1]), "on_output": outs[2]}[extra]
    torch.testing.assert_close(outs[3], fpn.fpn_convs[3](source))  # no activation before the first
    torch.testing.assert_close(outs[4], fpn.fpn_convs[4](F.relu(outs[3]) if relu else outs[3]))
    assert [tuple(x.shape[2:]) for x in outs] == [(12, 15), (6, 8), (3, 4), (2, 2), (1, 1)]


@pytest.mark.parametrize("off", ["off", False])
def test_levels_beyond_the_backbone_are_pooled_when_extra_convolutions_are_off(off):
    fpn = make(6, add_extra_convs=off)
    outs = fpn(make_inputs())
    assert len(fpn.fpn_convs) == 4 and len(outs) == 6
    assert torch.equal(outs[4], outs[3][:, :, ::2, ::2]) and torch.equal(outs[5], outs[4][:, :, ::2, ::2])


def test_true_means_on_input():
    inputs = make_inputs()
    for mine, other in zip(make(5, add_extra_convs=True)(inputs), make(5, add_extra_convs="on_input")(inputs)):
        assert torch.equal(mine, other)


def test_end_level_leaves_out_the_coarsest():
    inputs = make_inputs()
    fpn = make(2, start_level=1, end_level=2)
    outs = fpn(inputs)
    assert [tuple(x.shape[2:]) for x in outs] == [(12, 15), (6, 8)] and len(fpn.lateral_convs) == 2
    inputs[0] += 1
    inputs[3] += 1
    for mine, other in zip(fpn(inputs), outs):
        assert torch.equal(mine, other)


def test_norm_activation_and_no_norm_on_lateral():
    fpn = make(5, norm_cfg={"type": "GN", "num_groups": 5}, act_cfg="ReLU", add_extra_convs="on_output")
    every = [*fpn.lateral_convs, *fpn.fpn_convs]
    assert all(isinstance(conv.gn, nn.GroupNorm) and conv.conv.bias is None for conv in every)
    assert all((out >= 0).all() and (out == 0).any() for out in fpn(make_inputs()))
    bare = make(5, norm_cfg="BN", no_norm_on_lateral=True, add_extra_convs="on_output")
    assert all(conv.norm_name is None and conv.conv.bias is not None for conv in bare.lateral_convs)
    assert all(isinstance(conv.bn, nn.BatchNorm2d) for conv in bare.fpn_convs)
    assert all((out < 0).any() for out in bare(make_inputs()))


def test_upsampling_by_factor_and_by_size():
    even = make_inputs([(24, 32), (12, 16), (6, 8), (3, 4)])
    by_factor, by_size = make(4, upsample_cfg={"scale_factor": 2}), make(4)
    for mine, other in zip(by_factor(even), by_size(even)):
        torch.testing.assert_close(mine, other)
    with pytest.raises(RuntimeError):
        by_factor(make_inputs())  # 15 is not twice 8
    smooth = make(4, upsample_cfg={"mode": "bilinear"})(make_inputs())
    assert not torch.allclose(smooth[0], by_size(make_inputs())[0])


def test_initialisation_is_xavier_uniform():
    torch.manual_seed(0)
    for conv in (FPN([64, 64], 64, 2).fpn_convs[0].conv, FPN([64, 64], 64, 2).lateral_convs[0].conv):
        limit = (6 / (2 * 64 * conv.kernel_size[0] ** 2)) ** 0.5
        assert conv.weight.abs().max() <= limit and not conv.bias.any()
        assert conv.weight.std().item() == pytest.approx(limit / 3 ** 0.5, rel=0.05)


@pytest.mark.parametrize("args, key", [
    ({"num_outs": 3}, "num_outs"), ({"num_outs": 3, "end_level": 1}, "num_outs"),
    ({"num_outs": 1, "start_level": 2, "end_level": 1}, "end_level"),
    ({"num_outs": 4, "start_level": 4}, "start_level"),
    ({"num_outs": 4, "act_cfg": "Relu"}, "neck.act_cfg: must be one of ReLU, .*Relu"),
    ({"num_outs": 4, "act_cfg": {"type": "LeakyReLU", "negative_slope": -1}}, "act_cfg.negative_slope: must be at lea"),
    ({"num_outs": 4, "upsample_cfg": {"mode": "linear"}}, "upsample_cfg.mode: must be one of nearest, "),
    ({"num_outs": 4, "upsample_cfg": {"align_corners": True}}, "upsample_cfg.align_corners: needs the mode bilinear")])
def test_refuses(args, key):
    with pytest.raises(ConfigError, match=key):
        build({"type": "FPN", "out_channels": 5, **args}, NECKS, "neck", in_channels=CHANNELS)


def test_number_of_inputs_is_checked():
    with pytest.raises(ValueError, match="4 backbone levels but got 3"):
        make(4)(make_inputs()[:3])
