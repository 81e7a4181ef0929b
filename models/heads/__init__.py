"""Dense heads."""
from .atss import ATSSHead
from .dense import DenseHead, HeadOutputs
from .fcos import FCOSHead
from .gfl import GFLHead
from .retina import RetinaHead

HEADS = {"ATSSHead": ATSSHead, "FCOSHead": FCOSHead, "GFLHead": GFLHead, "RetinaHead": RetinaHead}

__all__ = ["HEADS", "ATSSHead", "DenseHead", "FCOSHead", "GFLHead", "HeadOutputs", "RetinaHead"]
