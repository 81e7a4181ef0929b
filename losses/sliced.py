"""Losses over very many scores, computed slice by slice, each slice together with its gradient.

On all scores at once, a focal loss reads and writes a dozen tensors of the scores' size and keeps half of them for
backward: 16 MB each for RetinaNet on a small image. A slice stays in the cache, and only its gradient is kept.
"""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reduce import EPS, reduce_loss

# Scores per slice: on a CPU, a slice and its intermediate tensors fit into a core's cache; on a GPU, it limits memory.
SLICE = {"cpu": 2 ** 17}
LARGE_SLICE = 2 ** 25


def sliced_loss(entries: Callable[..., Tensor], pred: Tensor, others: tuple[Tensor, ...], weight: Tensor | None,
                reduction: str, avg_factor: float | Tensor | None) -> Tensor:
    """`reduce_loss(entries(pred, *others), weight, reduction, avg_factor)`.

    Args:
        entries: computes a loss (R, C) or (R,) from predictions (R, C), for each row independently.
        pred: (..., C).
        others: the other arguments of `entries`, (...) or (..., C) each; they get no gradient.
        weight: (...) or (..., C).
    """
    rows = (*others, *([] if weight is None else [weight]))
    aligned = all(x.shape[:pred.dim() - 1] == pred.shape[:-1] and not x.requires_grad for x in rows)
    if reduction != "mean" or avg_factor is None or not aligned or torch.compiler.is_compiling():
        return reduce_loss(entries(pred, *others), weight, reduction, avg_factor)
    return SlicedSum.apply(entries, pred, weight, *others) / (avg_factor + EPS)


class SlicedSum(torch.autograd.Function):
    """The weighted sum of a loss's entries. Its forward pass also computes the gradient."""

    @staticmethod
    def forward(ctx: Any, entries: Callable[..., Tensor], pred: Tensor, weight: Tensor | None,
                *others: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[1]
        ctx.like = pred.shape, pred.dtype
        pred, weight, *others = (None if x is None else x.detach().flatten(0, pred.dim() - 2)
                                 for x in (pred, weight, *others))
        # At least float32: fp16's loss scale enlarges small gradients only later, in backward.
        dtype = torch.promote_types(pred.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=pred.device)
        grad = torch.empty_like(pred, dtype=dtype) if wanted else None
        step = max(1, SLICE.get(pred.device.type, LARGE_SLICE) // pred.shape[-1])
        for start in range(0, len(pred), step):
            part = slice(start, start + step)
            with torch.set_grad_enabled(wanted):
                leaf = pred[part].to(dtype).requires_grad_(wanted)
                value = reduce_loss(entries(leaf, *(x[part] for x in others)),
                                    None if weight is None else weight[part], "sum")
            if wanted:
                grad[part] = torch.autograd.grad(value, leaf)[0]
            total += value.detach()
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, = ctx.saved_tensors
        shape, dtype = ctx.like
        return None, (grad * saved).to(dtype).view(shape), *[None] * (len(ctx.needs_input_grad) - 2)
