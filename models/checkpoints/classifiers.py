"""The names in files of image classifiers' weights, where these differ from the names in torchvision or timm."""
import re
from collections.abc import Iterable, Mapping

from torch import Tensor


def densenet_name(name: str) -> str:
    """torchvision's files of DenseNet weights have older names than its model."""
    return re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", r"\1", name)


def efficientnet_names(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """timm's name for each weight of EfficientNet-PyTorch, also for the files of EfficientNet-Lite with its names.

    That project counts all blocks, timm the blocks of each stage. A new stage starts where the width changes.
    """
    kinds = _by_block(weights)
    places, stage, block, width = {}, -1, 0, None
    for number in sorted(kinds):
        project = weights.get(f"_blocks.{number}._project_conv.weight")
        own = width if project is None else project.shape[:1]
        stage, block = (stage, block + 1) if own == width else (stage + 1, 0)
        places[number], width = f"blocks.{stage}.{block}", own

    def new_name(name: str) -> str:
        match = _BLOCK.match(name)
        if not match:
            layer, _, rest = name.partition(".")
            return f"{_OUTSIDE.get(layer, layer)}.{rest}"
        table = _EXPANDED if "_expand_conv" in kinds[int(match[1])] else _PLAIN
        return f"{places[int(match[1])]}.{table.get(match[2], match[2])}.{name[match.end():]}"

    return {name: new_name(name) for name in weights}


def _by_block(names: Iterable[str]) -> dict[int, set[str]]:
    """The layers of each block, by its number."""
    found: dict[int, set[str]] = {}
    for name in names:
        if match := _BLOCK.match(name):
            found.setdefault(int(match[1]), set()).add(match[2])
    return found


_BLOCK = re.compile(r"_blocks\.(\d{1,4})\.(\w+)\.")
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_ATTENTION = {"_depthwise_conv": "conv_dw", "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
_EXPANDED = _ATTENTION | {"_expand_conv": "conv_pw", "_bn0": "bn1", "_bn1": "bn2", "_project_conv": "conv_pwl",
                          "_bn2": "bn3"}
_PLAIN = _ATTENTION | {"_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # a first block does not widen
