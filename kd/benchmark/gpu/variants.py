"""Training steps in several ways, as `scripts/gpu.py` compares them: precision, compiled, captured, with streams."""
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data import generate_scenes
from data.sources.scenes import CLASSES

from ...config import load_config, parse_config
from ...engine.prefetch import prefetched
from ...engine.run import build_run
from ...engine.step import compute_losses, to_device
from ...engine.train import train_step
from ...processes.timing import Call, interleave
from ..steps import Subject, build_subject, make_batch, prepare, training_step, update
from ..timing import peak_gpu_memory, with_flops
from ..workload import Workload

SYNCHRONISING = "called a synchronizing"  # PyTorch's warning
WARM = 2  # steps before the synchronisations are counted: anchors, choices of cuDNN, state of the optimiser


class Variant(NamedTuple):
    """A way to compute a training step."""

    amp: str
    compiled: bool = False
    captured: bool = False  # in a CUDA graph
    beside: bool = False    # teachers on a stream of their own
    needs_cuda: bool = False


VARIANTS = {"float32": Variant("none"), "bf16": Variant("bf16"),
            "bf16, teacher on its own stream": Variant("bf16", beside=True, needs_cuda=True),
            "bf16, CUDA graph": Variant("bf16", captured=True, needs_cuda=True),
            "bf16, compiled": Variant("bf16", compiled=True, needs_cuda=True)}


def time_variant(path: str, variant: Variant, work: Workload, device: torch.device) -> dict:
    """The milliseconds of a training step on one batch, the images per second, the loss, the GPU's peak memory in
    bytes (None on a CPU and for a graph, whose memory PyTorch does not count so), and the step's floating-point
    operations (None unless it is eager)."""
    torch.manual_seed(0)
    work = replace(work, amp=variant.amp)
    cfg = prepare(load_config(path, ["train.compile=true"] if variant.compiled else []), work)
    subject = build_subject(cfg, device, work)
    batch = make_batch(work, device, cfg.model.head["num_classes"])
    if variant.beside:
        subject.model.stream = torch.cuda.Stream(device)
    step = (captured_step if variant.captured else training_step)(subject, *batch)
    peak = peak_gpu_memory(step) if device.type == "cuda" and not variant.captured else None
    seconds = interleave({"step": step}, work.rounds, work.warmup)["step"]
    eager = not variant.compiled and not variant.captured
    loss, flops = with_flops(step) if eager else (step(), None)
    median = statistics.median(seconds)
    return {"ms": 1e3 * median, "least_ms": 1e3 * min(seconds), "most_ms": 1e3 * max(seconds),
            "images_per_second": work.batch / median, "loss": float(loss), "peak_memory_bytes": peak, "flops": flops}


def has_teachers(path: str) -> bool:
    """Whether a configuration distils."""
    return load_config(path).distill is not None


class KeptCopies(TorchDispatchMode):
    """Keeps what a step copies from the CPU to the GPU, and gives it again when the step is captured: a CUDA graph
    cannot hold a copy from memory that is freed after the step."""

    def __init__(self):
        super().__init__()
        self.kept: list[Tensor] = []
        self.next: Iterator[Tensor] | None = None  # while a step is captured

    def __torch_dispatch__(self, function: Callable, types: Sequence[type], args: tuple = (),
                           kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if (not str(function).startswith("aten._to_copy") or device is None or args[0].device.type != "cpu"
                or torch.device(device).type == "cpu"):
            return function(*args, **kwargs)
        if self.next is not None:
            return next(self.next)
        self.kept.append(function(*args, **kwargs))
        return self.kept[-1]


def captured_step(subject: Subject, images: Tensor, targets: list[dict]) -> Call:
    """`training_step` captured in a CUDA graph, as a call that replays it.

    It repeats this batch: training itself cannot be captured so, because the sizes of images and the numbers of boxes
    change from step to step. It shows what there is to win from launching kernels faster.
    """
    step, copies = training_step(subject, images, targets), KeptCopies()
    side = torch.cuda.Stream(images.device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capturing needs steps before it, on another stream than the usual one
        for _ in range(3):
            step()
        with copies:
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph, copies.next = torch.cuda.CUDAGraph(), iter(copies.kept)
    subject.optimizer.zero_grad(set_to_none=True)  # so that the gradients are in the graph's memory
    with torch.cuda.graph(graph, stream=side), copies:
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def time_feed(path: str, work: Workload, device: torch.device, steps: int = 8) -> dict[str, float]:
    """The milliseconds of a training step in bf16 whose batch comes from pinned memory on the CPU: copied within the
    step, or on a stream of its own (`train.prefetch`)."""
    torch.manual_seed(0)
    work = replace(work, amp="bf16")
    cfg = prepare(load_config(path), work)
    subject = build_subject(cfg, device, work)
    images, targets = make_batch(work, torch.device("cpu"), cfg.model.head["num_classes"])
    targets = [{key: value.pin_memory() if torch.is_tensor(value) else value for key, value in target.items()}
               for target in targets]
    batch = images.pin_memory(), targets

    def run(prefetch: bool) -> None:
        given = ([batch] for _ in range(steps))
        for (images, targets), in prefetched(given, device) if prefetch else given:
            moved = to_device(images, targets, subject.student, device)
            update(subject, compute_losses(subject.model, *moved, device, subject.settings.amp).total)

    seconds = interleave({"in the step": lambda: run(False), "prefetched": lambda: run(True)}, work.rounds, 1)
    return {name: 1e3 * statistics.median(values) / steps for name, values in seconds.items()}


def count_synchronisations(path: str, amp: str, device: torch.device, steps: int = 5) -> dict:
    """How often a training step waits for the GPU, as `torch.cuda.set_sync_debug_mode` sees it, and where.

    These are `train_step` and its data on generated scenes. Each step before also waits for the end of the backward
    pass, to see that the loss is finite; PyTorch's mode does not count such events.
    """
    with TemporaryDirectory() as folder:
        root = generate_scenes(Path(folder) / "scenes", WARM + steps, 1, (256, 320))
        cfg = prepare(load_config(path), Workload((256, 320), 1, classes=len(CLASSES), amp=amp))
        train = {"images": str(root / "train"), "annotations": str(root / "annotations" / "train.json")}
        cfg = parse_config(dict(cfg) | {"data": {"train": train, "batch_size": 1, "workers": 0, "scale": [320, 256]}})
        run = build_run(cfg, Path(folder), device)
        run.model.train()
        batches = list(run.train_loader)
        for batch in batches[:WARM]:
            train_step(run, run.model, [batch])
            run.finite.check()
        with synchronisations() as found:
            for batch in batches[WARM:]:
                train_step(run, run.model, [batch])
                run.finite.check()
    return {"per_step": len(found) / len(batches[WARM:]), "where": dict(Counter(found))}


@contextmanager
def synchronisations() -> Iterator[list[str]]:
    """Yields a list that has, after the context, the file and line of each operation that waited for the GPU."""
    found: list[str] = []
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings(record=True) as seen:
            torch.cuda.set_sync_debug_mode("warn")
            warnings.simplefilter("always")
            yield found
            found += [f"{Path(each.filename).name}:{each.lineno}" for each in seen
                      if SYNCHRONISING in str(each.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
