"""Where the time of a training step goes: by part, forward and backward, and by operator."""
import functools
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ...distiller import Distiller
from ...processes.timing import Call, synchronize
from ..steps import Subject

PART = "part: "  # of an annotation's name
BACKWARD = "autograd::engine::evaluate_function: "
REST = "the rest"  # moving and normalising images, clipping, sums of gradients, Python


@contextmanager
def annotated(subject: Subject) -> Iterator[None]:
    """A context in which the parts of a step are annotated for the profiler."""
    inside, changed = [], []

    def mark(owner: Any, method: str, name: str, alone: bool = False) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        def marked(*args: Any, **kwargs: Any) -> Any:
            if alone and inside and inside[-1].startswith("teacher"):  # the teacher's own pass
                return original(*args, **kwargs)
            inside.append(name)
            try:
                with record_function(PART + name):
                    return original(*args, **kwargs)
            finally:
                inside.pop()
        object.__setattr__(owner, method, marked)
        changed.append((owner, method))

    student, model = subject.student, subject.model
    who = "student " if isinstance(model, Distiller) else ""
    for part, word in (("backbone", "backbone"), ("neck", "neck"), ("bbox_head", "head")):
        for detector, name in [(student, who)] + [(t, "teacher ") for t in getattr(model, "teachers", [])]:
            if getattr(detector, part) is not None:
                mark(getattr(detector, part), "forward", name + word)
    mark(student.bbox_head, "assign", "assignment")
    mark(student, "losses", f"{who}losses")
    mark(subject.optimizer, "step", "optimiser")
    if isinstance(model, Distiller):
        for teacher, entries in model.whole_plan():
            if teacher.bbox_head is not None:
                mark(teacher.bbox_head, "run_from", "crossed head", alone=True)
            for entry in entries:
                mark(entry.method, "forward", f"method {entry.name}")
    try:
        yield
    finally:
        for owner, method in reversed(changed):
            object.__delattr__(owner, method)


def where(subject: Subject, step: Call, times: int, device: torch.device, listed: int = 15) -> dict:
    """Profile a step.

    Returns:
        Milliseconds of a step: `parts` (each `forward` and `backward`), and the `listed` largest `operators` (each
        `calls` and `ms`). On a GPU, they are those of its kernels.
    """
    on_gpu = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler announces each of its stages
    with annotated(subject), profile(activities=[ProfilerActivity.CPU,
                                                 *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        for _ in range(times):
            step()
        synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
    of_node = parts_of_nodes(events)
    parts, operators, calls = defaultdict(Counter), Counter(), Counter()
    for event in events:
        own = sum(kernel.duration for kernel in event.kernels if kernel.name != event.name) if on_gpu else (
            event.self_cpu_time_total)
        part, direction = part_of(event, of_node)
        parts[part][direction] += own / times / 1e3
        if not event.name.startswith((PART, BACKWARD)):
            operators[event.name] += own / times / 1e3
            calls[event.name] += 1
    return {"parts": {name: {way: found[way] for way in ("forward", "backward")}
                      for name, found in sorted(parts.items(), key=lambda item: -item[1].total())},
            "operators": {name: {"calls": calls[name] / times, "ms": ms}
                          for name, ms in operators.most_common(listed)}}


def parts_of_nodes(events: list) -> dict[int, str]:
    """The part in which each node of the graph was made, by its sequence number.

    Operators without a node carry the number of the next node, so the last operator with a number has made the node.
    """
    found = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0:
            part, direction = part_of(event, {})
            if direction == "forward":
                found[event.sequence_nr] = part
    return found


def part_of(event: Any, of_node: dict[int, str]) -> tuple[str, str]:
    """The part of a profiler's event, and "forward" or "backward"."""
    above = event
    while above is not None:
        if above.name.startswith(PART):
            return above.name.removeprefix(PART), "forward"
        if above.name.startswith(BACKWARD):
            return of_node.get(above.sequence_nr, REST), "backward"
        above = above.cpu_parent
    return REST, "forward"
