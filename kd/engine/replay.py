"""Saves a failed step, and repeats it."""
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from data.ranges import Count, Number
from models.weights import CheckpointError

from ..build import build_model
from ..config import Config, parse_config
from ..distiller import Distiller
from ..processes import distributed
from ..work_dir.checkpoint import WEIGHTS, check_entries, read_plain, write_whole
from .layout import kept_layout
from .run import Run
from .step import compute_losses, seed_step, to_device

FORMAT = "densekd-replay"
STATE = {"config": dict, "step": Number, "rank": Number, "steps_per_epoch": Count, "batches": list, "model": WEIGHTS,
         "methods": WEIGHTS, "layout": dict | None}


def save_replay(run: Run, path: Path, step: int, batches: list[tuple[Tensor, list[dict]]]) -> None:
    """Write the batches of a step, and the weights before it."""
    methods = run.distiller.methods.state_dict() if run.distiller else {}
    shares = run.distiller.gradient_shares.state() if run.distiller else {}
    write_whole(path, {"format": FORMAT, "config": dict(run.cfg), "step": step, "rank": distributed.rank(),
                       "steps_per_epoch": run.steps_per_epoch,
                       "batches": [(images.cpu(), targets) for images, targets in batches],
                       "model": run.student.state_dict(), "methods": methods,
                       "gradient_shares": shares, "layout": asdict(run.layout)})


def replay(path: Path, device: torch.device, trusted: Config | None = None) -> str:
    """Repeat the step in a file from `save_replay`, without an optimiser.

    Args:
        trusted: a configuration of the user; only its teachers may be made by a `factory`, because the file may be from
            somebody else, and a factory runs code.
    Returns:
        Text for people: all losses, the first modules with outputs that are not finite, and parameters whose gradients
        are not finite.
    Raises:
        CheckpointError: the file does not exist, or is not a replay file, or wants to run code that is not `trusted`.
    """
    state = read_plain(path, FORMAT, "file", "a replay file, which a run writes when a loss is not finite")
    check_entries(state, STATE | {key: WEIGHTS for key in ("gradient_shares",) if key in state}, f"file {path}")
    cfg = parse_config(state["config"])
    calls = [(entry.factory, entry.arguments) for entry in cfg.teachers if entry.factory is not None]
    allowed = [] if trusted is None else [(entry.factory, entry.arguments) for entry in trusted.teachers]
    if any(call not in allowed for call in calls):
        raise CheckpointError(f"file {path} calls {calls[0][0]}, which runs code: give your configuration with this "
                              "factory and the same arguments, too (--cfg)")
    model = build_model(cfg, pretrained=False).to(device).train()
    student, teachers = (model.student, model.teachers) if isinstance(model, Distiller) else (model, [])
    if layout := kept_layout(state, device, len(teachers)):
        layout.apply(model)
    try:
        student.load_state_dict(state["model"])
        if isinstance(model, Distiller):
            model.methods.load_state_dict(state["methods"])
            model.gradient_shares.load(state.get("gradient_shares", {}))  # earlier versions wrote none
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"file {path} is damaged: {' '.join(str(error).split())[:200]}") from None
    if not all(map(is_batch, state["batches"])):
        raise CheckpointError(f"file {path} is damaged: batches must be images with as many targets")
    if isinstance(model, Distiller):
        model.caches = []  # the teachers run, too
        model.advance(state["step"], state["steps_per_epoch"], cfg.train.epochs)

    broken: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: note(broken, name, output))
    lines = [f"step {state['step'] + 1} of {path}"]
    seed_step(cfg.train.seed, state["step"], state["rank"])
    for images, targets in state["batches"]:
        ids = ", ".join(str(target.get("image_id", "?")) for target in targets)
        losses, total, _ = compute_losses(model, *to_device(images, targets, student, device), device, cfg.train.amp)
        total.backward()
        lines.append(f"images {ids}: " + " ".join(f"{name} {value.item():.4g}" for name, value in losses.items()))
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    lines.append(f"outputs that are not finite, first ones first: {', '.join(broken[:5]) or 'none'}")
    lines.append(f"gradients that are not finite: {', '.join(bad[:5]) or 'none'}{', ...' if len(bad) > 5 else ''}")
    return "\n".join(lines)


def is_batch(batch: object) -> bool:
    """Whether this is a pair of images (N, 3, H, W) and N targets."""
    if not isinstance(batch, tuple) or len(batch) != 2 or not isinstance(batch[1], list):
        return False
    images, targets = batch
    if not torch.is_tensor(images) or images.dtype not in (torch.uint8, torch.float32) or images.ndim != 4:
        return False
    return images.shape[:2] == (len(targets), 3) and all(map(is_target, targets))


def is_target(target: object) -> bool:
    """Whether this is a dict with boxes, their labels, and the sizes of the image."""
    if not isinstance(target, dict):
        return False
    boxes, labels = target.get("boxes"), target.get("labels")
    sizes = [target.get(key) for key in ("image_size", "original_size")]
    return (torch.is_tensor(boxes) and torch.is_tensor(labels) and boxes.shape == (len(labels), 4)
            and not labels.is_floating_point() and all(isinstance(size, tuple) and len(size) == 2 for size in sizes))


def note(broken: list[str], name: str, output: object) -> None:
    """Remember a module whose output, or a part of it, is not finite."""
    parts = output if isinstance(output, (list, tuple)) else [output]
    if any(torch.is_tensor(part) and part.is_floating_point() and not part.isfinite().all() for part in parts):
        broken.append(name)
