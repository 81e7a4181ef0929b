"""How strongly each distillation method acts on the student."""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from losses import mean_over_processes, total_loss, widest_float

from ...distiller import seen_by
from ...gradients import gradient_norm
from ...inference.precision import autocast
from ..run import Run
from ..step import seed_step, to_device

SCALES = (1.0, 2.0 ** 8, 2.0 ** 16)  # of losses in fp16, whose gradients may overflow or vanish


@dataclass
class Influence:
    """What a method adds, at the weight that it has after its warm-up: means over a few batches."""

    loss: float             # share of its losses in the sum of all losses
    gradient: float | None  # norm of its gradient at the student's neck, over that of the student's own losses
    chosen: bool            # whether the weight is set to reach this gradient (`gradient_share`), or is 0


def influences(run: Run, batches: Sequence[tuple[Tensor, list[dict]]]) -> dict[str, Influence]:
    """The influence of each method on the first batches, by its name.

    With several processes, each has its own batches, as many as the others.
    """
    options = {option.name: option for of_teacher in run.distiller.options for option in of_teacher}
    seed_step(run.cfg.train.seed, 0, 0)
    sums = sum(mean_over_processes(strengths(run, batch, list(options))) for batch in batches) / len(batches)
    own, *losses = sums[0].tolist()
    own_norm, *norms = sums[1].tolist()
    found = {}
    for name, loss, norm in zip(options, losses, norms):
        option = options[name]
        factor, ratio = option.constant, norm / own_norm if own_norm > 0 else float("nan")
        if option.measured:
            factor = factor / ratio if ratio > 0 else 0.0
        known = ratio == ratio and ratio < float("inf")
        found[name] = Influence(factor * loss, factor * ratio if known else None,
                                option.measured or option.constant == 0)
    total = own + sum(each.loss for each in found.values())
    for each in found.values():
        each.loss = each.loss / total if total else 0.0
    return found


def strengths(run: Run, batch: tuple[Tensor, list[dict]], names: Sequence[str]) -> Tensor:
    """(2, 1 + methods) for a batch: sums of losses, and norms of their gradients at the student's neck, of the
    student's own and of each method without its weight. A norm is NaN where the losses do not reach the neck."""
    distiller = run.distiller
    images, targets = to_device(*batch, run.student, run.device)
    with autocast(run.device, run.cfg.train.amp):
        student, teachers, plan = distiller.passes(images, targets, distiller.whole_plan())
        sums = {"": total_loss(run.student.losses(student))}
        for teacher, (_, entries) in zip(teachers, plan):
            for method, name, _ in entries:
                sums[name] = total_loss(method(*seen_by(method, student, teacher)))
    exact = widest_float(run.device)
    norms = [norm_of(sums[name], student.features) for name in ("", *names)]
    return torch.stack([torch.stack([sums[name].detach().to(exact) for name in ("", *names)]),
                        torch.stack([each.to(exact) for each in norms])])


def norm_of(loss: Tensor, features: Sequence[Tensor]) -> Tensor:
    """The norm of a loss's gradient at some maps, the first one that is finite and not zero at one of `SCALES`."""
    found = loss.new_tensor(float("nan"))
    for scale in SCALES:
        norm = gradient_norm(loss, features, scale)
        if norm is None:
            break
        found = norm
        if norm.isfinite() and norm > 0:
            break
    return found
