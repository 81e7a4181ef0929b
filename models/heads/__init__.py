"""Dense heads."""
from .dense import DenseHead, HeadOutputs
from .gfl import GFLHead
from .retina import RetinaHead

HEADS = {"GFLHead": GFLHead, "RetinaHead": RetinaHead}

__all__ = ["HEADS", "DenseHead", "GFLHead", "HeadOutputs", "RetinaHead"]
