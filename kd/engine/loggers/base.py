"""What all loggers share."""
import json
from pathlib import Path
from typing import Literal

from data.output import write_text
from models import Detector

Ended = Literal["finished", "stopped", "failed"]  # stopped: by a signal, after saving


class Logger:
    """Gets what a run records. Every method may raise: `Loggers` then switches it off."""

    def start(self) -> None:
        """Get ready, before the first record."""

    def show(self, record: dict) -> None:
        """Take a record of metrics.jsonl."""

    def pictures(self, step: int, detectors: dict[str, Detector]) -> None:
        """Take pictures of the detectors' results, if it is time for them."""

    def end(self, ended: Ended) -> None:
        """The run ends: send what is still here."""


def figures(record: dict) -> dict[str, float]:
    """The numbers of a record, under `train/`, `val/` or, for single classes, `val_class/`. A name with a / stays."""
    group, found = "val" if "AP" in record else "train", {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= {f"{group}_class/{key}": number for key, number in value.items()}
        elif name not in ("epoch", "step"):
            found[name if "/" in name else f"{group}/{name}"] = value
    return {name: value for name, value in found.items() if value is not None}


def known_id(work_dir: Path, logger: str) -> str | None:
    """The logger's own name for the run in a work dir; None if `loggers.json` has none or cannot be read."""
    try:
        content = json.loads((work_dir / "loggers.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = content.get(logger) if isinstance(content, dict) else None
    return found if isinstance(found, str) else None


def keep_id(work_dir: Path, logger: str, given: str) -> None:
    """Keep the logger's own name for the run, so that a resumed run continues it. It is no secret."""
    ids = {name: value for name in ("wandb", "mlflow") if (value := known_id(work_dir, name))}
    write_text(work_dir / "loggers.json", json.dumps(ids | {logger: given}, indent=1))
