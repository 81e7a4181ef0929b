"""When a method runs, and the weight of its losses."""
from dataclasses import dataclass
from typing import Literal

from data.ranges import Count, NonNegative, Positive


@dataclass
class MethodOptions:
    """Options that every entry of `methods` has besides the method's own arguments."""

    name: str | None = None     # distinguishes its losses from those of another method of the same type
    weight: NonNegative = 1.0   # multiplies all its losses; with 0 they are only shown
    warmup_epochs: NonNegative = 0.0  # the weight rises linearly from zero over this many epochs
    decay: Literal["none", "linear"] = "none"  # linear: the weight falls to zero by stop_epoch, or the last epoch
    stop_epoch: Positive | None = None  # epochs after which it no longer runs
    every: Count = 1            # it runs once in this many steps; its losses are not multiplied to compensate

    def runs(self, step: int, epoch: float) -> bool:
        """Whether the method runs after this many steps and epochs of training."""
        return step % self.every == 0 and (self.stop_epoch is None or epoch < self.stop_epoch)

    def factor(self, epoch: float, epochs: float) -> float:
        """The factor of the losses after `epoch` of `epochs` epochs, which may be fractions."""
        rise = min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0
        end = epochs if self.stop_epoch is None else self.stop_epoch
        return self.weight * rise * (1 - epoch / end if self.decay == "linear" else 1.0)
