"""Packages that only some features need."""
import importlib
from types import ModuleType


class MissingExtra(RuntimeError):
    """A feature was asked for whose packages are not installed."""


def need(package: str, extra: str) -> ModuleType:
    """An optional package.

    Raises:
        MissingExtra: it is not installed, or not in a state to be used; one line that says what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        reason = "is not installed" if getattr(error, "name", None) == package else f"cannot be imported ({error})"
        raise MissingExtra(f"{package} {reason}: pip install 'densekd[{extra}]', or pip install {package}") from None
