"""Names in the files of image classifiers."""
import pytest
import torch

from models.checkpoints.formats import parse_checkpoint


def block(number, width, expanded=True, attention=False):
    layers = ["_expand_conv.weight", "_bn0.weight"] if expanded else []
    layers += ["_depthwise_conv.weight", "_bn1.running_mean", "_bn2.bias"]
    layers += ["_se_reduce.bias", "_se_expand.weight"] if attention else []
    named = {f"_blocks.{number}.{layer}": torch.zeros(1) for layer in layers}
    return named | {f"_blocks.{number}._project_conv.weight": torch.zeros(width, 4, 1, 1)}


def test_efficientnet_pytorch():
    """Blocks are counted within their stages, which differ in width; eleven blocks, as 10 comes before 2 as text."""
    widths = [16, 24, 24, 40, 40, 40, 80, 80, 112, 192, 320]
    weights = {"_conv_stem.weight": torch.zeros(1), "_bn0.weight": torch.zeros(1), "_bn1.weight": torch.zeros(1),
               "_conv_head.weight": torch.zeros(1), "_fc.bias": torch.zeros(1)}
    for number in sorted(range(11), key=str):
        weights |= block(number, widths[number], expanded=number > 0, attention=number == 4)
    checkpoint = parse_checkpoint(weights)
    assert checkpoint.format == "efficientnet-backbone"
    names = dict(zip(weights, checkpoint.weights))
    assert {old: names[old] for old in names if not old.startswith("_blocks")} == {
        "_conv_stem.weight": "conv_stem.weight", "_bn0.weight": "bn1.weight", "_conv_head.weight": "conv_head.weight",
        "_bn1.weight": "bn2.weight", "_fc.bias": "classifier.bias"}
    first = {old.removeprefix("_blocks.0."): new for old, new in names.items() if old.startswith("_blocks.0.")}
    assert first == {"_depthwise_conv.weight": "blocks.0.0.conv_dw.weight", "_bn2.bias": "blocks.0.0.bn2.bias",
                     "_bn1.running_mean": "blocks.0.0.bn1.running_mean",
                     "_project_conv.weight": "blocks.0.0.conv_pw.weight"}
    fifth = {old.removeprefix("_blocks.4."): new for old, new in names.items() if old.startswith("_blocks.4.")}
    assert fifth == {
        "_expand_conv.weight": "blocks.2.1.conv_pw.weight", "_bn0.weight": "blocks.2.1.bn1.weight",
        "_depthwise_conv.weight": "blocks.2.1.conv_dw.weight", "_bn1.running_mean": "blocks.2.1.bn2.running_mean",
        "_bn2.bias": "blocks.2.1.bn3.bias", "_project_conv.weight": "blocks.2.1.conv_pwl.weight",
        "_se_reduce.bias": "blocks.2.1.se.conv_reduce.bias", "_se_expand.weight": "blocks.2.1.se.conv_expand.weight"}
    places = [names[f"_blocks.{i}._depthwise_conv.weight"].removesuffix(".conv_dw.weight") for i in range(11)]
    assert places == [f"blocks.{place}" for place in "0.0 1.0 1.1 2.0 2.1 2.2 3.0 3.1 4.0 5.0 6.0".split()]


@pytest.mark.parametrize("model", ["efficientnet_b0", "tf_efficientnet_lite0"])
def test_the_names_are_those_of_timm(model):
    """Every name and shape of timm's model comes out, from names that the other project's rule makes of them."""
    timm = pytest.importorskip("timm", reason="needs the extra timm")
    wanted, theirs, number = timm.create_model(model), {}, -1
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    for child, new in outside.items():
        theirs |= {f"{new}.{name}": value for name, value in wanted.get_submodule(child).state_dict().items()}
    for stage in wanted.blocks:
        for each in stage:
            number += 1
            layers = {"conv_dw": "_depthwise_conv", "se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
            if hasattr(each, "conv_pwl"):
                layers |= {"conv_pw": "_expand_conv", "bn1": "_bn0", "bn2": "_bn1", "conv_pwl": "_project_conv",
                           "bn3": "_bn2"}
            else:
                layers |= {"bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
            for name, value in each.state_dict().items():
                layer = next(layer for layer in layers if name.startswith(f"{layer}."))
                theirs[f"_blocks.{number}.{layers[layer]}.{name.removeprefix(f'{layer}.')}"] = value
    found = parse_checkpoint(theirs).weights
    assert found.keys() == wanted.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.state_dict().items())


def test_a_damaged_efficientnet_is_no_crash():
    weights = block(0, 16, expanded=False) | block(1, 24)
    del weights["_blocks.0._project_conv.weight"]
    weights["_blocks.1._project_conv.weight"] = torch.tensor(1.0)
    assert "blocks.0.0.conv_dw.weight" in parse_checkpoint(weights).weights


def test_a_stem_alone_does_not_make_a_detectron2_backbone():
    weights = {"stem.conv1.c.weight": torch.zeros(1)}  # RepViT in timm
    assert parse_checkpoint(weights).format == "state-dict" and parse_checkpoint(weights).weights == weights
