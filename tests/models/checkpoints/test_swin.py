"""mmdet's Swin transformers load into torchvision's: the names, and the two layers with a different layout."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.swin_transformer import PatchMerging, ShiftedWindowAttention

from models import build_detector
from models.checkpoints.formats import parse_checkpoint
from models.weights import load_backbone_weights, load_weights

NODES = ["features.1", "features.3", "features.5"]
DIM = 6


def detector(seed):
    torch.manual_seed(seed)
    return build_detector({
        "backbone": {"type": "TorchvisionBackbone", "name": "swin_t", "nodes": NODES, "out_norm": True},
        "neck": {"type": "FPN", "out_channels": 16, "num_outs": 5, "add_extra_convs": "on_output"},
        "head": {"type": "RetinaHead", "num_classes": 3, "stacked_convs": 1, "feat_channels": 16, "anchor_generator": {
            "type": "AnchorGenerator", "octave_base_scale": 4, "scales_per_octave": 3, "ratios": [0.5, 1.0, 2.0],
            "strides": [4, 8, 16, 32, 64]}},
    })


def to_mmdet(name, value, first_norm):
    """One tensor of torchvision's Swin with mmdet's name and layout."""
    if re.match(r"features\.[246]\.(norm|reduction)\.", name):
        value = unfolded(value)
    rules = [
        (r"^features\.0\.0\.", "patch_embed.projection."),
        (r"^features\.0\.2\.", "patch_embed.norm."),
        (r"^features\.([1357])\.", lambda match: f"stages.{int(match[1]) // 2}.blocks."),
        (r"^features\.([246])\.", lambda match: f"stages.{int(match[1]) // 2 - 1}.downsample."),
        (r"\.attn\.", ".attn.w_msa."),
        (r"\.mlp\.0\.", ".ffn.layers.0.0."),
        (r"\.mlp\.3\.", ".ffn.layers.1."),
        (r"^norm(\d)\.", lambda match: f"norm{int(match[1]) + first_norm}."),
    ]
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name, value.unflatten(0, (49, 49)) if name.endswith("relative_position_index") else value


def unfolded(value):
    """Changes the last axis of a merging's tensor from the order of torchvision's grids to that of an unfold."""
    channels = value.shape[-1] // 4
    out = torch.empty_like(value)
    for row in range(2):
        for column in range(2):
            grid = 2 * column + row
            out[..., 2 * row + column :: 4] = value[..., grid * channels : (grid + 1) * channels]
    return out


@pytest.fixture(scope="module")
def source():
    model = detector(0)
    with torch.no_grad():
        for parameter in model.parameters():  # also norms, so that no two tensors are equal
            parameter.uniform_(-1, 1)
    return model


@pytest.fixture(scope="module")
def target():
    return detector(1)


@pytest.mark.parametrize("first_norm, wrap, kind", [
    (0, lambda state: {"meta": {"mmengine_version": "0.10.7"}, "state_dict": state, "message_hub": {}}, "mmdet3"),
    (1, lambda state: {"meta": {}, "state_dict": {f"student.{name}": v for name, v in state.items()}}, "fgd"),
])
def test_a_detector(source, target, first_norm, wrap, kind):
    state = {}
    for name, value in source.state_dict().items():
        own = name.removeprefix("backbone.")
        theirs, value = to_mmdet(own, value, first_norm) if own != name else (name, value)
        state[f"backbone.{theirs}" if own != name else name] = value
    assert state["backbone.stages.1.downsample.reduction.weight"].shape == (384, 768)
    assert f"backbone.norm{2 + first_norm}.bias" in state and "backbone.stages.0.blocks.1.ffn.layers.1.bias" in state
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    report = load_weights(target, wrap(state))
    assert report.format == kind and report.matched == report.total and not report.unexpected
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


def test_a_backbone(source, target):
    state = dict(to_mmdet(name, value, 0) for name, value in source.backbone.state_dict().items())
    state = {name: value for name, value in state.items() if not name.endswith("relative_position_index")}
    with torch.no_grad():
        for parameter in target.backbone.parameters():
            parameter.zero_()
    report = load_backbone_weights(target.backbone, {"model": state})
    assert report.matched == report.total and not report.unexpected  # the file need not have the position indices
    assert all(torch.equal(v, source.backbone.state_dict()[k]) for k, v in target.backbone.state_dict().items())


def translated(state):
    """The translation of a stage's tensors from mmdet's names. It recognises the format by the patches."""
    weights = parse_checkpoint({"backbone.patch_embed.projection.weight": torch.zeros(1), **state}).weights
    return {name: value for name, value in weights.items() if not name.startswith("backbone.features.0.")}


class UnfoldMerging(nn.Module):
    """Swin's patch merging with an unfold, as in mmdet, on maps (N, C, H, W); odd sides are padded at their end."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * channels), nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x):
        height, width = (-(-side // 2) for side in x.shape[2:])
        x = F.pad(x, (0, 2 * width - x.shape[3], 0, 2 * height - x.shape[2]))
        patches = F.unfold(x, kernel_size=2, stride=2).transpose(1, 2)
        return self.reduction(self.norm(patches)).transpose(1, 2).unflatten(2, (height, width))


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_patch_merging_computes_the_same(size):
    torch.manual_seed(0)
    theirs, ours = UnfoldMerging(DIM).double(), PatchMerging(DIM).double()
    nn.init.uniform_(theirs.norm.weight)
    nn.init.uniform_(theirs.norm.bias)
    state = translated({f"backbone.stages.1.downsample.{name}": v for name, v in theirs.state_dict().items()})
    ours.load_state_dict({name.removeprefix("backbone.features.4."): v for name, v in state.items()}, strict=True)
    x = torch.randn(2, DIM, *size, dtype=torch.float64)
    torch.testing.assert_close(ours(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), theirs(x))
    ours.load_state_dict(theirs.state_dict())
    assert not torch.allclose(ours(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), theirs(x))  # the order matters


def test_tables_of_biases_are_read_at_the_same_places():
    """mmdet adds two sequences of steps and mirrors the result; torchvision uses differences of coordinates."""
    side = 7
    steps = torch.cat([torch.arange(side) + row * (2 * side - 1) for row in range(side)])
    theirs = (steps[:, None] + steps[None, :]).flip(1)
    ours = ShiftedWindowAttention(DIM, [side, side], [0, 0], num_heads=1).relative_position_index
    assert torch.equal(ours.view(side**2, side**2), theirs)


def test_other_files_are_left_alone():
    state = {"backbone.stages.0.blocks.0.norm1.weight": torch.ones(1), "norm3.weight": torch.ones(1)}
    assert parse_checkpoint({"state_dict": state}).weights.keys() == state.keys()
