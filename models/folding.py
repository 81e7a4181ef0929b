"""Convolutions with what follows them: a batch norm that is folded into the weight, a sum, an activation."""
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Folded(NamedTuple):
    """The weight and bias of a convolution with its norm, and what they were made from."""

    source: tuple
    weight: Tensor
    bias: Tensor
    given: list[Tensor]  # is kept so that no other tensor comes to be at the same address


KEPT: WeakKeyDictionary[nn.Conv2d, Folded] = WeakKeyDictionary()  # of convolutions and norms that do not learn


class PickingConv2d(nn.Conv2d):
    """A 1x1 convolution with a stride that picks the pixels first, see `strided_pointwise`."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self, x, self.weight, self.bias)


LEAST_CHANNELS = 16  # of a strided 1x1 convolution in oneDNN; half of it without AVX-512


def strided_pointwise(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    """A 1x1 convolution with a stride, without a bias.

    With fewer than 16 input channels in channels_last, its weight gradient must not run in oneDNN (3.12 and before):
    it writes beyond its memory, and the process crashes, often much later (uxlfoundation/oneDNN#6035). Such a
    convolution picks the pixels itself, so oneDNN sees no stride. The result is the same.
    """
    kind = PickingConv2d if stride > 1 and in_channels < LEAST_CHANNELS else nn.Conv2d
    return kind(in_channels, out_channels, 1, stride, bias=False)


def convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`conv(x)` with another weight and bias."""
    if isinstance(conv, PickingConv2d):
        return F.conv2d(F.avg_pool2d(x, 1, conv.stride), weight, bias)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor, relu: nn.Module | None = None, plus: Tensor | None = None
              ) -> Tensor:
    """`relu(norm(conv(x)) + plus)`, as one convolution if the norm is a batch norm in evaluation mode.

    This norm only scales and shifts each channel, so it is folded into the convolution's weight and bias, and gradients
    still reach both layers. The convolution's output need not be read, written and stored a second time.

    Args:
        relu: a ReLU that may work in place.
        plus: is added first, see above.
    """
    hooked = conv._forward_hooks or norm._forward_hooks  # a hook needs the tensor between the two
    if norm.training or hooked or not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        x = norm(conv(x))
    else:
        weight, bias = fold(conv, norm)
        if relu is not None and not relu._forward_hooks and can_fuse(x, weight, bias, plus):
            return fused(conv, x, weight, bias, plus)
        x = convolve(conv, x, weight, bias)
    if plus is not None:
        x += plus
    return x if relu is None else relu(x)


def fold(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The weight and bias of `conv` with the batch norm `norm` in evaluation mode. If nothing of both learns, they are
    computed once, and again when a value has changed."""
    given = (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return folded_by_formula(*given, norm.eps)
    learns = any(x is not None and x.requires_grad for x in given)
    if learns and torch.is_grad_enabled():
        return Fold.apply(*given, norm.eps)
    if learns or not getattr(conv, "keep_folded", True) or not all(x is None or is_plain(x) for x in given):
        return folded_by_formula(*given, norm.eps)
    dtype = conv.weight.dtype
    if torch.is_autocast_enabled(conv.weight.device.type):  # which would convert them again in each step
        dtype = torch.get_autocast_dtype(conv.weight.device.type)
    source = (dtype, norm.eps, *(None if x is None else (x.data_ptr(), x._version, x.dtype, x.stride()) for x in given))
    kept = KEPT.get(conv)
    if kept is None or kept.source != source:
        with torch.inference_mode(False), torch.no_grad():
            kept = Folded(source, *(x.to(dtype) for x in folded_by_formula(*given, norm.eps)),
                          [x.detach() for x in given if x is not None])
        if is_plain(kept.weight):
            KEPT[conv] = kept
    return kept.weight, kept.bias


def is_plain(x: Tensor) -> bool:
    """Whether a tensor has values and counts its changes. Those of FakeTensorMode, the meta device and inference mode
    do not."""
    return type(x) in (Tensor, nn.Parameter) and not x.is_meta and not x.is_inference()


def do_not_keep_folded(module: nn.Module) -> None:
    """Compute folded weights for each use: a copy would defeat the purpose of weights that are spread over processes.
    """
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            conv.keep_folded = False


def folded_by_formula(weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor, mean: Tensor, variance: Tensor,
                      eps: float) -> tuple[Tensor, Tensor]:
    """`fold` from the tensors of the two layers."""
    scale = gain * (variance + eps).rsqrt()
    shift = shift - mean * scale
    return weight * scale[:, None, None, None], shift if bias is None else shift + bias * scale


class Fold(torch.autograd.Function):
    """`folded_by_formula`, with a gradient of four operators in place of seven."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor, mean: Tensor,
                variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inverse = (variance + eps).rsqrt()
        scale = gain * inverse
        below = mean if bias is None else mean - bias
        ctx.save_for_backward(weight, inverse, scale, below)
        return weight * scale[:, None, None, None], torch.addcmul(shift, below, scale, value=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_weight: Tensor, of_bias: Tensor) -> tuple[Tensor | None, ...]:
        weight, inverse, scale, below = ctx.saved_tensors
        needed = ctx.needs_input_grad
        of_gain = None
        if needed[2]:
            # In memory order, so that nothing is copied.
            last = weight.is_contiguous(memory_format=torch.channels_last)
            rows, columns = (x.permute(0, 2, 3, 1) if last else x for x in (of_weight, weight))
            product = torch.bmm(rows.reshape(len(rows), 1, -1), columns.reshape(len(rows), -1, 1)).flatten()
            of_gain = product.addcmul_(below, of_bias, value=-1).mul_(inverse)
        return (of_weight * scale[:, None, None, None] if needed[0] else None, of_bias * scale if needed[1] else None,
                of_gain, of_bias if needed[3] else None, None, None, None)


def can_fuse(x: Tensor, weight: Tensor, bias: Tensor, plus: Tensor | None) -> bool:
    """Whether `fused` can be used: without gradients, in float32, where oneDNN is."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    given = [t for t in (x, weight, bias, plus) if t is not None]
    return (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
            and all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.is_cpu for t in given)
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in given)))


def fused(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor, plus: Tensor | None) -> Tensor:
    """`relu(conv(x) + plus)` with another weight and bias, by oneDNN in one pass."""
    sizes = conv.padding, conv.stride, conv.dilation, conv.groups
    if plus is None:
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *sizes, "relu", [], "")
    return torch.ops.mkldnn._convolution_pointwise.binary(x, plus, weight, bias, *sizes, "add", 1.0, "relu", [], "")
