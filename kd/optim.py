"""Optimisers, and the learning rate as a plain function of the step."""
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from models.build import ConfigError, build, split_options

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def sgd(model: nn.Module, lr: float = 0.01, momentum: float = 0.9, weight_decay: float = 1e-4, nesterov: bool = False,
        decay_norm_and_bias: bool = True, bias_lr_mult: float = 1.0,
        bias_decay_mult: float = 1.0) -> torch.optim.Optimizer:
    """SGD with momentum; the other arguments as in `parameter_groups`."""
    groups = parameter_groups(model, lr, weight_decay, decay_norm_and_bias, bias_lr_mult, bias_decay_mult)
    optimizer = torch.optim.SGD(groups, lr, momentum, nesterov=nesterov, fused=True)
    if momentum:
        # PyTorch makes these in the first step, from memory as it finds it, which stays there if that step is skipped.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def adamw(model: nn.Module, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.05,
          decay_norm_and_bias: bool = True) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101); the other arguments as in `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, lr, weight_decay, decay_norm_and_bias), lr, betas=tuple(betas),
                             fused=True)


OPTIMIZERS = {"SGD": sgd, "AdamW": adamw}


@dataclass
class OptimizerOptions:
    """What every optimiser may say beside its own arguments."""

    base_batch_size: int | None = None  # images a step that lr is meant for; it follows theirs (arXiv:1706.02677)

    def __post_init__(self):
        if self.base_batch_size is not None and self.base_batch_size < 1:
            raise ConfigError("optimizer.base_batch_size", f"must be at least 1, not {self.base_batch_size}")


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, decay_norm_and_bias: bool = True,
                     bias_lr_mult: float = 1.0, bias_decay_mult: float = 1.0) -> list[dict]:
    """What is trained, grouped by learning rate and weight decay, beginning with the plain ones.

    Args:
        decay_norm_and_bias: False spares norms and biases the weight decay.
        bias_lr_mult, bias_decay_mult: factors for biases, those of norms not counted.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(lr, weight_decay): []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, _, kind = name.rpartition(".")
        of_norm = isinstance(model.get_submodule(owner), NORMS)
        bias = kind == "bias" and not of_norm
        rate, decay = (lr * bias_lr_mult, weight_decay * bias_decay_mult) if bias else (lr, weight_decay)
        # A norm's may have more than one dimension, as FGD's LayerNorm; what else has less than two is a learned scale.
        spared = not decay_norm_and_bias and (of_norm or parameter.dim() < 2)
        groups.setdefault((rate, 0.0 if spared else decay), []).append(parameter)
    return [{"params": members, "lr": rate, "weight_decay": decay}
            for (rate, decay), members in groups.items() if members]


def build_optimizer(cfg: dict, model: nn.Module, batch: int) -> torch.optim.Optimizer:
    """The optimiser of an `optimizer` section for what `model` trains; each group remembers its `initial_lr`.

    Args:
        batch: images per step over all processes.
    """
    options, own = split_options(cfg, OptimizerOptions)
    base = OptimizerOptions(**options).base_batch_size
    kind = {"type": cfg.get("type", "SGD")}
    optimizer = build(kind | own, OPTIMIZERS, "optimizer", model=model)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = group["lr"] if base is None else group["lr"] * batch / base
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Take over what an optimiser's `state_dict` gave, each tensor laid out in memory as its parameter is now.

    Fused optimisers go through both in the order of memory, without a look at their strides.
    """
    optimizer.load_state_dict(state)
    for parameter, own in optimizer.state.items():
        for name, value in own.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                own[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def clip_gradients(model: nn.Module, limit: float | None) -> Tensor:
    """Scale a model's gradients down to the norm `limit` where theirs is larger, and return what it was, a scalar."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


@dataclass
class ScheduleConfig:
    """The `schedule` section: the learning rate as a factor of the optimiser's."""

    warmup_steps: int = 500       # optimiser steps of warm-up
    warmup_factor: float = 0.001  # of the learning rate, at the first step
    warmup: Literal["linear", "constant"] = "linear"  # from that factor up to 1, or at that factor until it ends
    milestones: list[float] = field(default_factory=lambda: [8, 11])  # epochs after which the rate is multiplied
    gamma: float = 0.1            # by this


def lr_factor(schedule: ScheduleConfig, step: int, steps_per_epoch: int) -> float:
    """What the learning rate is multiplied by at a step, counted from 0."""
    factor = schedule.gamma ** bisect_right([m * steps_per_epoch for m in sorted(schedule.milestones)], step)
    if step < schedule.warmup_steps - 1:
        done = step / (schedule.warmup_steps - 1) if schedule.warmup == "linear" else 0
        factor *= schedule.warmup_factor + (1 - schedule.warmup_factor) * done
    return factor
