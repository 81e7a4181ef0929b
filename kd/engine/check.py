"""The check of a training run before it starts: what is distilled, what it costs, and whether it works."""
import time
from pathlib import Path

import torch

from data.coco.check import check_augmentation
from data.errors import counted, listed

from ..config import Config, parse_config
from ..distiller import seen_by
from ..exceptions import TrainingError
from ..inference.detectors import knowledge
from ..inference.precision import autocast
from ..processes import distributed
from ..processes.memory import in_gib, peak_memory
from .cached import describe_caches, keep_nothing
from .run import Run, build_run, describe_run
from .start import starting_points
from .step import to_device
from .train import train_step


def check(cfg: Config, device: torch.device) -> str:
    """Build what a configuration trains, take two steps and detect on one batch. Nothing is written.

    Returns:
        Text for people: the models, the teachers' AP, what each method compares, losses, time and memory.
    Raises:
        ConfigError, DataError, CheckpointError: bad input.
        TrainingError: a loss that is not finite.
    """
    device = distributed.start_processes(device)
    run = build_run(parse_config(cfg), Path(), device)
    amp = run.cfg.train.amp
    run.model.train()
    warning = check_augmentation(run.train_loader.dataset)
    keep_nothing(run)
    lines = [describe_run(run), *describe_caches(run), *([warning] if warning else [])]
    images, targets = next(iter(run.train_loader))
    if run.distiller:
        if run.val_loader is not None and run.cfg.train.check_images:
            lines.append(starting_points(run.distiller, run.cfg, run.train_loader.dataset.classes, device))
        lines += describe_methods(run, images, targets)
    losses, _ = train_step(run, run.model, [(images, targets)])
    broken = [name for name, value in losses.items() if "loss" in name and not value.isfinite()]
    if broken and amp != "fp16":  # fp16 skips such steps
        raise TrainingError(f"{listed(broken, ', ')}: not finite in the first step; look for a setting that is far "
                            "too large or too small, and for such weights of a teacher")
    lines.append(" ".join(f"{name} {value.item():.4g}" for name, value in losses.items()))
    start = time.perf_counter()
    losses, _ = train_step(run, run.model, [(images, targets)])  # the first step was slower, because of set-up
    losses["loss"].item()  # waits for the device
    seconds = time.perf_counter() - start
    if run.distiller:
        lines += run.distiller.gradient_shares.describe()
    shown = None if run.val_loader is None else next(iter(run.val_loader), None)
    if shown is not None:  # None in a process that gets no images because there are so few
        run.model.eval()
        with torch.no_grad(), autocast(device, amp):
            found = run.model.predict(run.student.preprocess(shown[0].to(device), shown[1]), shown[1])
        lines.append(f"evaluation: {counted(sum(len(d['boxes']) for d in found), 'detection')} on "
                     f"{counted(len(found), 'image')}")
    memory = in_gib(peak_memory(device))
    lines.append(f"a step of {counted(len(images), 'image')} took {seconds:.2f} s; peak memory {memory}")
    return "\n".join(lines)


def describe_methods(run: Run, images: torch.Tensor, targets: list[dict]) -> list[str]:
    """Lines that say what every method compares, and its weights."""
    lines, batch = [], to_device(images, targets, run.student, run.device)
    measured = run.distiller.gradient_shares.shares
    with torch.no_grad(), autocast(run.device, run.cfg.train.amp):
        student, teachers, plan = run.distiller.passes(*batch)
        for i, (teacher, (_, entries)) in enumerate(zip(teachers, plan)):
            for method, name, factor in entries:
                weights = ", ".join(f"{part} {weight:g}" for part, weight in method.weights().items())
                times = f"times {factor:g}" if name not in measured else f"a share of {factor:g} of the gradient"
                knows = knowledge(teacher.detector, run.train_loader.dataset.classes)
                lines.append(f"{name} ({type(method).__name__}) from teacher {i}{knows}: {times} now; {weights}")
                lines += [f"  {line}" for line in method.links(*seen_by(method, student, teacher))]
    return lines
