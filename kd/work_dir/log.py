"""What a run leaves behind: metrics.jsonl, a text log, and where it came from."""
import hashlib
import json
import logging
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from models.checkpoints.sources import local_path

from ..config.sections import teacher_entries

if TYPE_CHECKING:
    from ..engine.board import Board


class TqdmHandler(logging.StreamHandler):
    """Log lines that a progress bar does not break."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


def open_log(work_dir: Path, rank: int) -> logging.Logger:
    """A logger to the terminal and to the work dir's train.log; silent but on rank 0."""
    log = logging.getLogger("densekd")
    for handler in list(log.handlers):
        handler.close()
        log.removeHandler(handler)
    log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.CRITICAL)
    if rank == 0:
        for handler in (TqdmHandler(), logging.FileHandler(work_dir / "train.log", encoding="utf-8")):
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
            log.addHandler(handler)
    return log


class TrainingError(RuntimeError):
    """Training that cannot go on."""


class Meter:
    """Means of the losses and images per second since the last look, without asking the device at every step."""

    def __init__(self):
        self.sums, self.counts, self.steps, self.images = {}, {}, 0, 0
        self.start = time.perf_counter()

    def add(self, losses: dict[str, torch.Tensor], images: int) -> None:
        for name, value in losses.items():
            finite = torch.isfinite(value.detach())  # under fp16 a step may overflow, and is skipped
            self.sums[name] = self.sums.get(name, 0) + value.detach().where(finite, 0)
            self.counts[name] = self.counts.get(name, 0) + finite  # nor need a method run at every step
        self.steps += 1
        self.images += images

    def read(self) -> dict[str, float | None]:
        """The means since the last call; None where nothing was finite."""
        means = {name: float(value / self.counts[name]) if self.counts[name] else None
                 for name, value in self.sums.items()}
        speed = self.images / (time.perf_counter() - self.start)
        self.__init__()
        return means | {"images_per_second": speed}


class Metrics:
    """metrics.jsonl: a line per record, and `board` shows it. Lines that a resumed run writes again are dropped: of
    later steps than the one that it goes on from, and of an evaluation there unless that is `evaluated`."""

    def __init__(self, path: Path | None, from_step: int = 0, evaluated: bool = False, board: "Board | None" = None):
        self.path, self.board = path, board
        if path is not None:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            kept = [line for line in lines if from_step and _is_done(line, from_step, evaluated)]
            partial = path.with_name(path.name + ".tmp")  # a run that is killed here loses nothing
            partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            partial.replace(path)

    def write(self, record: dict) -> None:
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self.board is not None:
            self.board.show(record)


def _is_done(line: str, step: int, evaluated: bool) -> bool:
    """Whether a line is of what was done by a step; no line is that was cut off."""
    try:
        record = json.loads(line)
        return record["step"] < step or (record["step"] == step and (evaluated or "AP" not in record))
    except (ValueError, KeyError, TypeError):
        return False


def provenance(cfg: dict, device: torch.device) -> dict:
    """Where a run's figures come from: configuration, code, versions, machine, and the teachers' files."""
    paths = [teacher["checkpoint"] for teacher in teacher_entries(cfg)]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": sys.argv, "config": cfg,
        "commit": commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__} | {
            name: version(name) for name in ("torchvision", "numpy", "pycocotools")},
        "machine": {"system": platform.platform(), "threads": torch.get_num_threads(),
                    "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"},
        "teachers": {path: file_hash(local_path(path)) for path in paths if path is not None}}


def commit() -> str | None:
    """The code's commit, with a + where files have changed since; None outside a checkout."""
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
