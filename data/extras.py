"""Packages that only some features need."""
import importlib
import sys
from importlib.util import find_spec
from types import ModuleType


class MissingExtra(RuntimeError):
    """A feature needs a package that is not installed."""

    exit_code = 2


def need(package: str, extra: str, feature: str, module: str | None = None) -> ModuleType:
    """An optional package.

    Args:
        package: its name for pip.
        extra: the extra of densekd that installs it.
        feature: what needs it, for the message.
        module: what is imported; by default the package.
    Raises MissingExtra, one line that says what to install, if it is not installed or cannot be imported.
    """
    try:
        return importlib.import_module(module or package)
    except ImportError as error:
        reason = "is not installed" if error.name in (package, module) else f"cannot be imported ({error})"
        raise MissingExtra(_advice(package, extra, feature, reason)) from None


def check_installed(package: str, extra: str, feature: str, module: str | None = None) -> None:
    """Raise MissingExtra, as `need` does, if an optional package is not installed. Nothing is imported."""
    name = (module or package).partition(".")[0]
    # A folder of this name, such as the one that wandb writes, would be found as well, but it has no origin.
    there = sys.modules[name] is not None if name in sys.modules else getattr(find_spec(name), "origin", None)
    if not there:
        raise MissingExtra(_advice(package, extra, feature, "is not installed"))


def _advice(package: str, extra: str, feature: str, reason: str) -> str:
    return f"{feature} needs {package}, which {reason}: pip install 'densekd[{extra}]', or pip install {package}"
