"""When a method runs, and the weight of its losses."""
from dataclasses import dataclass
from typing import Literal

from models import ConfigError


@dataclass
class MethodOptions:
    """Options that every entry of `methods` has besides the method's own arguments."""

    name: str | None = None     # distinguishes its losses from those of another method of the same type
    weight: float = 1.0         # multiplies all its losses; with 0 they are only shown
    warmup_epochs: float = 0.0  # the weight rises linearly from zero over this many epochs
    decay: Literal["none", "linear"] = "none"  # linear: the weight falls to zero by stop_epoch, or the last epoch
    stop_epoch: float | None = None  # epochs after which it no longer runs
    every: int = 1              # it runs once in this many steps; its losses are not multiplied to compensate

    def __post_init__(self):
        if self.every < 1:
            raise ConfigError("every", f"must be at least 1, not {self.every}")
        if self.warmup_epochs < 0:
            raise ConfigError("warmup_epochs", f"must be at least 0, not {self.warmup_epochs}")
        if self.stop_epoch is not None and self.stop_epoch <= 0:
            raise ConfigError("stop_epoch", f"must be above 0, not {self.stop_epoch}")

    def runs(self, step: int, epoch: float) -> bool:
        """Whether the method runs after this many steps and epochs of training."""
        return step % self.every == 0 and (self.stop_epoch is None or epoch < self.stop_epoch)

    def factor(self, epoch: float, epochs: float) -> float:
        """The factor of the losses after `epoch` of `epochs` epochs, which may be fractions."""
        rise = min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0
        end = epochs if self.stop_epoch is None else self.stop_epoch
        return self.weight * rise * (1 - epoch / end if self.decay == "linear" else 1.0)
