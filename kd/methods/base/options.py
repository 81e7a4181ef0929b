"""When a method runs, and the weight of its losses."""
import math
from dataclasses import dataclass
from typing import Literal

from data.ranges import Count, NonNegative, Positive, Share
from models.build import ConfigError


@dataclass
class MethodOptions:
    """Options that every entry of `methods` has besides the method's own arguments."""

    name: str | None = None     # distinguishes its losses from those of another method of the same type
    weight: NonNegative = 1.0   # multiplies all its losses; with 0 they are only shown
    warmup_epochs: NonNegative = 0.0  # the weight rises linearly from zero over this many epochs
    decay: Literal["none", "linear", "cosine"] = "none"  # how the weight falls until stop_epoch, or the last epoch
    decay_to: Share = 0.0       # share of the weight that is left at the end of the decay
    stop_epoch: Positive | None = None  # epochs after which it no longer runs
    every: Count = 1            # it runs once in this many steps; its losses are not multiplied to compensate

    def __post_init__(self):
        if self.decay_to and self.decay == "none":
            raise ConfigError("decay_to", "says where a decay ends, and there is none: set decay: linear or cosine")

    def runs(self, step: int, epoch: float) -> bool:
        """Whether the method runs after this many steps and epochs of training."""
        return step % self.every == 0 and (self.stop_epoch is None or epoch < self.stop_epoch)

    def factor(self, epoch: float, epochs: float) -> float:
        """The factor of the losses after `epoch` of `epochs` epochs, which may be fractions."""
        rise = min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0
        end = epochs if self.stop_epoch is None else self.stop_epoch
        left = {"none": 1.0, "linear": 1 - epoch / end, "cosine": (1 + math.cos(math.pi * epoch / end)) / 2}[self.decay]
        return self.weight * rise * (self.decay_to + (1 - self.decay_to) * left)
