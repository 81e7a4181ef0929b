"""Packages that only some features need."""
import importlib
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
        text = f"{feature} needs {package}, which {reason}: pip install 'densekd[{extra}]', or pip install {package}"
        raise MissingExtra(text) from None
