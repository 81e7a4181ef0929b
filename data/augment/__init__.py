"""Augmentation of training images with their boxes, from torchvision.transforms.v2.

An augmentation is a dataclass of settings. Its `p` is the probability that it is applied to an image, and its
`__call__(sample, another)` returns the new sample, where `another` reads another image (`data/augment/sample.py`). All
random numbers come from PyTorch's global generator; the data set seeds it for every image. To add an augmentation,
write its class and give it an entry in `AUGMENTATIONS`.
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from math import inf
from typing import Any

from data.augment.presets import PRESETS


class ImportedTable(Mapping[str, Callable]):
    """A table of classes that are imported when one of them is used: their modules import PyTorch, which takes seconds.

    Args:
        modules: for each name of a class, the name of its module in this folder.
    """

    def __init__(self, modules: Mapping[str, str]):
        self.modules = modules

    def __getitem__(self, name: str) -> Callable:
        return getattr(import_module(f"{__name__}.{self.modules[name]}"), name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)


AUGMENTATIONS = ImportedTable({
    "ColorJitter": "pixels", "RandomGrayscale": "pixels", "GaussianBlur": "pixels", "RandomErasing": "pixels",
    "RandomCrop": "geometry", "RandomZoomOut": "geometry", "RandomAffine": "geometry",
    "RandomVerticalFlip": "geometry", "RandomQuarterTurn": "geometry", "Mosaic": "mixing", "MixUp": "mixing"})


def build_augmentations(choice: str | list[dict]) -> list[Any]:
    """The augmentations of a preset's name or of a list of `{type: ..., argument: value}` mappings.

    Raises DataError, in one line, if an augmentation refuses an argument.
    """
    return [AUGMENTATIONS[entry["type"]](**{name: value for name, value in entry.items() if name != "type"})
            for entry in (PRESETS[choice] if isinstance(choice, str) else choice)]


def at_epoch(augmentations: Sequence[Any], epoch: int, epochs: int | None) -> tuple[list[Any], list[Any]]:
    """The augmentations of an epoch (the first is 0), without those that have stopped.

    Args:
        epochs: of the whole training; unknown, those that leave out its last tenth do not stop.
    Returns: those before the resize of the image, and those after it.
    """
    def stop(each: Any) -> float:
        given = getattr(each, "stop_epoch", inf)
        return given if given is not None else inf if epochs is None else epochs * 9 // 10

    used = [each for each in augmentations if epoch < stop(each)]
    before = [each for each in used if getattr(each, "before_resize", False)]
    return before, [each for each in used if each not in before]
