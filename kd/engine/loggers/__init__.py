"""The loggers of a run: TensorBoard, Weights & Biases and MLflow. One that fails never stops the run."""
import json
import logging
import re
from collections.abc import Callable

from data.errors import one_line
from data.extras import need
from models import Detector

from ...config import Config
from ...config.loggers import PACKAGES, check_loggers
from ...exceptions import Stopped
from ...processes import distributed
from ..run import Run
from .base import Logger
from .board import open_board
from .to_mlflow import MLflow
from .to_wandb import Wandb

# Each is called with the run, and with its origin as in run.json.
LOGGERS: dict[str, Callable[[Run, dict], Logger]] = {"tensorboard": open_board, "wandb": Wandb, "mlflow": MLflow}


class Loggers:
    """Hands everything to all loggers. One that raises an error is switched off, with one warning in the log.

    It is a context: the loggers start at its begin, and end with it.
    """

    def __init__(self, loggers: dict[str, Logger], log: logging.Logger):
        self.active, self.log = loggers, log

    def __enter__(self) -> "Loggers":
        self._all("start")
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        stopped = kind is not None and issubclass(kind, (Stopped, KeyboardInterrupt))
        self._all("end", "finished" if kind is None else "stopped" if stopped else "failed")

    def show(self, record: dict) -> None:
        """Hand on a record of metrics.jsonl."""
        self._all("show", record)

    def pictures(self, step: int, detectors: dict[str, Detector]) -> None:
        """Hand on the detectors, for pictures of what they find."""
        self._all("pictures", step, detectors)

    def _all(self, action: str, *arguments: object) -> None:
        for name, logger in list(self.active.items()):
            try:
                getattr(logger, action)(*arguments)
            except Exception as error:  # whatever another package raises
                del self.active[name]
                reason = one_line(str(error) or type(error).__name__)
                self.log.warning(f"{name} failed and is switched off, the run goes on without it: {reason}")


def need_loggers(cfg: Config) -> None:
    """Raise MissingExtra for a logger that cannot be used. Only the first process, which logs, imports them."""
    chosen = cfg.train.all_loggers
    check_loggers(chosen)
    for name, key in chosen.items() if distributed.rank() == 0 else ():
        package, extra, module = PACKAGES[name]
        need(package, extra, key, "torch.utils.tensorboard" if name == "tensorboard" else module)


def open_loggers(run: Run, origin: dict, log: logging.Logger) -> Loggers:
    """The loggers of a run: those of `train.loggers` in the first process, none in the others.

    Args:
        origin: as in run.json, see `provenance`.
    """
    chosen = run.cfg.train.all_loggers if distributed.rank() == 0 else []
    told = json.loads(without_secrets(json.dumps(origin)))
    return Loggers({name: LOGGERS[name](run, told) for name in chosen}, log)


def without_secrets(text: str) -> str:
    """A text without the passwords and the queries in its addresses, which may be keys for a download."""
    text = re.sub(r'(://)[^/@\s"]+@', r"\1", text)
    return re.sub(r'(://[^?\s"]+)\?[^\s"]*', r"\1", text)
