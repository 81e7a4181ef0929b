"""The files that a run writes while it trains: metrics.jsonl and a text log."""
import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from tqdm import tqdm

from data.output import naming, write_text

if TYPE_CHECKING:
    from torch import Tensor


class TqdmHandler(logging.StreamHandler):
    """Prints log lines without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
        except OSError:  # a full disk, or a pipe that ended: a run goes on, and has train.log
            pass


class FileHandler(logging.FileHandler):
    """Writes log lines to a file; one that cannot be written raises OutputError, as every other file does."""

    def handleError(self, record: logging.LogRecord) -> None:  # called while the error is handled
        with naming(Path(self.baseFilename)):
            raise


def open_log(work_dir: Path, rank: int) -> logging.Logger:
    """A logger to the terminal and to train.log in the work dir; on other ranks than 0 it is silent."""
    log = logging.getLogger("densekd")
    for handler in list(log.handlers):
        handler.close()
        log.removeHandler(handler)
    log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.CRITICAL)
    if rank == 0:
        for handler in (TqdmHandler(), FileHandler(work_dir / "train.log", encoding="utf-8")):
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
            log.addHandler(handler)
    return log


class Meter:
    """Means of the losses, and the speed, since the last `read`; it does not wait for the device each step."""

    def __init__(self):
        self.sums, self.counts, self.steps, self.images = {}, {}, 0, 0
        self.start = time.perf_counter()

    def add(self, losses: dict[str, "Tensor"], images: int) -> None:
        for name, value in losses.items():
            finite = value.detach().isfinite()  # under fp16 a step may overflow and be skipped
            self.sums[name] = self.sums.get(name, 0) + value.detach().where(finite, 0)
            self.counts[name] = self.counts.get(name, 0) + finite  # a method may also not run at this step
        self.steps += 1
        self.images += images

    def read(self) -> dict[str, float | None]:
        """The means since the last call; None if no value was finite."""
        means = {name: float(value / self.counts[name]) if self.counts[name] else None
                 for name, value in self.sums.items()}
        seconds = time.perf_counter() - self.start
        speed = {"images_per_second": self.images / seconds, "seconds/step": seconds / self.steps}
        self.__init__()
        return means | speed


class Clock:
    """The time that a run still takes, by the means over its latest steps and evaluations."""

    def __init__(self):
        self.before, self.seconds = time.perf_counter(), {}

    def tick(self, part: str) -> float:
        """Count the time since the last tick as that of a part, "step" or "evaluation", and return it in seconds."""
        before, self.before = self.before, time.perf_counter()
        self.seconds.setdefault(part, deque(maxlen=100)).append(self.before - before)
        return self.before - before

    def left(self, **counts: int) -> float:
        """Seconds for so many of each part. A part that never came yet is not included."""
        return sum(count * mean(self.seconds[part]) for part, count in counts.items() if part in self.seconds)


def in_hours(seconds: float) -> str:
    """Seconds for people: hours, minutes and seconds, such as `0:12:30`."""
    return str(timedelta(seconds=round(seconds)))


class Metrics:
    """metrics.jsonl, one line for each record. A resumed run drops the lines that it will write again: those after
    `from_step`, and the evaluation at that step unless it is `evaluated`.

    Args:
        path: the file; None in processes that do not write.
        show: is called with every record, too.
    """

    def __init__(self, path: Path | None, from_step: int = 0, evaluated: bool = False,
                 show: Callable[[dict], None] | None = None):
        self.path, self.show = path, show
        if path is not None:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
            kept = [line for line in lines if from_step and _is_done(line, from_step, evaluated)]
            write_text(path, "".join(line + "\n" for line in kept))

    def write(self, record: dict) -> None:
        if self.path is not None:
            with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self.show is not None:
            self.show(record)


def _is_done(line: str, step: int, evaluated: bool) -> bool:
    """Whether a line records something that was done up to a step; an incomplete line does not."""
    try:
        record = json.loads(line)
        return record["step"] < step or (record["step"] == step and (evaluated or "AP" not in record))
    except (ValueError, KeyError, TypeError):
        return False
