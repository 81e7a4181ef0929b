"""Detects losses that are not finite without waiting for the device, and keeps their step for a replay."""
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..exceptions import TrainingError
from ..processes import distributed


class FiniteWatch:
    """Makes sure that a step whose loss is not finite does not change the weights, and reports it one step later.

    Nothing waits for the device: a flag on the device makes the optimiser skip the step. Meanwhile the flag is copied,
    and the copy is read before the next step, when the weights are still those that gave the loss.
    """

    def __init__(self, device: torch.device):
        self.device, self.pending = device, None
        self.flag = torch.zeros(1, pin_memory=device.type == "cuda")
        self.copied = torch.cuda.Event() if device.type == "cuda" else None

    def found_inf(self, broken: Tensor) -> Tensor:
        """1 if `broken` is true in any process, otherwise 0: a scalar on the device."""
        flag = broken.float()
        if distributed.world_size() > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flag

    def look_at(self, flag: Tensor, report: Callable[[], str]) -> None:
        """Remember a step's flag. If the flag is set, `report` saves the step and returns the error message."""
        self.flag.copy_(flag.view(1), non_blocking=self.copied is not None)
        if self.copied is not None:
            self.copied.record()
        self.pending = report

    def check(self) -> None:
        """Raise TrainingError if the last step's loss was not finite; call it before the next step and at the end."""
        if self.pending is None:
            return
        if self.copied is not None:
            self.copied.synchronize()
        report, self.pending = self.pending, None
        if self.flag.item():
            raise TrainingError(report())


def keep_statistics(model: nn.Module) -> Callable[[Tensor], None]:
    """A function that restores the present statistics of the model's norms if its argument, a device flag, is true."""
    before = [(buffer, buffer.clone()) for module in model.modules() if module.training
              for buffer in module.buffers(recurse=False) if buffer.is_floating_point()]

    def put_back(skipped: Tensor) -> None:
        for buffer, old in before:
            buffer.copy_(torch.where(skipped, old, buffer))

    return put_back


def describe_broken_step(losses: dict[str, Tensor], targets: list[dict], step: int, path: Path) -> str:
    """The message about a step with a loss or a gradient that is not finite."""
    broken = [f"{name} is {value.item()}" for name, value in losses.items() if not torch.isfinite(value)]
    what = ", ".join(broken) or "the gradient, or a loss of another process, is not finite"
    images = ", ".join(str(target.get("image_id", "?")) for target in targets)
    return (f"{what} at step {step}, images {images}. The batch and the weights are in {path}: look at them with "
            f"scripts/train.py --replay {path}; lower optimizer.lr, set train.grad_clip, or train without train.amp. "
            "The checkpoints are from earlier steps")
