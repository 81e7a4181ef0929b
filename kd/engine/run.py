"""A training run: its parts, and how it is built, saved and restored."""
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import DataError, build_dataset, build_loader
from data.coco.columns import flat
from data.coco.unlabelled import evaluated_too, paths_of
from data.errors import counted, listed
from data.ranges import Count, Number
from models import ConfigError, Detector
from models.checkpoints.sources import file_hash, is_address, local_path
from models.initial import InitialReport
from models.weights import CheckpointError

from ..build import build_model, start_student
from ..checks import check_unlabelled, teacher_model
from ..config import Config
from ..config.late import never_reached
from ..config.resume import REFUSE, WARN, Change, changes
from ..distiller import Distiller
from ..evaluation.cost import brief, typical_size
from ..evaluation.evaluate import eval_loader
from ..inference.detectors import TEACHERS_MAP, by_name, knowledge, said, with_classes
from ..optim import build_optimizer, earlier_names, load_optimizer
from ..processes import distributed
from ..processes.memory import peak_memory
from ..processes.sharding import shard
from ..work_dir.checkpoint import WEIGHTS, check_entries, save_checkpoint
from .average import WeightAverage
from .clock import PartsClock
from .finite import FiniteWatch
from .layout import Layout, choose_layout, common_size

FEW_STEPS = 1000  # of a whole run; with fewer, a warning is shown
# What a checkpoint of a run holds. What earlier versions did not write may be missing.
STATE = {"model": WEIGHTS, "optimizer": dict, "scaler": dict, "step": Number, "steps_per_epoch": Count,
         "evaluated": bool, "best": float, "reported": list | None, "processes": Count | None,
         "config": dict | None, "classes": list[str] | None, "averaged": Number | None, "waited": Number | None,
         "init": dict | None, "unlabelled": Number | None, "seconds": float | None, "peak_memory": float | None,
         "layout": dict | None}
INNER = ("training", "methods", "gradient_shares")  # more of them that hold weights, where a run has them


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
    layout: Layout             # memory layouts of the detectors
    clock: PartsClock
    average: WeightAverage | None  # moving average of the student's weights
    step: int = 0              # optimiser steps done
    saved: int = -1            # step of last.pth
    evaluated: bool = False    # whether the figures of this step are in metrics.jsonl
    best: float = -1.0         # AP of the best evaluation
    waited: int = 0            # evaluations since then
    seconds: float | None = 0.0  # of training so far, without evaluations; None after a checkpoint that has no time
    peak: float | None = None  # memory of the first process in bytes, see `peak_memory`; also before a resumption
    overflows: Tensor | int = 0  # steps that fp16 has skipped
    weights_said: bool = False  # whether the log has the weights that follow from gradient_share
    start: InitialReport | None = None  # what was taken from train.init
    init: dict[str, str] = field(default_factory=dict)  # SHA-256 of train.init by path, at the run's start

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

    @property
    def out_of_patience(self) -> bool:
        """Whether the last evaluation was the one that ends training, see `train.patience`."""
        patience = self.cfg.train.patience
        return patience is not None and self.evaluated and self.waited >= patience

    def spend(self, seconds: float) -> None:
        """Count the time of a step."""
        if self.seconds is not None:
            self.seconds += seconds

    def costs(self) -> dict[str, float]:
        """What training has cost so far, for metrics.jsonl; without what is not known."""
        self.peak = max((each for each in (self.peak, peak_memory(self.device)) if each is not None), default=None)
        known = {"training_seconds": self.seconds, "peak_memory_bytes": self.peak}
        return {name: value for name, value in known.items() if value is not None}

    def evaluates(self, epoch: int) -> bool:
        """Whether an evaluation is due after an epoch, counted from 0."""
        every, last = self.cfg.eval.every, self.cfg.train.epochs - 1
        return self.val_loader is not None and (epoch == last or (every > 0 and (epoch + 1) % every == 0))


