"""What every loss shares: precision, weighting and averaging."""
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

# mmdet divides by avg_factor plus this, whatever the dtype; it shows at the seventh digit.
EPS = torch.finfo(torch.float32).eps


def at_least_float32(x: Tensor) -> Tensor:
    """Promote half precision to float32; leave float32 and float64 alone."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def total_loss(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of a detector's losses: of all entries that have "loss" in their name."""
    return sum(value for name, value in losses.items() if "loss" in name)


def modulate(error: Tensor, exponent: float) -> Tensor:
    """Focal losses' factor: errors in [0, 1] to a power, with a finite gradient at 0 for exponents below 1 as well."""
    return (error.clamp(min=torch.finfo(error.dtype).tiny) if 0 < exponent < 1 else error).pow(exponent)


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_processes(value: Tensor, least: float | None = None) -> Tensor:
    """Average of `value` over all processes; itself when there is only one. Never carries a gradient.

    Args:
        least: what the sum over all processes is raised to. A normaliser of N processes is so an N-th of one process's
            with N times the batch, and their losses average to its loss, however few positives there are.
    """
    count, value = processes(), value.detach()
    if count > 1:
        value = value.clone()
        dist.all_reduce(value)
    if least is not None:
        value = value.clamp(min=least)
    return value / count if count > 1 else value


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; the gradient of every process's result comes back to each."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return SumOverProcesses.apply(grad.contiguous())


def channel_statistics(x: Tensor, sync: bool = False) -> tuple[Tensor, Tensor]:
    """Deviation and mean of each channel of a map (N, C, H, W) over images and places, (1, C, 1, 1) each.

    Args:
        sync: over the maps of all processes together, each entry counting alike, instead of this one's alone.
    """
    # In two passes by hand: torch.std_mean takes four times as long on a map's strided channels.
    total = SumOverProcesses.apply if sync and processes() > 1 else lambda value: value
    dims = (0, 2, 3)
    sums = torch.cat([x.sum(dims), x.new_full((1,), x.numel() / x.shape[1])])
    *sums, count = total(sums).split([x.shape[1], 1])
    mean = (sums[0] / count).view(1, -1, 1, 1)
    # A lone value, of one image's coarsest level say, deviates by nothing.
    variance = total((x - mean).square().sum(dims, keepdim=True)) / (count - 1).clamp(min=1)
    # A constant channel's deviation has no gradient, as torch.std_mean has it.
    return variance.clamp(min=torch.finfo(x.dtype).tiny).sqrt(), mean


def reduce_loss(loss: Tensor, weight: Tensor | None = None, reduction: str = "mean",
                avg_factor: float | Tensor | None = None) -> Tensor:
    """Weight a loss and reduce it.

    Args:
        loss: any shape (..., C) or (...).
        weight: of the loss's shape, or of its shape less the last dimension.
        reduction: "none", "mean" or "sum".
        avg_factor: with "mean", the sum is divided by this in place of the number of elements.
    Raises:
        ValueError: an avg_factor together with "sum", or an unknown reduction.
    """
    if weight is not None:
        if weight.dim() == loss.dim() - 1:
            weight = weight.unsqueeze(-1)
        loss = loss * weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        if avg_factor is not None:
            raise ValueError('avg_factor cannot be used with reduction="sum"')
        return loss.sum()
    if reduction == "mean":
        return loss.mean() if avg_factor is None else loss.sum() / (avg_factor + EPS)
    raise ValueError(f'reduction must be "none", "mean" or "sum", not "{reduction}"')
