"""The memory layout of convolutions in a run (`train.channels_last`). `auto` chooses it by timed steps at the start.

Which layout is faster depends on the processor, the number of threads, the number format and the model.
"""
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from data import CocoDataset
from data.transforms import padded_size, resized_size
from models import Detector

from ..config import Config
from ..distiller import Distiller
from ..inference.precision import autocast, memory_format, pointwise_pays, route_pointwise
from ..processes import distributed
from ..processes.timing import Call, interleave, medians_ms
from .step import compute_losses, random_batch, to_device

NAMES = {True: "channels_last", False: "ordinary"}
ROUNDS = 3       # timed steps in each layout, after one that is not
CLEARLY = 0.97   # `ordinary` is chosen if it takes at most so much of the time of `channels_last`
SAMPLE = 2000    # images that the batch's size is taken from
BOXES = 7        # per image
MEASURED = "measured"


@dataclass
class Choice:
    """The layout of one detector."""

    channels_last: bool | None  # None for a teacher in shards, which stays as it is
    why: str = ""               # MEASURED, or in words; empty if the configuration says it
    ms: dict[str, float] = field(default_factory=dict)  # of a step by layout, if it was measured

    def __str__(self) -> str:
        """The layout's name, and the reason."""
        times = ", ".join(f"{name} {value:.0f} ms" if value >= 100 else f"{name} {value:.3g} ms"
                          for name, value in self.ms.items())
        return f"{NAMES[self.channels_last]}{f' ({times})' if self.why == MEASURED else f', {self.why}'}"


@dataclass
class Layout:
    """The layouts and kernels of a run; `asdict` of it is in run.json and in checkpoints."""

    device: str               # type of the device that they were chosen for
    threads: int
    student: Choice
    teachers: list[Choice]
    pointwise: bool           # whether 1x1 convolutions are given to oneDNN, see `pointwise_pays`

    def apply(self, model: Detector | Distiller) -> None:
        """Put a model's weights into their layouts, and choose its kernels."""
        for module, choice in [*parts(model), (getattr(model, "methods", None), None)]:
            choice = self.student if choice is None else self.teachers[choice]
            if module is not None and choice.channels_last is not None:
                module.to(memory_format=memory_format(choice.channels_last))
        if self.pointwise:
            for module, _ in parts(model):
                route_pointwise(module)

    @property
    def choices(self) -> dict[str, Choice]:
        """The choices by the detectors' names for people."""
        names = ["teacher" if len(self.teachers) == 1 else f"teacher {i}" for i in range(len(self.teachers))]
        return dict(zip(["student" if names else "detector", *names], [self.student, *self.teachers]))

    def names(self) -> dict[str, str]:
        """The layouts' names, by the detectors'."""
        return {name: NAMES[choice.channels_last] for name, choice in self.choices.items()
                if choice.channels_last is not None}

    def describe(self) -> list[str]:
        """Lines for the log: what was chosen, and why."""
        lines = [f"train.channels_last: auto chose for the {name} {choice}"
                 for name, choice in self.choices.items() if choice.why]
        if self.pointwise:
            lines.append("1x1 convolutions are given to oneDNN, which is faster here with one thread")
        return lines


def parts(model: Detector | Distiller) -> list[tuple[Detector, int | None]]:
    """The student with None, and every teacher with its number."""
    if not isinstance(model, Distiller):
        return [(model, None)]
    return [(model.student, None), *((teacher, i) for i, teacher in enumerate(model.teachers))]