def build_run(cfg: Config, work_dir: Path, device: torch.device, state: dict | None = None) -> Run:
    """Build the data, models and optimiser of a run, before its first step.

    Args:
        state: the checkpoint that the run goes on from: all weights of the student are restored next, so none are
            loaded here; and the memory layouts stay as they were.
    """
    resumed = state is not None
    settings, data, rank, world = cfg.train, cfg.data, distributed.rank(), distributed.world_size()
    if data is None:
        raise ConfigError("data", "missing: give data.train, which is trained on")
    if settings.patience is not None and (data.val is None or cfg.eval.every == 0):
        raise ConfigError("train.patience", "counts evaluations during training: give data.val, and eval.every above 0")
    if settings.sync_bn and world > 1 and device.type != "cuda":
        raise ConfigError("train.sync_bn", "PyTorch synchronises batch norms on CUDA only: remove it")
    check_unlabelled(cfg)
    train_set = build_dataset(data, "train", training=True, seed=settings.seed, epochs=settings.epochs)
    if not len(flat(train_set.labels)[0]):
        raise DataError(f"annotation file {train_set.annotation_file} has no box to learn: add boxes, or see "
                        "scripts/check_data.py for what was left out")
    cfg = with_classes(cfg, train_set)
    val_set = build_dataset(data, "val", training=False, classes=train_set.classes) if data.val else None
    torch.manual_seed(settings.seed)
    check_teachers_classes(cfg, train_set.classes)
    init = None if resumed else settings.init
    model = build_model(cfg, pretrained=not resumed and init is None)
    start = None if init is None else start_student(getattr(model, "student", model), cfg, train_set.classes)
    for i, entry in enumerate(cfg.teachers):
        if entry.shard:
            shard(model.teachers[i], device)
    model = model.to(device).train()
    layout = choose_layout(model, cfg, device, common_size(train_set), data.batch_size, state)
    if settings.sync_bn and world > 1:
        distributed.synchronise_norms(model)
    for key, given in (("train.prefetch", settings.prefetch),
                       ("distill.teacher_stream", cfg.distill and cfg.distill.teacher_stream)):
        if given and device.type != "cuda":
            raise ConfigError(key, "needs CUDA: remove it")
    if cfg.distill and cfg.distill.teacher_stream:
        model.stream = torch.cuda.Stream(device)
    if settings.compile:
        model.compile()
    optimizer = build_optimizer(cfg.optimizer, model, data.batch_size * world * settings.accumulate)
    train_loader = build_loader(train_set, data.batch_size, True, data.workers, settings.seed, data.group_by_aspect,
                                rank, world, data.worker_start, data.unlabelled_ratio, stored_views(cfg))
    run = Run(cfg, device, work_dir, model, optimizer,
              torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16"), train_loader,
              None if val_set is None else eval_loader(cfg, val_set), FiniteWatch(device), layout, PartsClock(device),
              None, start=start, init={} if init is None else {init: file_hash(local_path(init))})
    if run.distiller:
        run.distiller.on_part = run.clock.mark
    if settings.ema is not None:
        run.average = WeightAverage(run.student, settings.ema)
    return run


def stored_views(cfg: Config) -> int:
    """How many views of an image `distill.cache` stores when it meets the first one; 0 without it."""
    if not (cfg.distill and cfg.distill.cache):
        return 0
    return 2 if 0 < cfg.data.flip < 1 and cfg.train.epochs > 1 else 1


def check_teachers_classes(cfg: Config, classes: list[str]) -> None:
    """Raise ConfigError if a teacher's checkpoint has other class names than the data, or another order.

    A teacher whose configuration sets another number of classes is for methods that compare no classes.
    """
    for entry in cfg.teachers:
        path = entry.checkpoint
        if entry.features_only or entry.class_map is not None or path is None:
            continue
        if ((is_address(path) or Path(path).is_file())
                and teacher_model(entry).head.get("num_classes") in (None, len(classes))):
            key = TEACHERS_MAP
            names, class_map = by_name(path, entry.part, classes, key)
            if class_map is not None:
                raise ConfigError(key, f"missing: {path} has {said(names)}, and the data {said(classes)}: say "
                                       f"{key}=[{','.join(map(str, class_map))}]")


