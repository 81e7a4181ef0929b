"""The training loop. Everything that happens in a step is in `train_step`, in order."""
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import build_dataset, build_loader, read_data_config
from models import ConfigError, Detector, build_detector
from models.weights import CheckpointError

from ..distiller import Distiller, build_distiller
from . import distributed
from .checkpoint import read_checkpoint, save_checkpoint
from .evaluate import autocast, coco_figures, detect, eval_loader, format_figures, with_classes
from .lock import open_work_dir
from .log import Meter, Metrics, open_log, provenance
from .optim import ScheduleConfig, build_optimizer, lr_factor
from .settings import EvalConfig, TrainConfig
from .signals import Stopped, StopSignals
from .skipped import SkippedImages
from .start import starting_points
from .summary import count_parameters


@dataclass
class Run:
    """Everything that a training run consists of."""

    cfg: dict
    settings: TrainConfig
    schedule: ScheduleConfig
    device: torch.device
    work_dir: Path
    model: Detector | Distiller
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    train_loader: torch.utils.data.DataLoader
    val_loader: torch.utils.data.DataLoader | None
    step: int = 0              # optimiser steps done
    evaluated: bool = False    # whether the figures of this step are in metrics.jsonl
    best: float = -1.0         # AP of the best evaluation
    skipped: SkippedImages = field(default_factory=SkippedImages)

    @property
    def distiller(self) -> Distiller | None:
        return self.model if isinstance(self.model, Distiller) else None

    @property
    def student(self) -> Detector:
        return self.model.student if self.distiller else self.model

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_loader)


