"""What every loss shares: precision, weighting and averaging."""
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

# mmdet adds this to avg_factor for every dtype; it changes the seventh digit.
EPS = torch.finfo(torch.float32).eps
WITHOUT_FLOAT64 = {"mps"}  # types of devices


def at_least_float32(x: Tensor) -> Tensor:
    """Promote half precision to float32; leave float32 and float64 alone."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64, as the GPU of a Mac."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def total_loss(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of a detector's losses: of all entries that have "loss" in their name."""
    return sum(value for name, value in losses.items() if "loss" in name)


def modulate(error: Tensor, exponent: float) -> Tensor:
    """Factor of focal losses: errors in [0, 1] to a power. The gradient at 0 is finite, also for powers below 1."""
    return (error.clamp(min=torch.finfo(error.dtype).tiny) if 0 < exponent < 1 else error).pow(exponent)


def processes() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_processes(value: Tensor, least: float | None = None) -> Tensor:
    """Average of `value` over all processes, or `value` itself if there is one process. The result has no gradient.

    Args:
        least: lower bound for the sum over all processes (not for the average). With it, the losses of N processes
            average to the loss of one process with N times the batch, even if there are few positives.
    """
    count, value = processes(), value.detach()
    if count > 1:
        value = value.clone()
        dist.all_reduce(value)
    if least is not None:
        value = value.clamp(min=least)
    return value / count if count > 1 else value


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes. Its gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return SumOverProcesses.apply(grad.contiguous())


def channel_statistics(x: Tensor, sync: bool = False, unbiased: bool = True) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean of each channel of a map (N, C, H, W) over images and positions, (1, C, 1, 1) each.

    Args:
        sync: use the maps of all processes, with the same weight for every entry, and not only this process's map.
        unbiased: divide the sum of squares by the number of entries minus 1, not by their number.
    """
    # Two passes: torch.std_mean takes four times as long, because the channels of a map are strided.
    total = SumOverProcesses.apply if sync and processes() > 1 else lambda value: value
    dims = (0, 2, 3)
    sums = torch.cat([x.sum(dims), x.new_full((1,), x.numel() / x.shape[1])])
    *sums, count = total(sums).split([x.shape[1], 1])
    mean = (sums[0] / count).view(1, -1, 1, 1)
    # A single value has variance zero, for example on the coarsest level of one image.
    variance = total((x - mean).square().sum(dims, keepdim=True)) / (count - 1 if unbiased else count).clamp(min=1)
    # The deviation of a constant channel has no gradient, as in torch.std_mean.
    return variance.clamp(min=torch.finfo(x.dtype).tiny).sqrt(), mean


def normalised_channels(x: Tensor, sync: bool = False, eps: float = 1e-5) -> Tensor:
    """A map (N, C, H, W) whose channels have mean 0 and variance 1, as after a batch norm without weights in training.

    Args:
        sync: see `channel_statistics`.
        eps: is added to the variances.
    """
    std, mean = channel_statistics(x, sync, unbiased=False)
    return (x - mean) * (std.square() + eps).rsqrt()


def reduce_loss(loss: Tensor, weight: Tensor | None = None, reduction: str = "mean",
                avg_factor: float | Tensor | None = None) -> Tensor:
    """Weight a loss and reduce it.

    Args:
        loss: any shape (..., C) or (...).
        weight: the loss's shape, or its shape without the last dimension.
        reduction: "none", "mean" or "sum".
        avg_factor: with "mean", the sum is divided by this instead of the number of elements.
    Raises:
        ValueError: there is an avg_factor together with "sum", or the reduction is unknown.
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
