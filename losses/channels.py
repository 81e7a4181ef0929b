"""Maps whose channels are brought to other means and deviations, by the kernels of batch norm."""
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reduce import at_least_float32, channel_statistics, processes


def rescaled_channels(maps: Sequence[Tensor], like: Sequence[Tensor] | None = None, eps: float = 1e-6,
                      sync: bool = False) -> list[Tensor]:
    """(x - mean) / (std + eps) for each channel of each map, times the deviation and plus the mean of another map.

    Args:
        maps: (N, C, H_l, W_l), with means and deviations over images and positions.
        like: the other maps, with as many channels; they get no gradient. None: deviation 1 and mean 0.
        sync: use the statistics of the maps of all processes.
    """
    maps = [at_least_float32(x) for x in maps]
    like = None if like is None else [at_least_float32(x).detach() for x in like]
    if sync and processes() > 1:
        return [by_formula(x, None if like is None else like[i], eps) for i, x in enumerate(maps)]
    std, mean = (None, None) if like is None else statistics(like)[:2]
    return list(RescaledChannels.apply(eps, std, mean, *maps))


def by_formula(x: Tensor, like: Tensor | None, eps: float) -> Tensor:
    """`rescaled_channels` of one map with the statistics of all processes."""
    std, mean = channel_statistics(x, sync=True)
    x = (x - mean) / (std + eps)
    if like is None:
        return x
    std, mean = channel_statistics(like, sync=True)
    return x * std + mean


def statistics(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Of M maps with C channels: unbiased deviations and means (M, C); the ratio (M, 1) of unbiased to biased
    deviations; and the maps with mean 0 and biased deviation 1. A single value has deviation zero."""
    tiny = torch.finfo(maps[0].dtype).tiny  # for a constant channel
    normed, means, inverse = zip(*(torch.native_batch_norm(x, None, None, None, None, True, 0.0, tiny) for x in maps))
    counts = [x.numel() // x.shape[1] for x in maps]
    ratio = torch.tensor([[math.sqrt(n / max(n - 1, 1))] for n in counts], dtype=maps[0].dtype, device="cpu")
    # From the CPU, because a CUDA device would be waited for if the tensor were made there.
    ratio = ratio.to(maps[0].device, non_blocking=maps[0].is_cuda)
    return ratio / torch.stack(inverse), torch.stack(means), ratio, list(normed)


class RescaledChannels(torch.autograd.Function):
    """`rescaled_channels` of maps, from the wanted deviations and means (M, C) or None."""

    @staticmethod
    def forward(ctx: Any, eps: float, wanted_std: Tensor | None, wanted_mean: Tensor | None, *maps: Tensor
                ) -> tuple[Tensor, ...]:
        std, mean, ratio, normed = statistics(maps)
        below = std + eps
        factor = std / (below * ratio)
        if wanted_std is not None:
            factor = factor * wanted_std
        ctx.save_for_backward(wanted_std, std, below, mean, ratio, *maps)
        if wanted_mean is None:
            return tuple(x.mul_(a) for x, a in zip(normed, factor[..., None, None]))
        return tuple(torch.addcmul(b, x, a) for x, a, b in zip(
            normed, factor[..., None, None], wanted_mean[..., None, None]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # A batch norm's gradient with deviation d and weight w is w / d (g - mean(g) - (x - mean) mean(g (x - mean)) /
        # d^2). Here the factor is wanted / (std + eps) in place of w / d, and in place of d^2 there is
        # std (std + eps) / ratio^2: d and w follow from both.
        wanted_std, std, below, mean, ratio, *maps = ctx.saved_tensors
        inverse = ratio * (std * below).rsqrt()
        weight = 1 / (below * inverse) if wanted_std is None else wanted_std / (below * inverse)
        found = [torch.ops.aten.native_batch_norm_backward(g.contiguous(memory_format=layout(x)), x, w, None, None, m,
                                                           d, True, 0.0, [True, False, False])[0]
                 for g, x, w, m, d in zip(grads, maps, weight, mean, inverse)]
        return None, None, None, *found


def layout(x: Tensor) -> torch.memory_format:
    """The memory format of a map."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
