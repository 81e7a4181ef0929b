"""What every loss shares: precision, weighting and averaging."""
import torch
import torch.distributed as dist
from torch import Tensor

# mmdet divides by avg_factor plus this, whatever the dtype; it shows at the seventh digit.
EPS = torch.finfo(torch.float32).eps


def at_least_float32(x: Tensor) -> Tensor:
    """Promote half precision to float32; leave float32 and float64 alone."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def modulate(error: Tensor, exponent: float) -> Tensor:
    """Focal losses' factor: errors in [0, 1] to a power, with a finite gradient at 0 for exponents below 1 as well."""
    return (error.clamp(min=torch.finfo(error.dtype).tiny) if 0 < exponent < 1 else error).pow(exponent)


def mean_over_processes(value: Tensor) -> Tensor:
    """Average of `value` over all processes; itself when there is only one. Never carries a gradient."""
    value = value.detach()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


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
