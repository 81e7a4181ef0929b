"""Knowledge distillation: build_distiller(cfg) gives a student that learns from frozen teachers."""
from .distiller import METHODS, Distiller, build_distiller
from .methods.base.method import Method

__all__ = ["METHODS", "Distiller", "Method", "build_distiller"]
