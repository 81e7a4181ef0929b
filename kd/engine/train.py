"""The training loop. Everything that happens in a step is in `train_step`, in order."""
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from logging import Logger
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.augment.emptied import EmptiedImages
from data.errors import counted
from data.output import write_text
from data.tables import percent, points

from ..config import parse_config
from ..evaluation.coco import format_figures
from ..evaluation.evaluate import evaluate
from ..exceptions import Stopped, TrainingError
from ..optim import clip_gradients, lr_factor
from ..processes import distributed
from ..processes.signals import StopAsked, StopSignals
from ..work_dir.checkpoint import read_checkpoint
from ..work_dir.lock import open_work_dir
from ..work_dir.log import Clock, Meter, Metrics, in_hours, open_log
from ..work_dir.provenance import provenance
from .cached import ahead, describe_caches, open_caches, report_caches
from .clock import PREFIX, parts_of
from .finite import describe_broken_step, keep_statistics
from .loggers import Loggers, need_loggers, open_loggers
from .prefetch import prefetched
from .replay import save_replay
from .run import Run, build_run, describe_run, restore_run, save_run
from .skipped import SkippedImages
from .start import starting_points
from .step import compute_losses, seed_step, to_device

SMALLEST_SCALE = 2.0 ** -20  # of the loss in fp16


class Reports(NamedTuple):
    """Where a run reports what happens."""

    log: Logger
    metrics: Metrics
    loggers: Loggers
    skipped: SkippedImages
    clock: Clock
    emptied: EmptiedImages


