"""Sums of losses over very many scores, which compute their gradient themselves.

Autograd runs a dozen operators forward and two dozen backward for a focal loss, and keeps half of their results:
16 MB each for RetinaNet on a small image. With the gradient's formula there are ten operators in all, most of them in
place, and only the gradient is kept. They run on slices of MOST scores, which is mostly one slice, to limit memory.
"""
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reduce import EPS, modulate, reduce_loss

MOST = 2 ** 25  # scores at once: limits the memory for intermediate tensors
EXACT = 40      # log(1 + e^x) is x from here on, in float64, too
Terms = Callable[..., tuple[Tensor, Tensor]]


def summed_loss(terms: Terms, entries: Callable[..., Tensor], pred: Tensor, others: tuple[Tensor, ...],
                weight: Tensor | None, reduction: str, avg_factor: float | Tensor | None) -> Tensor:
    """`reduce_loss(entries(pred, *others), weight, reduction, avg_factor)`, by `terms` if that is a sum of rows.

    Args:
        terms: from predictions (R, C) in at least float32 and the other arguments: the sums (R,) of the rows' losses,
            and their gradients (R, C).
        entries: the loss (..., C) or (...) from predictions (..., C), for autograd.
        pred: (..., C).
        others: the other arguments of both, (...) or (..., C) each; they get no gradient.
        weight: (...) or (..., C).
    """
    rows = (*others, *([] if weight is None else [weight]))
    aligned = all(x.shape[:pred.dim() - 1] == pred.shape[:-1] and not x.requires_grad for x in rows)
    by_row = weight is None or weight.dim() == pred.dim() - 1
    if reduction != "mean" or avg_factor is None or not aligned or not by_row or torch.compiler.is_compiling():
        return reduce_loss(entries(pred, *others), weight, reduction, avg_factor)
    return SumOfRows.apply(terms, pred, weight, *others) / (avg_factor + EPS)


class SumOfRows(torch.autograd.Function):
    """The weighted sum of the rows' losses. Its forward pass also computes the gradient."""

    @staticmethod
    def forward(ctx: Any, terms: Terms, pred: Tensor, weight: Tensor | None, *others: Tensor) -> Tensor:
        ctx.like = pred.shape, pred.dtype
        pred, *others = (x.flatten(0, pred.dim() - 2) for x in (pred, *others))
        # At least float32: fp16's loss scale enlarges small gradients only later, in backward.
        dtype = torch.promote_types(pred.dtype, torch.float32)
        step = max(1, MOST // pred.shape[-1])
        parts = [terms(rows.to(dtype), *more) for rows, *more in zip(*(x.split(step) for x in (pred, *others)))]
        losses, gradients = (found[0] if len(found) == 1 else torch.cat(found) for found in zip(*parts))
        weight = None if weight is None else weight.flatten()
        ctx.save_for_backward(gradients, weight)
        return losses.sum() if weight is None else (losses * weight).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, weight = ctx.saved_tensors
        shape, dtype = ctx.like
        factor = grad if weight is None else (grad * weight).unsqueeze(-1)
        return None, (saved * factor).to(dtype).view(shape), *[None] * (len(ctx.needs_input_grad) - 2)


def background(pred: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    """The loss -log(1 - p) p^exponent of logits with target 0, and its gradient, both (...)."""
    score = pred.sigmoid()
    factor = modulate(score, exponent)
    loss = F.softplus(pred, threshold=EXACT).mul_(factor)
    # The gradient is factor * p + exponent * loss * (1 - p).
    return loss, torch.lerp(loss * exponent, factor, score, out=score)


def towards(pred: Tensor, target: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    """The cross-entropy of logits with targets in [0, 1], times |p - target|^exponent, and its gradient, all (...)."""
    score = pred.sigmoid()
    loss = F.softplus(pred, threshold=EXACT).addcmul_(pred, target, value=-1)
    error = score - target
    if exponent == 0:
        return loss, error
    # The gradient is |error|^(exponent - 1) * sign(error) * (error^2 + exponent * loss * p * (1 - p)).
    gradient = torch.ops.aten.sigmoid_backward(loss, score)
    factor = error.sign()
    if exponent != 1:
        gradient.mul_(exponent)
        factor.mul_(modulate(error.abs().clamp_(min=torch.finfo(error.dtype).tiny), exponent - 1))
    gradient.addcmul_(error, error).mul_(factor)
    return loss.mul_(error).mul_(factor), gradient


def one_class(pred: Tensor, labels: Tensor, exponent: float, scale: float,
              own: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Terms of a loss that is `own` for the row's own class, and `scale` times `background` for the others.

    The class of a row is one entry in many, so its loss is computed apart and put in place of the background's.

    Args:
        labels: (R,) in [0, C]; C is background.
        own: loss and gradient (R, 1) from the logits (R, 1) of the own class.
    """
    column = labels.clamp(0, pred.shape[-1] - 1)
    real, column = (column == labels).unsqueeze(-1), column.unsqueeze(-1)
    loss, gradient = background(pred, exponent)
    logit = pred.gather(-1, column)
    instead, minus = own(logit), background(logit, exponent)
    more, more_gradient = (real * (a - scale * b) for a, b in zip(instead, minus))
    gradient = gradient.mul_(scale).scatter_add_(-1, column, more_gradient)
    return loss.sum(-1) * scale + more.squeeze(-1), gradient
