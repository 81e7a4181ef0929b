"""When a method runs, and the weight of its losses."""
import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from data.ranges import Count, NonNegative, Positive, Range, Share
from models.build import ConfigError


@dataclass
class GradientShare:
    """A weight that is measured: it makes the norm of the method's gradient at the student's neck a share of the norm
    of the gradient that the student's own losses have there."""

    gradient_share: Annotated[float, Range(0, 100, open=True)]  # norm of its gradient over that of the student's own
    gradient_share_every: Count = 20  # most steps between two measurements; at first there are fewer


@dataclass
class MethodOptions:
    """Options that every entry of `methods` has besides the method's own arguments."""

    name: str | None = None     # distinguishes its losses from those of another method of the same type
    weight: NonNegative | GradientShare = 1.0  # multiplies all its losses; with 0 they are only shown
    warmup_epochs: NonNegative = 0.0  # the weight rises linearly from zero over this many epochs
    decay: Literal["none", "linear", "cosine"] = "none"  # how the weight falls until stop_epoch, or the last epoch
    decay_to: Share = 0.0       # share of the weight that is left at the end of the decay
    stop_epoch: Positive | None = None  # epochs after which it no longer runs
    every: Count = 1            # it runs once in this many steps; its losses are not multiplied to compensate

    def __post_init__(self):
        if self.decay_to and self.decay == "none":
            raise ConfigError("decay_to", "says where a decay ends, and there is none: set decay: linear or cosine")

    @property
    def measured(self) -> bool:
        """Whether the weight follows from gradients, see `GradientShare`."""
        return isinstance(self.weight, GradientShare)

    @property
    def constant(self) -> float:
        """The part of the weight that is configured: the weight itself, or the wanted share."""
        return self.weight.gradient_share if self.measured else self.weight

    def times(self, factor: float, name: str) -> "MethodOptions":
        """The same options under another name and with another constant, which is multiplied by a factor."""
        weight = self.constant * factor
        return replace(self, name=name,
                       weight=replace(self.weight, gradient_share=weight) if self.measured else weight)

    def runs(self, step: int, epoch: float) -> bool:
        """Whether the method runs after this many steps and epochs of training."""
        return step % self.every == 0 and (self.stop_epoch is None or epoch < self.stop_epoch)

    def factor(self, epoch: float, epochs: float) -> float:
        """The factor of the losses after `epoch` of `epochs` epochs, which may be fractions.

        A measured weight also has a factor from `GradientShares`.
        """
        rise = min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0
        end = epochs if self.stop_epoch is None else self.stop_epoch
        left = {"none": 1.0, "linear": 1 - epoch / end, "cosine": (1 + math.cos(math.pi * epoch / end)) / 2}[self.decay]
        return self.constant * rise * (self.decay_to + (1 - self.decay_to) * left)