def train(cfg: Mapping, work_dir: Path, device: torch.device, resume_from: Path | None = None) -> dict:
    """Train the model of a configuration to the end of its last epoch, or of `train.patience`.

    Returns:
        The figures of the last evaluation, empty without data.val.
    Raises:
        ConfigError, DataError, CheckpointError: bad input, before anything is written.
        WorkDirError: the work dir cannot be written, or another run uses it.
        TrainingError: a loss that is not finite.
        Stopped: SIGINT or SIGTERM, after saving.
    """
    device = distributed.start_processes(device)
    resume_from = distributed.from_first(resume_from)
    cfg = parse_config(cfg)
    need_loggers(cfg)
    state = None if resume_from is None else read_checkpoint(resume_from)
    run = build_run(cfg, work_dir, device, state)
    changes = [] if state is None else restore_run(run, state, resume_from)
    del state  # it has a copy of all weights
    first = distributed.rank() == 0
    lock = open_work_dir(work_dir, first)
    log = open_log(work_dir, distributed.rank())
    origin = provenance(run.cfg, device, run.init) | {"layout": asdict(run.layout)} if first else {}
    loggers = open_loggers(run, origin, log)
    metrics = Metrics(work_dir / "metrics.jsonl" if first else None, run.step, run.evaluated, loggers.show)
    if first:
        write_text(work_dir / "run.json", json.dumps(origin, indent=1))
    log.info("\n".join([describe_run(run), *describe_caches(run)]))
    open_caches(run)
    for change in changes:
        log.warning(f"since the checkpoint, {change}")
    model = in_parallel(run)

    settings = run.cfg.train
    if run.distiller and run.step == 0 and settings.check_images and run.val_loader is not None:
        log.info(starting_points(run.distiller, run.cfg, run.train_loader.dataset.classes, device))
    figures = {}
    if run.step >= settings.epochs * run.steps_per_epoch and run.evaluated:
        log.info("all epochs are done already: set a larger train.epochs to go on")
    reports = Reports(log, metrics, loggers, SkippedImages(log), Clock(), EmptiedImages())
    with lock, loggers, StopSignals() as signals:
        for epoch in range(max(0, run.step - 1) // run.steps_per_epoch, settings.epochs):
            train_epoch(run, model, epoch, reports, signals)
            if run.evaluates(epoch) and not run.evaluated:
                figures = evaluate_epoch(run, epoch, reports, signals)
            if run.out_of_patience:
                log.info("stopped after epoch %d, because %s brought no better AP than %s (train.patience)", epoch + 1,
                         counted(run.waited, "evaluation"), points(run.best))
                break
        # A run that was resumed from another folder may have written neither.
        written = [f"the {name} checkpoint is {path}" for name in ("last", "best")
                   if (path := work_dir / f"{name}.pth").is_file()]
        log.info(", ".join(["done", *written]))
    return figures


def in_parallel(run: Run) -> nn.Module:
    """The run's model, wrapped for several processes if there are several."""
    # A method that does not run at a step leaves its adapters without a gradient.
    pauses = run.distiller is not None and not run.distiller.all_methods_always_run
    return distributed.data_parallel(run.model, run.device, sometimes_unused=pauses)


def train_epoch(run: Run, model: nn.Module, epoch: int, reports: Reports, signals: StopSignals) -> None:
    """Train for the rest of one epoch, and save a checkpoint at its end."""
    done = run.step - epoch * run.steps_per_epoch
    if done == run.steps_per_epoch:  # resumed between the last step and the evaluation
        return
    settings, (log, metrics, loggers, skipped, clock, emptied) = run.cfg.train, reports
    model.train()
    run.evaluated = False
    sampler = run.train_loader.batch_sampler
    sampler.epoch, sampler.start = epoch, done * settings.accumulate
    meter, _ = Meter(), run.clock.read()  # both start now
    steps = ahead(run, in_runs(run.train_loader, settings.accumulate))
    steps = run.clock.waits(prefetched(steps, run.device) if settings.prefetch else steps)
    bar = tqdm(steps, f"epoch {epoch + 1}/{settings.epochs}", run.steps_per_epoch, initial=done, leave=False,
               disable=None if distributed.rank() == 0 else True)
    for batches in bar:
        for _, targets in batches:
            skipped.note(targets)
            if warning := emptied.note(targets):
                log.warning(warning)
        run.finite.check()
        losses, norms = train_step(run, model, batches)
        run.spend(clock.tick("step"))
        meter.add(losses, sum(len(images) for images, _ in batches) * distributed.world_size())
        if norms:
            metrics.write({"epoch": epoch, "step": run.step} | {f"grad_norm/{k}": v for k, v in norms.items()})
            log.info("gradient norms at the neck: %s", " ".join(f"{k} {v:.3g}" for k, v in norms.items()))
        loggers.pictures(run.step, {"student" if run.distiller else "detector": run.evaluated_model})
        if run.step % settings.log_every == 0:
            run.finite.check()
            bar.set_postfix(log_step(run, epoch, meter, reports))
        asked = signals.agreed()
        if asked or (settings.checkpoint_every and run.step % settings.checkpoint_every == 0):
            run.finite.check()
            save_run(run, "last.pth")
        if asked:
            raise stopped(run, asked)
    run.finite.check()
    skipped.report(epoch)
    report_caches(run, epoch)
    save_run(run, "last.pth")


def log_step(run: Run, epoch: int, meter: Meter, reports: Reports) -> dict[str, str]:
    """Record and log the steps since the last logged one; returns a short form for the progress bar."""
    steps, epochs = run.cfg.train.epochs * run.steps_per_epoch, range(epoch, run.cfg.train.epochs)
    record = {"epoch": epoch, "step": run.step, "lr": run.optimizer.param_groups[0]["lr"]} | meter.read()
    if run.scaler.is_enabled():
        record |= {"loss_scale": run.scaler.get_scale(), "skipped_steps": int(run.overflows)}
        check_scale(run)
    left = reports.clock.left(step=steps - run.step, evaluation=sum(map(run.evaluates, epochs)))
    record |= run.clock.read() | {"seconds/left": left}
    reports.metrics.write(record)
    say_weights(run, reports.log)
    parts, left = parts_of(record), in_hours(left)
    shown = {k: "-" if v is None else f"{v:.4g}" for k, v in record.items()
             if k not in ("epoch", "step") and not k.startswith(PREFIX)}
    values, times = (" ".join(f"{k} {v}" for k, v in each.items()) for each in (shown, parts))
    reports.log.info("epoch %d step %d/%d %s, time: %s, %s left", epoch + 1, run.step, steps, values, times, left)
    shares = {k.removeprefix("share/"): percent(v) for k, v in record.items() if k.startswith("share/")}
    return {"loss": shown["loss"], "run_left": left} | shares | parts


def say_weights(run: Run, log: Logger) -> None:
    """Log the weights that were measured, once: this waits for the device, so it goes with the first logged step."""
    if run.distiller and not run.weights_said:
        for line in run.distiller.gradient_shares.describe():
            log.info(line)
        run.weights_said = True


def stopped(run: Run, signum: int) -> Stopped:
    """The error that ends a run after a signal. Its last.pth has been saved."""
    return Stopped(signum, f"stopped at step {run.step} after saving {run.work_dir / 'last.pth'}: the same command "
                           "with --resume goes on from there")


def in_runs(loader: Iterable, length: int) -> Iterator[list]:
    """Collect what a loader yields in lists of `length`; the last one may be shorter."""
    batches = iter(loader)
    while taken := list(islice(batches, length)):
        yield taken


def train_step(run: Run, model: nn.Module, batches: list[tuple[Tensor, list[dict]]]) -> tuple[dict, dict]:
    """One optimiser step.

    Args:
        model: the run's model, or a wrapper around it.
        batches: uint8 images (N, 3, H, W) and targets; the gradients of several batches are averaged.
    Returns:
        The losses, with their sum `loss`, each method's share of it and the weights that are measured; the gradient
        norms at the neck if they are due.
    """
    settings, scaler, distiller = run.cfg.train, run.scaler, run.distiller
    run.clock.start()
    seed_step(settings.seed, run.step, distributed.rank())
    factor = lr_factor(run.cfg.schedule, run.step, run.steps_per_epoch, settings.epochs)
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    norms_due = bool(distiller and settings.grad_norm_every and run.step % settings.grad_norm_every == 0)
    if distiller:
        distiller.advance(run.step, run.steps_per_epoch, settings.epochs)

    put_statistics_back = keep_statistics(run.student) if scaler.is_enabled() else None
    run.optimizer.zero_grad(set_to_none=True)
    found: list[dict[str, Tensor]] = []
    for images, targets in batches:
        last = len(found) == len(batches) - 1
        with nullcontext() if last or model is run.model else model.no_sync():
            images, targets = to_device(images, targets, run.student, run.device)
            run.clock.mark("data")
            losses, total, student = compute_losses(model, images, targets, run.device, settings.amp)
            norms = distiller.gradient_norms(losses, student.features, scaler.get_scale()) if norms_due else {}
            run.clock.mark("methods" if distiller else "student")
            positives = student.positives
            del student  # so that the backward pass can free its outputs
            scaler.scale(total / len(batches)).backward()
            run.clock.mark("backward")
        found.append(losses | {"loss": total, "positives_per_image": positives} |
                     (distiller.shares(losses) | distiller.measured_weights() if distiller else {}))
    losses = {name: sum(each[name].detach() for each in found) / len(found) for name in found[0]}

    scaler.unscale_(run.optimizer)
    norm = clip_gradients(run.model, settings.grad_clip)
    broken = ~(torch.isfinite(losses["loss"]) & torch.isfinite(norm))
    if scaler.is_enabled():
        run.overflows += broken
        put_statistics_back(broken)
    else:
        watch(run, broken, losses, batches)
    # Not all optimisers heed the flag on MPS, so there the step waits for it.
    if run.device.type != "mps" or not broken:
        scaler.step(run.optimizer)
    scaler.update()
    if run.average is not None:
        run.average.update(run.student)
    run.clock.mark("optimizer")
    run.step += 1
    return losses, norms


def watch(run: Run, broken: Tensor, losses: dict[str, Tensor], batches: list[tuple[Tensor, list[dict]]]) -> None:
    """Make the optimiser skip a step whose loss or gradient is not finite, and the run stop before the next step."""
    flag = run.finite.found_inf(broken)
    run.optimizer.grad_scale, run.optimizer.found_inf = None, flag  # what a GradScaler tells a fused optimiser
    step = run.step

    def report() -> str:
        path = run.work_dir / f"replay{distributed.rank() or ''}.pth"
        save_replay(run, path, step, batches)
        return describe_broken_step(losses, [target for _, targets in batches for target in targets], step + 1, path)

    run.finite.look_at(flag, report)


def check_scale(run: Run) -> None:
    """Raise TrainingError if every step overflows in fp16, so that the loss scale has become too small."""
    if run.scaler.get_scale() < SMALLEST_SCALE:
        raise TrainingError(f"train.amp=fp16: {counted(int(run.overflows), 'step')} overflowed, at every loss scale. "
                            "Train with train.amp=bf16 or none, which keep the first such step for a replay")


def evaluate_epoch(run: Run, epoch: int, reports: Reports, signals: StopSignals) -> dict:
    """Evaluate on data.val, record the figures, and save a checkpoint if they are the best so far.

    A signal stops the evaluation, so that a resumed run repeats it.
    """
    costs = run.costs()
    distributed.share_buffers(run.evaluated_model)
    try:
        figures = evaluate(run.evaluated_model, run.val_loader, run.device, run.cfg.train.amp,
                           run.work_dir / "precision_recall.json", signals=signals)
    except StopAsked as stop:
        save_run(run, "last.pth")  # a run that was resumed from another folder has none here yet
        raise stopped(run, *stop.args) from None
    run.evaluated, better = True, (figures["AP"] or 0) > run.best
    run.waited = 0 if better else run.waited + 1
    reports.metrics.write({"epoch": epoch, "step": run.step} | figures | costs |
                          ({"out_of_patience": True} if run.out_of_patience else {}))
    reports.log.info("epoch %d on data.val, in points\n%s", epoch + 1, format_figures(figures))
    if better:
        run.best = figures["AP"] or 0
        save_run(run, "best.pth")
    save_run(run, "last.pth")
    reports.clock.tick("evaluation")
    if epoch + 1 < run.cfg.train.epochs and not run.out_of_patience and (asked := signals.agreed_now()):
        raise stopped(run, asked)
    return figures
