"""COCO-format data sets, their transforms, samplers and loader, and the built-in generated data set."""
from data.coco import CocoDataset
from data.config import DataConfig, Split, find_data
from data.errors import DataError, UnreadableImage
from data.loader import build_dataset, build_loader, collate
from data.samplers import EvalBatchSampler, TrainBatchSampler
from data.sources.scenes import generate_scenes

__all__ = ["CocoDataset", "DataConfig", "DataError", "EvalBatchSampler", "Split", "TrainBatchSampler",
           "UnreadableImage", "build_dataset", "build_loader", "collate", "find_data", "generate_scenes"]
