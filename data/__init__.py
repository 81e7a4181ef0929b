"""COCO-format data sets, their transforms, samplers and loader, and the built-in generated data set.

A name is imported when it is first used, so that what needs no PyTorch does not wait seconds for it.
"""
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.coco.dataset import CocoDataset
    from data.config import DataConfig, Split, find_data
    from data.errors import DataError, UnreadableImage
    from data.loader import build_dataset, build_loader, collate
    from data.samplers import EvalBatchSampler, TrainBatchSampler
    from data.sources.scenes import generate_scenes

__all__ = ["CocoDataset", "DataConfig", "DataError", "EvalBatchSampler", "Split", "TrainBatchSampler",
           "UnreadableImage", "build_dataset", "build_loader", "collate", "find_data", "generate_scenes"]
_MODULES = {"coco.dataset": ["CocoDataset"], "config": ["DataConfig", "Split", "find_data"],
            "errors": ["DataError", "UnreadableImage"], "loader": ["build_dataset", "build_loader", "collate"],
            "samplers": ["EvalBatchSampler", "TrainBatchSampler"], "sources.scenes": ["generate_scenes"]}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
