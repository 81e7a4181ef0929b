"""When a method runs, and how much it weighs."""
from dataclasses import dataclass
from typing import Literal

from models import ConfigError


@dataclass
class MethodOptions:
    """What every entry of `methods` may have beside its own arguments."""

    name: str | None = None     # tells its losses from another method's of the same kind
    weight: float = 1.0         # multiplies all its losses; with 0 they are only shown
    warmup_epochs: float = 0.0  # the weight rises linearly from zero over so many epochs
    decay: Literal["none", "linear"] = "none"  # linear: the weight falls to zero by stop_epoch, or the last epoch
    stop_epoch: float | None = None  # epochs after which it no longer runs
    every: int = 1              # it runs at every so many steps; its losses are not multiplied to make up for it

    def __post_init__(self):
        if self.every < 1:
            raise ConfigError("distill.methods", f"every must be at least 1, not {self.every}")
        if self.warmup_epochs < 0 or (self.stop_epoch is not None and self.stop_epoch <= 0):
            raise ConfigError("distill.methods", "warmup_epochs and stop_epoch count epochs from the start")

    def runs(self, step: int, epoch: float) -> bool:
        """Whether the method runs, after so many steps and epochs of training."""
        return step % self.every == 0 and (self.stop_epoch is None or epoch < self.stop_epoch)

    def factor(self, epoch: float, epochs: float) -> float:
        """What the losses are multiplied by after `epoch` of `epochs` epochs, fractions included."""
        rise = min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0
        end = epochs if self.stop_epoch is None else self.stop_epoch
        return self.weight * rise * (1 - epoch / end if self.decay == "linear" else 1.0)
