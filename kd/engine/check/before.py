"""The check of a training run before it starts: what is distilled, what it costs, and whether it works."""
import json
from pathlib import Path

import torch

from data.coco.check import check_augmentation
from data.errors import counted, listed
from data.output import write_text

from ...config import Config, parse_config
from ...distiller import seen_by
from ...exceptions import TrainingError
from ...inference.detectors import knowledge
from ...inference.precision import autocast
from ...processes import distributed
from ..cached import describe_caches, keep_nothing
from ..run import Run, build_run, describe_run
from ..step import to_device
from .costs import draw, measure_costs, put_back, time_detection
from .influence import influences
from .judgement import judge_run
from .subjects import look_at

BATCHES = 3  # on which the methods' gradients are measured


def check(cfg: Config, device: torch.device, out: Path | None = None) -> str:
    """Build what a configuration trains, take some steps, detect on some images, and judge. Nothing is written.

    Args:
        out: a file for the judgement and its figures, as JSON, which is written after all.
    Returns:
        Text for people: the models, what each method compares, losses, and the judgement.
    Raises:
        ConfigError, DataError, CheckpointError: bad input.
        TrainingError: a loss that is not finite.
    """
    device = distributed.start_processes(device)
    run = build_run(parse_config(cfg), Path(), device)
    run.model.train()
    warning = check_augmentation(run.train_loader.dataset)
    keep_nothing(run)
    lines = [describe_run(run), *describe_caches(run), *([warning] if warning else [])]
    groups, loading = draw(run)
    with put_back(run):
        costs, losses, weights = measure_costs(run, groups, loading)
        broken = [name for name, value in losses.items() if "loss" in name and not value.isfinite()]
        if broken and run.cfg.train.amp != "fp16":  # fp16 skips such steps
            raise TrainingError(f"{listed(broken, ', ')}: not finite in the first step; look for a setting that is far "
                                "too large or too small, and for such weights of a teacher")
        # After these steps, because the gradients of a student that knows nothing say little about those that follow.
        acts = influences(run, [batch for group in groups for batch in group][:BATCHES]) if run.distiller else {}
    if run.distiller:
        with put_back(run):  # batch norms learn from every pass in training
            lines += describe_methods(run, *groups[0][0])
    lines += [" ".join(f"{name} {value.item():.4g}" for name, value in losses.items()), *weights]
    if (shown := time_detection(run)) is not None:
        detections, images, costs.image = shown
        lines.append(f"evaluation: {counted(detections, 'detection')} on {counted(images, 'image')}")
    judgement = judge_run(run, look_at(run), costs, acts)
    if out is not None and distributed.rank() == 0:
        write_text(out, json.dumps(judgement.content(), indent=1))
    return "\n".join([*lines, str(judgement)])


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
