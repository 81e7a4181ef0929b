"""A training run: its parts, and how it is built, saved and restored."""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import DataError, build_dataset, build_loader
from data.errors import counted, listed
from models import ConfigError, Detector
from models.weights import CheckpointError

from ..build import build_model, teacher_model
from ..config import Config
from ..config.resume import REFUSE, WARN, Change, changes
from ..distiller import Distiller
from ..evaluation.cost import brief, typical_size
from ..evaluation.evaluate import eval_loader
from ..inference.detectors import check_classes, with_classes
from ..inference.precision import memory_format
from ..optim import build_optimizer, earlier_names, load_optimizer
from ..processes import distributed
from ..processes.sharding import shard
from ..work_dir.checkpoint import save_checkpoint
from .average import WeightAverage
from .finite import FiniteWatch

FEW_STEPS = 1000  # of a whole run; with fewer, a warning is shown


@dataclass
class Run:
    """The state that the steps, evaluations and checkpoints of a training run share."""

    cfg: Config
    device: torch.device
    work_dir: Path
    model: Detector | Distiller
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    train_loader: torch.utils.data.DataLoader
    val_loader: torch.utils.data.DataLoader | None
    finite: FiniteWatch
    average: WeightAverage | None  # moving average of the student's weights
    step: int = 0              # optimiser steps done
    saved: int = -1            # step of last.pth
    evaluated: bool = False    # whether the figures of this step are in metrics.jsonl
    best: float = -1.0         # AP of the best evaluation
    overflows: Tensor | int = 0  # steps that fp16 has skipped

    @property
    def distiller(self) -> Distiller | None:
        return self.model if isinstance(self.model, Distiller) else None

    @property
    def student(self) -> Detector:
        return self.model.student if self.distiller else self.model

    @property
    def evaluated_model(self) -> Detector:
        """The detector that is evaluated: the moving average if there is one, otherwise the student."""
        return self.student if self.average is None else self.average.module

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_loader) / self.cfg.train.accumulate)


def build_run(cfg: Config, work_dir: Path, device: torch.device) -> Run:
    """Build the data, models and optimiser of a run, before its first step."""
    settings, data, rank, world = cfg.train, cfg.data, distributed.rank(), distributed.world_size()
    if data is None:
        raise ConfigError("data", "missing: give data.train, which is trained on")
    train_set = build_dataset(data, "train", training=True, seed=settings.seed)
    if not any(map(len, train_set.labels)):
        raise DataError(f"annotation file {train_set.annotation_file} has no box to learn: add boxes, or see "
                        "scripts/check_data.py for what was left out")
    cfg = with_classes(cfg, train_set)
    val_set = build_dataset(data, "val", training=False) if data.val else None
    if val_set is not None and val_set.classes != train_set.classes:
        raise ConfigError("data.val", f"needs the classes of data.train, {train_set.classes}, not {val_set.classes}")
    torch.manual_seed(settings.seed)
    check_teachers_classes(cfg, train_set.classes)
    model = build_model(cfg)
    for i, entry in enumerate(cfg.teachers):
        if entry.shard:
            shard(model.teachers[i], device)
    model = model.to(device, memory_format=memory_format(settings))
    if settings.sync_bn and world > 1:
        if device.type != "cuda":
            raise ConfigError("train.sync_bn", "PyTorch synchronises batch norms on CUDA only: remove it")
        distributed.synchronise_norms(model)
    if settings.compile:
        model.compile()
    optimizer = build_optimizer(cfg.optimizer, model, data.batch_size * world * settings.accumulate)
    train_loader = build_loader(train_set, data.batch_size, True, data.workers, settings.seed, data.group_by_aspect,
                                rank, world)
    run = Run(cfg, device, work_dir, model, optimizer,
              torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16"), train_loader,
              None if val_set is None else eval_loader(cfg, val_set), FiniteWatch(device), None)
    if settings.ema is not None:
        run.average = WeightAverage(run.student, settings.ema)
    return run


def check_teachers_classes(cfg: Config, classes: list[str]) -> None:
    """Raise ConfigError if a teacher's checkpoint has other class names than the data, or another order.

    A teacher whose configuration sets another number of classes is for methods that compare no classes.
    """
    for entry in cfg.teachers:
        path = entry.checkpoint
        if (entry.class_map is None and path is not None and ("://" in path or Path(path).is_file())
                and teacher_model(entry).head.get("num_classes") in (None, len(classes))):
            check_classes(path, entry.part, classes, "distill.teacher.class_map")