def train(cfg: dict, work_dir: Path, device: torch.device, resume_from: Path | None = None) -> dict:
    """Train what a configuration describes, to the end of its epochs.

    Returns:
        The figures of the last evaluation, empty without data.val.
    Raises:
        ConfigError, DataError, CheckpointError: bad input, before anything is written.
        WorkDirError: the work dir cannot be written, or another run is in it.
        TrainingError: a loss that is not finite.
        Stopped: SIGINT or SIGTERM, after saving.
    """
    device = distributed.start_processes(device)
    run = build_run(cfg, work_dir, device)
    if resume_from is not None:
        restore(run, read_checkpoint(resume_from), resume_from)
    first = distributed.rank() == 0
    lock = open_work_dir(work_dir, first)
    log = open_log(work_dir, distributed.rank())
    metrics = Metrics(work_dir / "metrics.jsonl" if first else None, run.step)
    if first:
        (work_dir / "run.json").write_text(json.dumps(provenance(run.cfg, device), indent=1), encoding="utf-8")
    log.info(describe(run))
    model = run.model
    if distributed.world_size() > 1:
        # A method that does not run at a step leaves its adapters without a gradient.
        model = DistributedDataParallel(model, [device.index] if device.type == "cuda" else None,
                                        find_unused_parameters=run.distiller is not None)

    if run.distiller and run.step == 0 and run.settings.check_images and run.val_loader is not None:
        log.info(starting_points(run.distiller, run.cfg, run.settings.check_images, device, run.settings.amp))
    figures, last = {}, run.settings.epochs - 1
    if run.step >= run.settings.epochs * run.steps_per_epoch and run.evaluated:
        log.info("all of its epochs are done already: a larger train.epochs goes on")
    every = EvalConfig(**cfg.get("eval", {})).every
    with lock, StopSignals() as signals:
        for epoch in range(max(0, run.step - 1) // run.steps_per_epoch, run.settings.epochs):
            train_epoch(run, model, epoch, metrics, log, signals)
            due = epoch == last or (every > 0 and (epoch + 1) % every == 0)
            if due and run.val_loader is not None and not run.evaluated:
                figures = evaluate_epoch(run, epoch, metrics, log)
    return figures


def train_epoch(run: Run, model: nn.Module, epoch: int, metrics: Metrics, log, signals: StopSignals) -> None:
    """What is left of one epoch, and a checkpoint at its end."""
    done = run.step - epoch * run.steps_per_epoch
    if done == run.steps_per_epoch:  # resumed between the last step and the evaluation
        return
    settings = run.settings
    model.train()
    run.evaluated = False
    run.train_loader.batch_sampler.epoch, run.train_loader.batch_sampler.start = epoch, done
    meter = Meter()
    bar = tqdm(run.train_loader, f"epoch {epoch + 1}/{settings.epochs}", run.steps_per_epoch, initial=done, leave=False,
               disable=None if distributed.rank() == 0 else True)
    for images, targets in bar:
        run.skipped.note(targets, log)
        losses, norms = train_step(run, model, images, targets)
        meter.add(losses, len(images))
        if norms:
            metrics.write({"epoch": epoch, "step": run.step} | {f"grad_norm/{k}": v for k, v in norms.items()})
            log.info("gradient norms at the neck: %s", " ".join(f"{k} {v:.3g}" for k, v in norms.items()))
        if run.step % settings.log_every == 0:
            record = {"epoch": epoch, "step": run.step, "lr": run.optimizer.param_groups[0]["lr"]} | meter.read()
            metrics.write(record)
            bar.set_postfix(loss=f"{record['loss']:.3f}")
            log.info("epoch %d step %d/%d %s", epoch + 1, run.step, settings.epochs * run.steps_per_epoch,
                     " ".join(f"{k} {v:.4g}" for k, v in record.items() if k not in ("epoch", "step")))
        asked = distributed.any_process(signals.asked)
        if asked:
            meter.read()
            save(run, "last.pth")
            raise Stopped(asked, f"stopped at step {run.step} after saving {run.work_dir / 'last.pth'}: the same "
                                 "command with --resume goes on from there")
    if meter.steps:
        meter.read()
    run.skipped.report(epoch, log)
    save(run, "last.pth")


def train_step(run: Run, model: nn.Module, images: Tensor, targets: list[dict]) -> tuple[dict, dict[str, float]]:
    """One optimiser step.

    Args:
        model: the run's, or what wraps it.
        images: uint8 (N, 3, H, W).
    Returns:
        The losses, their sum, `loss`, and each method's share of it; gradient norms at the neck where they are due.
    """
    settings, device, distiller = run.settings, run.device, run.distiller
    # What is random in a step (a method's masks, a backbone's dropped paths) follows from its number, on every process
    # differently, so that a resumed run repeats it.
    torch.manual_seed(hash((settings.seed, run.step, distributed.rank())))
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_factor(run.schedule, run.step, run.steps_per_epoch)
    norms_due = bool(distiller and settings.grad_norm_every and run.step % settings.grad_norm_every == 0)
    if distiller:
        distiller.advance(run.step, run.steps_per_epoch, settings.epochs)
        distiller.keep_features = norms_due
    images = run.student.preprocess(images.to(device, non_blocking=True), targets)
    targets = [{k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in t.items()} for t in targets]
    with autocast(device, settings.amp):
        losses = model(images, targets)
        total = sum(value for name, value in losses.items() if "loss" in name)
    norms = distiller.gradient_norms(losses, run.scaler.get_scale()) if norms_due else {}
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(total).backward()
    run.scaler.unscale_(run.optimizer)
    if settings.grad_clip is not None:
        nn.utils.clip_grad_norm_(trained(run.model), settings.grad_clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.step += 1
    return losses | {"loss": total} | (distiller.shares(losses) if distiller else {}), norms


def evaluate_epoch(run: Run, epoch: int, metrics: Metrics, log) -> dict:
    """The student's figures on data.val, noted, and a checkpoint if they are the best so far."""
    results = detect(run.student, run.val_loader, run.device, run.settings.amp)
    figures = coco_figures(results, run.val_loader.dataset)
    metrics.write({"epoch": epoch, "step": run.step} | figures)
    log.info("epoch %d on data.val, in points\n%s", epoch + 1, format_figures(figures))
    run.evaluated = True
    if (figures["AP"] or 0) > run.best:
        run.best = figures["AP"] or 0
        save(run, "best.pth")
    save(run, "last.pth")
    return figures


def build_run(cfg: dict, work_dir: Path, device: torch.device) -> Run:
    """Data, models and optimiser of a run, at its first step."""
    settings, rank, world = TrainConfig(**cfg.get("train", {})), distributed.rank(), distributed.world_size()
    if cfg.get("data") is None:
        raise ConfigError("data", "missing: what is to be trained on?")
    data = read_data_config(cfg["data"])
    train_set = build_dataset(data, "train", training=True, seed=settings.seed)
    cfg = with_classes(cfg, train_set)
    val_set = build_dataset(data, "val", training=False) if data.val else None
    if val_set is not None and val_set.classes != train_set.classes:
        raise ConfigError("data.val", f"has classes {val_set.classes}, and data.train {train_set.classes}")
    torch.manual_seed(settings.seed)
    model = (build_distiller(cfg) if cfg.get("distill") else build_detector(cfg["model"])).to(device)
    optimizer = build_optimizer(cfg.get("optimizer", {}), model, data.batch_size * world)
    train_loader = build_loader(train_set, data.batch_size, True, data.workers, settings.seed, data.group_by_aspect,
                                rank, world)
    return Run(cfg, settings, ScheduleConfig(**cfg.get("schedule", {})), device, work_dir, model, optimizer,
               torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16"), train_loader,
               None if val_set is None else eval_loader(cfg, val_set))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save(run: Run, name: str) -> None:
    """Write the run's state into its work dir."""
    if distributed.rank() != 0:
        return
    methods, reported = (run.distiller.methods.state_dict(), run.distiller.reported) if run.distiller else ({}, ())
    save_checkpoint(run.work_dir / name, {
        "model": run.student.state_dict(), "methods": methods, "reported": sorted(reported),
        "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(), "step": run.step,
        "steps_per_epoch": run.steps_per_epoch, "evaluated": run.evaluated, "best": run.best, "config": run.cfg,
        "classes": run.train_loader.dataset.classes})


def restore(run: Run, state: dict, path: Path) -> None:
    """Put a run where a checkpoint left it.

    Raises:
        CheckpointError: it belongs to another model, method or batch size.
    """
    if state["steps_per_epoch"] != run.steps_per_epoch:
        raise CheckpointError(f"checkpoint {path} has {state['steps_per_epoch']} steps an epoch and this run "
                              f"{run.steps_per_epoch}: resume with the data and batch size that it was started with")
    try:
        run.student.load_state_dict(state["model"])
        if run.distiller:
            run.distiller.methods.load_state_dict(state["methods"])
            run.distiller.reported = {(key, name) for key, name in state["reported"]}
        run.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        first = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint {path} is of another model or configuration: {first}") from None
    run.scaler.load_state_dict(state["scaler"])
    run.step, run.evaluated, run.best = state["step"], state["evaluated"], state["best"]


def describe(run: Run) -> str:
    """What is about to run, in a few lines."""
    data = run.train_loader.dataset
    lines = [f"{len(data)} training images, {data.num_classes} classes, {run.steps_per_epoch} steps an epoch, "
             f"{run.settings.epochs} epochs on {run.device}",
             f"{'student' if run.distiller else 'detector'}: "
             f"{count_parameters(run.student) / 1e6:.2f} M parameters"]
    if run.distiller:
        for teacher, methods in zip(run.distiller.teachers, run.distiller.methods):
            lines.append(f"teacher: {count_parameters(teacher) / 1e6:.2f} M parameters, "
                         f"distilled by {', '.join(type(m).__name__ for m in methods)}")
    if data.num_dropped_boxes:
        lines.append(f"{data.num_dropped_boxes} degenerate boxes were dropped")
    if run.step:
        lines.append(f"resumed at step {run.step}")
    return "\n".join(lines)