def choose_layout(model: Detector | Distiller, cfg: Config, device: torch.device, size: tuple[int, int], images: int,
                  state: Mapping | None = None) -> Layout:
    """Choose the layouts of a run and apply them. All processes get the choice of the first one.

    Args:
        model: on the device, in training.
        size, images: height and width of a batch, and its number of images.
        state: the checkpoint that the run goes on from; its choice is kept.
    """
    chosen, amp = cfg.train.channels_last, cfg.train.amp
    count = len(model.teachers) if isinstance(model, Distiller) else 0
    kept = None if state is None else kept_layout(state, device, count)
    layout = kept or Layout(device.type, 0, Choice(None), [Choice(None) for _ in range(count)], False)
    if layout.threads != torch.get_num_threads():
        layout.threads = torch.get_num_threads()
        layout.pointwise = pointwise_pays(device, amp, *(entry.precision for entry in cfg.teachers))
    layout = distributed.from_first(layout)
    layout.apply(model)  # the kernels, which the measurement needs
    calls = None if chosen != "auto" or kept else timed_calls(model, size, images, device, amp)
    for module, number in parts(model):
        if number is not None and module.sharded:
            choice = Choice(None)
        elif chosen != "auto":
            choice = Choice(chosen)
        elif kept:
            choice = layout.student if number is None else layout.teachers[number]
            choice = Choice(choice.channels_last, "as when the run was started", choice.ms)
        else:
            known = distributed.from_first(stored_layout(model, number))
            choice = measure(module, calls[number], device) if known is None else Choice(
                known, "because distill.cache holds its answers in this layout")
        if number is None:
            layout.student = choice
        else:
            layout.teachers[number] = choice
    layout = distributed.from_first(layout)
    layout.apply(model)
    return layout


def kept_layout(state: Mapping, device: torch.device, teachers: int) -> Layout | None:
    """The layout in a checkpoint; None if it is of another kind of device or of another number of teachers.

    Earlier versions wrote none: all detectors were in the layout of the configuration, by default channels_last.
    """
    try:
        if state.get("layout") is None:
            before = state.get("config", {}).get("train", {}).get("channels_last", True) is not False
            return Layout(device.type, 0, Choice(before), [Choice(before) for _ in range(teachers)], False)
        found = dict(state["layout"])
        found |= {"student": Choice(**found["student"]), "teachers": [Choice(**one) for one in found["teachers"]]}
        layout = Layout(**found)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None  # damaged; other entries tell
    return layout if (layout.device, len(layout.teachers)) == (device.type, teachers) else None


def stored_layout(model: Detector | Distiller, teacher: int | None) -> bool | None:
    """The only layout in which `distill.cache` holds answers of a teacher; None if there is none, or both.

    Stored answers save more time than a layout, and those of the other layout could not be used.
    """
    if teacher is None or not model.caches:
        return None
    found = model.caches[teacher].stored_layouts()
    return found[0] if len(found) == 1 else None


def measure(module: Detector, call: Call, device: torch.device) -> Choice:
    """Time a call in both layouts. The module's statistics stay as they are.

    On a CPU, it is the CPU time of this process for each thread, because other processes disturb it less.
    """
    clock, threads = (time.process_time, torch.get_num_threads()) if device.type == "cpu" else (time.perf_counter, 1)

    def prepare(channels_last: bool) -> None:
        module.zero_grad(set_to_none=True)
        module.to(memory_format=memory_format(channels_last))

    with unchanged(module):
        ms = medians_ms(interleave({False: call, True: call}, ROUNDS, before=prepare, clock=clock))
    return Choice(ms[False] > CLEARLY * ms[True], MEASURED,
                  {NAMES[key]: value / threads for key, value in ms.items()})


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """A context after which buffers, gradients and PyTorch's random numbers are as before."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)
            module.zero_grad(set_to_none=True)


def timed_calls(model: Detector | Distiller, size: tuple[int, int], images: int, device: torch.device, amp: str
                ) -> dict[int | None, Call]:
    """The calls to measure, by teacher; None is the student. It trains, a teacher only answers."""
    student = parts(model)[0][0]
    with torch.random.fork_rng(devices=[]):
        pixels, targets = to_device(*random_batch(size, images, BOXES, student.bbox_head.num_classes, device), student,
                                    device)
    calls: dict[int | None, Call] = {None: lambda: step(student, pixels, targets, device, amp)}
    for number, (teacher, entries) in enumerate(model.whole_plan() if isinstance(model, Distiller) else ()):
        def answer(teacher=teacher, entries=entries) -> None:
            with autocast(device, amp):
                model.run_teacher(teacher, entries, pixels, targets)
        calls[number] = answer
    return calls


def step(student: Detector, images: Tensor, targets: list[dict], device: torch.device, amp: str) -> None:
    """Forward and backward of the student alone."""
    compute_losses(student, images, targets, device, amp).total.backward()


def common_size(dataset: CocoDataset) -> tuple[int, int]:
    """The most frequent padded (h, w) of a data set's images."""
    sizes = (padded_size(resized_size(size, dataset.scale, dataset.within)) for size in dataset.sizes[:SAMPLE])
    return Counter(sizes).most_common(1)[0][0]