def save_run(run: Run, name: str) -> None:
    """Write the run's state into its work dir; with a moving average, `model` is that and `training` the student."""
    if distributed.rank() != 0:
        return
    methods, reported = (run.distiller.methods.state_dict(), run.distiller.reported) if run.distiller else ({}, ())
    state = {"model": run.evaluated_model.state_dict(), "methods": methods, "reported": sorted(reported),
             "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(), "step": run.step,
             "steps_per_epoch": run.steps_per_epoch, "evaluated": run.evaluated, "best": run.best,
             "processes": distributed.world_size(),
             "config": dict(run.cfg), "classes": run.train_loader.dataset.classes}
    if run.average is not None:
        state |= {"training": run.student.state_dict(), "averaged": run.average.updates}
    keep = run.cfg.train.keep if name == "last.pth" and run.step != run.saved else 1
    save_checkpoint(run.work_dir / name, state, keep)
    if name == "last.pth":
        run.saved = run.step


def restore_run(run: Run, state: dict, path: Path) -> list[Change]:
    """Restore a run from a checkpoint.

    Returns:
        The settings that differ from those in the checkpoint and are to be logged: the run goes on with its own.
    Raises:
        CheckpointError: the checkpoint is of other classes, or of a run with settings that this one cannot take over.
    """
    classes, world = run.train_loader.dataset.classes, distributed.world_size()
    if state.get("classes", classes) != classes:
        raise CheckpointError(f"checkpoint {path} has the classes {listed(state['classes'], ', ')}, and the data "
                              f"{listed(classes, ', ')}: resume with the data that the run was started with")
    # Earlier versions wrote no configuration, or no number of processes.
    found = changes(state.get("config", run.cfg), run.cfg, (state.get("processes", world), world))
    if refused := [str(change) for change in found if change.rule == REFUSE]:
        raise CheckpointError(f"checkpoint {path} does not fit these settings: {listed(refused, ', ')}; resume with "
                              "the old values, or start a new run in another --work-dir")
    if state["steps_per_epoch"] != run.steps_per_epoch:
        raise CheckpointError(f"checkpoint {path} has {counted(state['steps_per_epoch'], 'step')} per epoch and this "
                              f"run {run.steps_per_epoch}: resume with the data that the run was started with")
    saved = state.get("config", {}).get("optimizer") or {}
    try:
        run.student.load_state_dict(state.get("training", state["model"]))
        if run.average is not None:
            run.average.module.load_state_dict(state["model"])
            run.average.updates = state.get("averaged", 0)
        if run.distiller:
            run.distiller.methods.load_state_dict(state["methods"])
            run.distiller.reported = {(key, name) for key, name in state["reported"]}
        load_optimizer(run.optimizer, state["optimizer"], earlier_names(run.model, saved))
    except (RuntimeError, ValueError) as error:
        first = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint {path} is of another model or configuration: {first}") from None
    if state["scaler"]:  # of a run in fp16
        run.scaler.load_state_dict(state["scaler"])
    run.step, run.evaluated, run.best = state["step"], state["evaluated"], state["best"]
    return [change for change in found if change.rule == WARN]


def describe_run(run: Run) -> str:
    """A few lines about the run, for its start."""
    data = run.train_loader.dataset
    size = typical_size(data.scale)
    lines = [f"{counted(len(data), 'training image')}, {counted(data.num_classes, 'class')}, "
             f"{counted(run.steps_per_epoch, 'step')} per epoch, {counted(run.cfg.train.epochs, 'epoch')} on "
             f"{run.device}",
             f"{'student' if run.distiller else 'detector'}: {brief(run.student, size)} on an image of "
             f"{size[0]} x {size[1]}"]
    steps = run.cfg.train.epochs * run.steps_per_epoch
    if steps < FEW_STEPS:
        lines.append(f"WARNING: {counted(steps, 'step')} in total; detectors usually need some thousands: raise "
                     "train.epochs and schedule.milestones")
    if run.distiller:
        for teacher, methods in zip(run.distiller.teachers, run.distiller.methods):
            names = ", ".join(type(method).__name__ for method in methods)
            lines.append(f"teacher: {brief(teacher, size)}, {f'distilled by {names}' if names else 'not distilled'}")
    found = set(np.concatenate(data.labels).tolist())
    if absent := [name for label, name in enumerate(data.classes) if label not in found]:
        lines.append(f"classes without a box in the training data, which are not learned: {listed(absent, ', ')}")
    if data.num_dropped_boxes:
        lines.append(f"boxes left out (degenerate, outside the image, or marked as ignored): {data.num_dropped_boxes}")
    if run.step:
        lines.append(f"resumed at step {run.step}")
    return "\n".join(lines)
