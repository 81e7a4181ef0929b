"""Optimisers, and the learning rate as a plain function of the step."""
import math
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from data.ranges import Count, NonNegative, Number, Positive, Share
from models.build import ConfigError, build, read_section, split_options

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass
class PerImage:
    """A learning rate that is proportional to the images of a step (arXiv:1706.02677)."""

    per_image: NonNegative  # is multiplied by processes x data.batch_size x train.accumulate


def sgd(model: nn.Module, lr: NonNegative | PerImage = 0.01, momentum: Share = 0.9, weight_decay: NonNegative = 1e-4,
        nesterov: bool = False, decay_norm_and_bias: bool = True, bias_lr_mult: NonNegative = 1.0,
        bias_decay_mult: NonNegative = 1.0, norm_decay_mult: NonNegative | None = None) -> torch.optim.Optimizer:
    """SGD with momentum; the other arguments as in `parameter_groups`."""
    groups = parameter_groups(model, lr, weight_decay, decay_norm_and_bias, bias_lr_mult, bias_decay_mult,
                              norm_decay_mult)
    optimizer = torch.optim.SGD(groups, lr, momentum, nesterov=nesterov, fused=True)
    if momentum:
        # PyTorch would create these uninitialised in the first step, and leave them so if that step is skipped.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def adamw(model: nn.Module, lr: NonNegative | PerImage = 1e-4, betas: tuple[Share, Share] = (0.9, 0.999),
          weight_decay: NonNegative = 0.05, decay_norm_and_bias: bool = True) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101); the other arguments as in `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, lr, weight_decay, decay_norm_and_bias), lr, betas=tuple(betas),
                             fused=True)


OPTIMIZERS = {"SGD": sgd, "AdamW": adamw}


@dataclass
class OptimizerOptions:
    """Options that every optimiser has besides its own arguments."""

    base_batch_size: Count | None = None  # images per step that lr is meant for; lr scales linearly (arXiv:1706.02677)


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, decay_norm_and_bias: bool = True,
                     bias_lr_mult: float = 1.0, bias_decay_mult: float = 1.0,
                     norm_decay_mult: float | None = None) -> list[dict]:
    """The trained parameters in groups of equal learning rate and weight decay; first those with the plain values.

    The factors mean the same as in `paramwise_cfg` of mmengine, with which CrossKD was trained. A bias is a parameter
    of that name.

    Args:
        decay_norm_and_bias: False applies no weight decay to norms and biases. Other parameters, like a head's learned
            factors, keep it.
        bias_lr_mult: factor of the learning rate, for the biases of all layers except norms.
        bias_decay_mult: factor of the weight decay, for all biases; with `norm_decay_mult`, not for those of norms.
        norm_decay_mult: factor of the weight decay, for the weights and biases of norms. In mmcv 1, with which FGD was
            trained, it is 1 unless it is set.
    """
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {(lr, weight_decay): []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, _, kind = name.rpartition(".")
        of_norm, bias = isinstance(model.get_submodule(owner), NORMS), kind == "bias"
        rate = lr * bias_lr_mult if bias and not of_norm else lr
        decay = weight_decay
        if not decay_norm_and_bias and (of_norm or bias):
            decay = 0.0
        elif of_norm and norm_decay_mult is not None:
            decay *= norm_decay_mult
        elif bias:
            decay *= bias_decay_mult
        groups.setdefault((rate, decay), []).append((name, parameter))
    return [{"params": members, "lr": rate, "weight_decay": decay}
            for (rate, decay), members in groups.items() if members]


def check_scaling(cfg: dict) -> None:
    """Raise ConfigError if the learning rate of an `optimizer` section would be scaled twice."""
    if isinstance(cfg.get("lr"), dict) and cfg.get("base_batch_size") is not None:
        raise ConfigError("optimizer.lr", "per_image and optimizer.base_batch_size both scale the learning rate: "
                                          "set optimizer.base_batch_size=null, or give lr as a number")


def build_optimizer(cfg: dict, model: nn.Module, batch: int) -> torch.optim.Optimizer:
    """Build the optimiser of an `optimizer` section for the trained parameters; each group records its `initial_lr`.

    Its `defaults["lr"]` is the plain learning rate, after scaling.

    Args:
        batch: images per step over all processes.
    """
    check_scaling(cfg)
    options, own = split_options(cfg, OptimizerOptions)
    if isinstance(own.get("lr"), dict):
        own = own | {"lr": read_section(PerImage, own["lr"], "optimizer.lr").per_image * batch}
    base = read_section(OptimizerOptions, options, "optimizer").base_batch_size
    kind = {"type": cfg.get("type", "SGD")}
    optimizer = build(kind | own, OPTIMIZERS, "optimizer", model=model)
    for group in (optimizer.defaults, *optimizer.param_groups):
        group["lr"] = group["initial_lr"] = group["lr"] if base is None else group["lr"] * batch / base
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, names: list[str] | None = None) -> None:
    """Load the buffers of an optimiser's `state_dict`; learning rate, momentum and weight decay stay as they are here.

    Each parameter gets its buffers by name, also if the groups are others than before. Each tensor gets the memory
    layout that its parameter has now: fused optimisers read both in memory order and ignore their strides.

    Args:
        names: the parameters of a state that holds no names, in its order, see `earlier_names`.
    Raises:
        ValueError: other parameters were trained.
    """
    own, fresh = optimizer.state_dict(), dict(optimizer.state)
    trained, saved = ([name for group in groups for name in group.get("param_names", [])]
                      for groups in (own["param_groups"], state["param_groups"]))
    saved = saved or names or trained
    indices = [index for group in state["param_groups"] for index in group["params"]]
    if len(indices) != len(saved):
        raise ValueError(f"it has trained {len(indices)} parameters, and this run trains {len(saved)}")
    if others := set(saved) ^ set(trained):
        raise ValueError(f"only one of the two trains {min(others)}")
    places = dict(zip(saved, indices))
    buffers = {i: state["state"][places[name]] for i, name in enumerate(trained) if places[name] in state["state"]}
    shapes = dict(zip(trained, (value.shape for group in optimizer.param_groups for value in group["params"])))
    for i, name in enumerate(trained):
        if any(torch.is_tensor(value) and value.shape not in (shapes[name], ())
               for value in buffers.get(i, {}).values()):
            raise ValueError(f"a buffer of its optimiser has another shape than {name}")
    optimizer.load_state_dict(own | {"state": buffers})
    for parameter, own in fresh.items():  # for a momentum where there was none
        optimizer.state[parameter] = own | optimizer.state[parameter]
    for parameter, own in optimizer.state.items():
        for name, value in own.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                own[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def earlier_names(model: nn.Module, cfg: dict) -> list[str]:
    """The trained parameters in the order of an optimiser's state from the time when states held no names.

    At that time, biases of norms had the plain weight decay, and `decay_norm_and_bias: false` also spared single
    numbers, like a head's learned factors.

    Args:
        cfg: the `optimizer` section of that run.
    """
    bias_factors = cfg.get("bias_lr_mult", 1.0), cfg.get("bias_decay_mult", 1.0)
    groups: dict[tuple[float, float], list[str]] = {(1.0, 1.0): []}
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        of_norm = isinstance(model.get_submodule(owner), NORMS)
        rate, decay = bias_factors if kind == "bias" and not of_norm else (1.0, 1.0)
        if not cfg.get("decay_norm_and_bias", True) and (of_norm or parameter.dim() < 2):
            decay = 0.0
        if parameter.requires_grad:
            groups.setdefault((rate, decay if cfg.get("weight_decay", 1.0) else 1.0), []).append(name)
    return [name for members in groups.values() for name in members]


def clip_gradients(model: nn.Module, limit: float | None) -> Tensor:
    """Scale a model's gradients down to the norm `limit` if theirs is larger; return their norm before, a scalar."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


@dataclass
class ScheduleConfig:
    """The `schedule` section: how the learning rate changes during training."""

    warmup_steps: Number = 500    # optimiser steps of warm-up
    warmup_factor: Share = 0.001  # factor of the learning rate at the first step
    warmup: Literal["linear", "constant"] = "linear"  # rises from warmup_factor to 1, or stays at warmup_factor
    type: Literal["step", "cosine"] = "step"      # falls at milestones, or instead along a cosine over train.epochs
    milestones: list[NonNegative] = field(default_factory=lambda: [8, 11])  # epochs after which gamma is applied
    gamma: Positive = 0.1         # factor of the learning rate at each milestone
    min_factor: Share = 0.0       # cosine: factor of the learning rate at the end


def lr_factor(schedule: ScheduleConfig, step: int, steps_per_epoch: int, epochs: float = math.inf) -> float:
    """The factor of the learning rate at a step, counted from 0. A cosine (arXiv:1608.03983, equation 5, without
    restarts) falls over all `epochs`; with infinitely many it does not fall. The warm-up multiplies either."""
    if schedule.type == "cosine":
        done = min(1.0, step / (steps_per_epoch * epochs))
        factor = schedule.min_factor + (1 - schedule.min_factor) * (1 + math.cos(math.pi * done)) / 2
    else:
        factor = schedule.gamma ** bisect_right([m * steps_per_epoch for m in sorted(schedule.milestones)], step)
    if step < schedule.warmup_steps - 1:
        done = step / (schedule.warmup_steps - 1) if schedule.warmup == "linear" else 0
        factor *= schedule.warmup_factor + (1 - schedule.warmup_factor) * done
    return factor
