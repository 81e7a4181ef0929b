"""Where the time of training steps goes."""
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from data.tables import percent

# "data" is waiting for a batch and moving it to the device; "student" is its pass and its own losses; "teacher" is the
# passes of all teachers; "methods" is the methods' losses; "backward" is one pass through student and methods together.
PARTS = ("data", "student", "teacher", "methods", "backward", "optimizer")
PREFIX = "seconds/"  # of the names in metrics.jsonl
MOST = 100  # steps that are timed between two calls of `read`, so that there is an end to CUDA's events

Item = TypeVar("Item")


class PartsClock:
    """The time of the parts of training steps, per step, since the last `read`.

    Work on CUDA is timed by events in its stream, which are read when the device has done this work anyway. So the
    clock never makes a step wait.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.seconds, self.steps = dict.fromkeys(PARTS, 0.0), 0
        self.timed: list[list[tuple[str, torch.cuda.Event]]] = []  # on CUDA, the marks of each step
        self.running = False
        self.before = 0.0

    def waits(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield what a loader yields; the time until it comes counts as "data"."""
        items = iter(items)
        while True:
            before = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            if self.steps < MOST:
                self.seconds["data"] += time.perf_counter() - before
            yield item

    def start(self) -> None:
        """Begin a step."""
        self.running = self.steps < MOST
        if self.running:
            self.steps += 1
            self.before = time.perf_counter()
            if self.on_gpu:
                self.timed.append([("", recorded_event())])

    def mark(self, part: str) -> None:
        """The time of this step since its last mark, or its start, was spent on a part."""
        if not self.running:
            return
        if self.on_gpu:
            self.timed[-1].append((part, recorded_event()))
        else:
            before, self.before = self.before, time.perf_counter()
            self.seconds[part] += self.before - before

    def read(self) -> dict[str, float]:
        """Seconds per step of the parts that took any time, as `seconds/NAME`; the clock starts again from zero."""
        for marks in self.timed:
            marks[-1][1].synchronize()  # it has happened, if a loss of this step was read
            for (_, before), (part, after) in zip(marks, marks[1:]):
                self.seconds[part] += before.elapsed_time(after) / 1e3
        means = {PREFIX + part: value / self.steps for part, value in self.seconds.items() if value and self.steps}
        self.seconds, self.steps, self.timed, self.running = dict.fromkeys(PARTS, 0.0), 0, [], False
        return means


def recorded_event() -> torch.cuda.Event:
    """An event in the current stream, at the end of the work so far."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def parts_of(record: dict) -> dict[str, str]:
    """The parts of a step's time in a record of metrics.jsonl, in percent of their sum."""
    known = {part: record[PREFIX + part] for part in PARTS if PREFIX + part in record}
    return {part: percent(seconds / sum(known.values())) for part, seconds in known.items()}
