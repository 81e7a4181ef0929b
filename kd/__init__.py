"""Knowledge distillation: build_distiller(cfg) gives a student that learns from frozen teachers."""
from .build import build_distiller
from .config import load_config
from .distiller import Distiller
from .inference.loaded import load_detector
from .methods import METHODS
from .methods.base import Method

__all__ = ["METHODS", "Distiller", "Method", "build_distiller", "load_config", "load_detector"]
