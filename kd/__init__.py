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
_MODULES = {"build": ["build_distiller"], "config": ["load_config"], "distiller": ["Distiller"],
            "inference.loaded": ["load_detector"], "methods": ["METHODS"], "methods.base": ["Method"]}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
