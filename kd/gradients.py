"""Gradient norms at the student's neck, and the weights that follow from them (`gradient_share`)."""
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from losses import at_least_float32, mean_over_processes, widest_float
from models import ConfigError

from .methods.base import GradientShare, MethodOptions

EARLY = 5      # measurements after which the steps between two of them grow by one, up to gradient_share_every
NEWEST = 0.3   # smallest part that a new measurement has in the running mean
MOST = 1e6     # the ratio of two norms is kept from 1 / MOST to MOST
TARGET = 64.0  # norm of a scaled gradient, which leaves fp16 room above (65504) and below (6e-8)
LEAST = 2.0 ** -8  # a scaled gradient below has perhaps lost digits in fp16: only its scale is corrected
UNSCALED = 2.0 ** 16, 2.0 ** 64  # the first scale, and the largest one; the smallest is its inverse
SMALLER = 2.0 ** -8  # factor of a scale at which the gradient was not finite


def gradient_norm(loss: Tensor, features: Sequence[Tensor], scale: float | Tensor = 1.0) -> Tensor | None:
    """The norm of a loss's gradient at some maps, a scalar; None if the loss does not depend on them.

    Args:
        scale: multiplies the loss before it is differentiated; the norm is divided by it.
    """
    if not loss.requires_grad:  # a constant, for example of an image without boxes
        return torch.zeros((), dtype=widest_float(loss.device), device=loss.device)
    with torch.autocast(loss.device.type, enabled=False):  # as in a backward pass, which comes after the autocast
        gradients = torch.autograd.grad(scale * at_least_float32(loss), features, retain_graph=True, allow_unused=True)
    parts = [g.to(widest_float(g.device)).norm() for g in gradients if g is not None]
    return torch.stack(parts).norm() / scale if parts else None


class GradientShares(nn.Module):
    """Measures the weights of the methods with a `gradient_share`.

    The weight of a method is its share, times the ratio of two norms at the outputs of the student's neck: that of the
    gradient of the student's own losses, and that of the gradient of the method's unweighted losses. The ratio is a
    running mean of logarithms, in which a single odd batch counts little: the plain mean of the first measurements,
    then each new one has a part of `NEWEST`. Norms are over the batches of all processes. A measurement with a norm
    that is zero or not finite changes nothing. Until the first usable measurement, the weight is zero.

    The first step of a method measures, and early steps measure more often than later ones, because norms change
    fastest at the start of training: the steps between two measurements grow by one after every `EARLY` of them.

    Everything stays on the device. Each gradient is measured at a scale of its own, which follows its norm, so fp16
    neither overflows nor loses small gradients.

    Args:
        options: of all methods of all teachers; every one has its own name.
    """

    def __init__(self, options: Sequence[MethodOptions]):
        super().__init__()
        self.shares: dict[str, GradientShare] = {each.name: each.weight for each in options if each.measured}
        self.places = {each.name: i for i, each in enumerate(options)}
        count = len(self.places)
        self.times, self.last = [0] * count, [-1] * count  # measurements of each method, and the step of its last one
        for name, size, value in (("logs", count, 0.0), ("counts", count, 0.0), ("scales", count + 1, UNSCALED[0])):
            self.register_buffer(name, torch.full((size,), value), persistent=False)  # scales: the student's first

    def due(self, name: str, step: int) -> bool:
        """Whether a method that runs at this step is measured; a step with several batches measures the first one."""
        if name not in self.shares:
            return False
        place = self.places[name]
        pause = min(self.shares[name].gradient_share_every, 1 + self.times[place] // EARLY)
        return step < self.last[place] or step - self.last[place] >= pause

    def measure(self, step: int, own: Tensor, of_methods: dict[str, Tensor], features: Sequence[Tensor]) -> None:
        """Measure what is due.

        Args:
            own: the sum of the student's own losses.
            of_methods: the sum of the unweighted losses of each method that runs at this step.
            features: the outputs of the student's neck.
        Raises:
            ConfigError: the losses of a method do not depend on the features.
        """
        due = [name for name in of_methods if self.due(name, step)]
        if not due or not torch.is_grad_enabled():
            return
        nothing = torch.zeros((), dtype=widest_float(own.device), device=own.device)
        norms = [nothing] * (len(self.places) + 1)
        norms[0] = gradient_norm(own, features, self.scales[0])
        for name in due:
            place = self.places[name]
            norm = gradient_norm(of_methods[name], features, self.scales[place + 1])
            if norm is None and not self.times[place]:
                raise ConfigError("distill.methods", f"{name} has no gradient at the outputs of the student's neck, so "
                                  "gradient_share cannot set its weight: give it a number as weight")
            norms[place + 1] = nothing if norm is None else norm
            self.times[place] += 1
            self.last[place] = step
        self.update(mean_over_processes(torch.stack(norms).square()).sqrt())

    def update(self, norms: Tensor) -> None:
        """Take measured norms (1 + methods) into the running means, the student's first; 0 is not measured."""
        finite = norms.isfinite()
        usable = finite & (norms * self.scales >= LEAST) & (norms > 0)
        known = torch.where(finite & (norms > 0), norms, 1.0)
        fitting = torch.exp2((TARGET / known).log2().round())
        scales = torch.where(finite, torch.where(norms > 0, fitting, self.scales), SMALLER * self.scales)
        self.scales.copy_(scales.clamp(1 / UNSCALED[1], UNSCALED[1]))
        usable = usable[1:] & usable[0]
        new = (known[0] / known[1:]).log().clamp(-math.log(MOST), math.log(MOST))
        self.counts += usable
        part = (1 / self.counts.clamp(min=1)).clamp(min=NEWEST)
        self.logs += torch.where(usable, part * (new - self.logs), 0.0).to(self.logs.dtype)

    def weigh(self, name: str, factor: float) -> float | Tensor:
        """The weight of a method's losses; `factor` is that of its options, which contains the share."""
        if name not in self.shares:
            return factor
        place = self.places[name]
        return factor * self.logs[place].exp() * (self.counts[place] > 0)

    def describe(self) -> list[str]:
        """A line for each measured method; it waits for the device."""
        lines = []
        for name, share in self.shares.items():
            place = self.places[name]
            if self.counts[place] > 0:
                ratio = self.logs[place].exp().item()
                edge = " (the limit)" if max(ratio, 1 / ratio) > 0.999 * MOST else ""
                lines.append(f"{name}: its weight is {share.gradient_share * ratio:.3g}{edge}, for a gradient_share of "
                             f"{share.gradient_share:g}")
            else:
                lines.append(f"WARNING: {name}: its weight is 0, because the gradient of its losses at the student's "
                             "neck, or that of the student's own losses, is zero or not finite so far; if this stays "
                             "so, give it a number as weight in place of gradient_share")
        return lines

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; empty if no method is measured."""
        if not self.shares:
            return {}
        return {"logs": self.logs, "counts": self.counts, "scales": self.scales, "times": torch.tensor(self.times),
                "last": torch.tensor(self.last)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned, where anything is measured; without it, measure anew.

        Raises:
            KeyError, ValueError: it is of other methods.
        """
        if not self.shares or not state:
            return
        for name, value in self.state().items():
            if state[name].shape != value.shape:
                raise ValueError(f"gradient_shares has {name} of shape {tuple(state[name].shape)}")
        for name in ("logs", "counts", "scales"):
            getattr(self, name).copy_(state[name])
        self.times, self.last = state["times"].tolist(), state["last"].tolist()
