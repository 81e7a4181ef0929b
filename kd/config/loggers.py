"""The loggers that may get a run's figures besides its work dir, and the packages that they need."""
from collections.abc import Mapping
from typing import Literal, NamedTuple

from data.extras import check_installed

LoggerName = Literal["tensorboard", "wandb", "mlflow"]


class Package(NamedTuple):
    """A logger's package: its name for pip, the extra of densekd that installs it, and its module."""

    package: str
    extra: str
    module: str


PACKAGES: dict[str, Package] = {
    "tensorboard": Package("tensorboard", "viz", "tensorboard"),
    "wandb": Package("wandb", "wandb", "wandb"),
    "mlflow": Package("mlflow", "mlflow", "mlflow"),  # mlflow-skinny has the same module
}


def check_loggers(chosen: Mapping[str, str]) -> None:
    """Raise MissingExtra for a logger whose package is not installed. Nothing is imported.

    Args:
        chosen: the keys that ask for the loggers by their names, see `TrainConfig.all_loggers`.
    """
    for name, key in chosen.items():
        package, extra, module = PACKAGES[name]
        check_installed(package, extra, key, module)