def save_run(run: Run, name: str) -> None:
    """Write the run's state into its work dir; with a moving average, `model` is that and `training` the student."""
    if distributed.rank() != 0:
        return
    methods, reported = (run.distiller.methods.state_dict(), run.distiller.reported) if run.distiller else ({}, ())
    state = {"model": run.evaluated_model.state_dict(), "methods": methods, "reported": sorted(reported),
             "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(), "step": run.step,
             "steps_per_epoch": run.steps_per_epoch, "evaluated": run.evaluated, "best": run.best,
             "waited": run.waited, "processes": distributed.world_size(), "config": dict(run.cfg), "init": run.init,
             "classes": run.train_loader.dataset.classes, "unlabelled": unlabelled_count(run),
             "seconds": run.seconds, "peak_memory": None if run.peak is None else float(run.peak),
             "layout": asdict(run.layout)}
    if run.distiller:
        state["gradient_shares"] = run.distiller.gradient_shares.state()
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
    inner = {key: WEIGHTS for key in INNER if key in state}
    check_entries(state, STATE | inner, f"checkpoint {path}")
    classes, world = run.train_loader.dataset.classes, distributed.world_size()
    if state.get("classes", classes) != classes:
        raise CheckpointError(f"checkpoint {path} has the classes {listed(state['classes'], ', ')}, and the data "
                              f"{listed(classes, ', ')}: resume with the data that the run was started with")
    # Earlier versions wrote no configuration, or no number of processes.
    try:
        found = changes(state.get("config", run.cfg), run.cfg, (state.get("processes", world), world))
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(f"checkpoint {path} is damaged: its config cannot be read") from None
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
            run.distiller.gradient_shares.load(state.get("gradient_shares", {}))
            run.distiller.reported = {(key, name) for key, name in state["reported"]}
        load_optimizer(run.optimizer, state["optimizer"], earlier_names(run.model, saved))
        if state["scaler"]:  # of a run in fp16
            run.scaler.load_state_dict(state["scaler"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        first = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint {path} is of another model or configuration: {first}") from None
    run.step, run.evaluated, run.best = state["step"], state["evaluated"], state["best"]
    run.waited, run.init = state.get("waited", 0), state.get("init", {})
    run.seconds, run.peak = state.get("seconds"), state.get("peak_memory")
    before, now = (counted(number, "image") for number in (state.get("unlabelled", 0), unlabelled_count(run)))
    if before != now:
        found.append(Change("data.unlabelled.images", before, now))
    return [change for change in found if change.rule == WARN]


def unlabelled_count(run: Run) -> int:
    """The number of unlabelled images that a run trains on."""
    return run.train_loader.batch_sampler.unlabelled


def describe_unlabelled(run: Run) -> list[str]:
    """Lines about the unlabelled images: how many there are, which methods see them, and whether data.val has some."""
    if not unlabelled_count(run):
        return []
    world, batch = distributed.world_size(), run.cfg.data.batch_size
    names = {needs: ", ".join(dict.fromkeys(type(method).__name__ for methods in run.distiller.methods
                                            for method in methods if method.needs_labels == needs))
             for needs in (False, True)}
    more = run.train_loader.batch_sampler.unlabelled_in(batch * world) // world
    lines = [f"{counted(unlabelled_count(run), 'unlabelled image')}, {more} in a batch with "
             f"{counted(batch, 'labelled image')}: for {names[False]}" +
             (f", not for {names[True]}" if names[True] else "")]
    if run.val_loader is not None:
        sets = (run.train_loader.dataset.unlabelled, run.val_loader.dataset)
        lines += [warning] if (warning := evaluated_too(*map(paths_of, sets))) else []
    return lines


def describe_run(run: Run) -> str:
    """A few lines about the run, for its start."""
    data = run.train_loader.dataset
    size, shown = typical_size(data.scale), run.train_loader.batch_sampler.shown
    lines = [f"{counted(len(data), 'training image')}, {counted(data.num_classes, 'class')}, "
             f"{counted(run.steps_per_epoch, 'step')} per epoch, {counted(run.cfg.train.epochs, 'epoch')} on "
             f"{run.device}",
             f"{'student' if run.distiller else 'detector'}: {brief(run.student, size)} on an image of "
             f"{size[0]} x {size[1]}"]
    files = Counter(file for _, file in data.origins)
    lines += [f"from {file}: {counted(number, 'image')}" for file, number in files.items() if len(files) > 1]
    if shown != len(data):
        lines.append(f"images shown in an epoch, with repeats: {shown}")
    lines += describe_unlabelled(run)
    world, batch, times = distributed.world_size(), run.cfg.data.batch_size, run.cfg.train.accumulate
    lines.append(f"learning rate {run.optimizer.defaults['lr']:g}, with {counted(world * batch * times, 'image')} per "
                 f"step: {counted(world, 'process')} x {batch} per batch x {counted(times, 'batch')}")
    steps = run.cfg.train.epochs * run.steps_per_epoch
    if steps < FEW_STEPS:
        lines.append(f"WARNING: {counted(steps, 'step')} in total; detectors usually need some thousands: raise "
                     "train.epochs and schedule.milestones")
    lines += [f"WARNING: {line}" for line in never_reached(run.cfg, run.steps_per_epoch)]
    if run.distiller:
        teachers = zip(run.cfg.teachers, run.distiller.teachers, run.distiller.methods)
        for i, (entry, teacher, methods) in enumerate(teachers):
            names = ", ".join(type(method).__name__ for method in methods)
            which = "" if len(run.cfg.teachers) == 1 else f" {i} ({entry.name})" if entry.name else f" {i}"
            lines.append(f"teacher{which}: {brief(teacher, size)}, "
                         f"{f'distilled by {names}' if names else 'not distilled'}{knowledge(teacher, data.classes)}")
    boxes = np.bincount(flat(data.labels)[0], minlength=data.num_classes)
    if absent := [name for name, number in zip(data.classes, boxes) if not number]:
        lines.append(f"classes without a box in the training data, which are not learned: {listed(absent, ', ')}")
    if data.num_dropped_boxes:
        lines.append(f"boxes left out (degenerate, outside the image, or marked as ignored): {data.num_dropped_boxes}")
    lines += run.layout.describe()
    if run.start is not None:
        lines.append(str(run.start))
    if run.step:
        lines.append(f"resumed at step {run.step}{'; train.init is not loaded again' if run.cfg.train.init else ''}")
    return "\n".join(lines)
