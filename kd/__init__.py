"""Knowledge distillation: build_distiller(cfg) gives a student that learns from frozen teachers.

A name is imported when it is first used, so that `import kd` does not wait seconds for PyTorch.
"""
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .build import build_distiller
    from .config import load_config
    from .distiller import Distiller
    from .inference.loaded import load_detector
    from .methods import METHODS
    from .methods.base import Method

__all__ = ["METHODS", "Distiller", "Method", "build_distiller", "load_config", "load_detector"]
_MODULES = {"METHODS": "methods", "Distiller": "distiller", "Method": "methods.base", "build_distiller": "build",
            "load_config": "config", "load_detector": "inference.loaded"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
