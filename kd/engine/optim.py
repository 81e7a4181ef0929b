"""Optimisers, and the learning rate as a plain function of the step."""
from bisect import bisect_right
from dataclasses import dataclass, field

import torch
from torch import nn

from models.build import build


def sgd(model: nn.Module, batch: int, lr: float = 0.01, momentum: float = 0.9, weight_decay: float = 1e-4,
        nesterov: bool = False, decay_norm_and_bias: bool = True,
        base_batch_size: int | None = None) -> torch.optim.Optimizer:
    """SGD with momentum; the other arguments as in `parameter_groups`.

    Args:
        batch: images per step over all processes.
        base_batch_size: the batch that `lr` is meant for; it is scaled linearly to the real one (arXiv:1706.02677).
    """
    groups = parameter_groups(model, weight_decay, decay_norm_and_bias)
    return torch.optim.SGD(groups, scaled(lr, batch, base_batch_size), momentum, nesterov=nesterov)


def adamw(model: nn.Module, batch: int, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.999),
          weight_decay: float = 0.05, decay_norm_and_bias: bool = True,
          base_batch_size: int | None = None) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101); the other arguments as in `sgd`."""
    groups = parameter_groups(model, weight_decay, decay_norm_and_bias)
    return torch.optim.AdamW(groups, scaled(lr, batch, base_batch_size), betas=tuple(betas))


OPTIMIZERS = {"SGD": sgd, "AdamW": adamw}


def scaled(lr: float, batch: int, base_batch_size: int | None) -> float:
    return lr if base_batch_size is None else lr * batch / base_batch_size


def parameter_groups(model: nn.Module, weight_decay: float, decay_norm_and_bias: bool = True) -> list[dict]:
    """What is trained, in two groups: with weight decay, and without it (norm and bias, where they are spared)."""
    decayed, spared = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Norm weights and biases are the parameters of less than two dimensions.
            (decayed if decay_norm_and_bias or parameter.dim() > 1 else spared).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(cfg: dict, model: nn.Module, batch: int) -> torch.optim.Optimizer:
    """The optimiser of an `optimizer` section for what `model` trains; each group remembers its `initial_lr`."""
    optimizer = build({"type": "SGD"} | cfg, OPTIMIZERS, "optimizer", model=model, batch=batch)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


@dataclass
class ScheduleConfig:
    """The `schedule` section: the learning rate as a factor of the optimiser's."""

    warmup_steps: int = 500       # optimiser steps of linear warm-up
    warmup_factor: float = 0.001  # of the learning rate, at the first step
    milestones: list[float] = field(default_factory=lambda: [8, 11])  # epochs after which the rate is multiplied
    gamma: float = 0.1            # by this


def lr_factor(schedule: ScheduleConfig, step: int, steps_per_epoch: int) -> float:
    """What the learning rate is multiplied by at a step, counted from 0."""
    factor = schedule.gamma ** bisect_right([m * steps_per_epoch for m in sorted(schedule.milestones)], step)
    if step < schedule.warmup_steps - 1:
        done = step / (schedule.warmup_steps - 1)
        factor *= schedule.warmup_factor + (1 - schedule.warmup_factor) * done
    return factor
