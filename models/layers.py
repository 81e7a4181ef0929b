"""Layers that backbones, necks and heads share."""
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.ranges import Count, NonNegative, Positive, Share

from .build import ConfigError, OneOf, build
from .folding import conv_norm


def from_host(values: Sequence, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The values as a tensor on the device of `like`, by default with its dtype. Unlike `like.new_tensor(values)`, it
    does not wait for a CUDA device."""
    return torch.tensor(values, dtype=dtype or like.dtype, device="cpu").to(like.device, non_blocking=like.is_cuda)


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm that never learns: running statistics, weight and bias stay as loaded, also in training."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__(channels, eps=eps)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        return super().train(False)


def keep_in_eval(module: nn.Module, frozen: Iterable[nn.Module], norm_eval: bool) -> None:
    """Put `frozen` parts of a module, and with `norm_eval` all its batch norms, into evaluation mode."""
    norms = (m for m in module.modules() if norm_eval and isinstance(m, nn.modules.batchnorm._BatchNorm))
    for part in (*frozen, *norms):
        part.eval()


@dataclass
class BatchNorm:
    """Batch norm with the statistics of one process; they are not used in training with `norm_eval`."""

    eps: Positive = 1e-5        # added to the variance
    momentum: Share = 0.1       # the weight of a batch in the running statistics
    requires_grad: bool = True  # whether its weight and bias are trained
    layer: ClassVar[Callable[..., nn.Module]] = nn.BatchNorm2d

    def __call__(self, channels: int) -> nn.Module:
        return self.layer(channels, eps=self.eps, momentum=self.momentum).requires_grad_(self.requires_grad)


@dataclass
class SyncBatchNorm(BatchNorm):
    """Batch norm with the statistics of all processes (CUDA). The arguments are those of `BN`."""

    layer: ClassVar[Callable[..., nn.Module]] = nn.SyncBatchNorm


@dataclass
class Frozen:
    """Batch norm that never learns: running statistics, weight and bias stay as loaded."""

    eps: NonNegative = 1e-5                # added to the variance
    requires_grad: Literal[False] = False  # accepted for other projects' configurations

    def __call__(self, channels: int) -> nn.Module:
        return FrozenBatchNorm(channels, self.eps)


@dataclass
class GroupNorm:
    """Group norm (arXiv:1803.08494)."""

    num_groups: Count = 32      # must divide the number of channels
    eps: Positive = 1e-5        # added to the variance
    requires_grad: bool = True  # whether its weight and bias are trained

    def __call__(self, channels: int) -> nn.Module:
        if channels % self.num_groups:
            raise ConfigError("norm_cfg.num_groups",
                              f"{channels} channels cannot be split into {self.num_groups} groups")
        return nn.GroupNorm(self.num_groups, channels, self.eps).requires_grad_(self.requires_grad)


NORMS = {"BN": BatchNorm, "SyncBN": SyncBatchNorm, "FrozenBN": Frozen, "GN": GroupNorm}
Norm = Literal["BN", "SyncBN", "FrozenBN", "GN"] | Annotated[dict, OneOf(NORMS)]
NormCfg = Norm | None


def build_norm(cfg: Norm, channels: int) -> tuple[str, nn.Module]:
    """A norm by name, or by a mapping with its `type` and arguments; and the references' name for it, `gn` or `bn`."""
    norm = build({"type": cfg} if isinstance(cfg, str) else cfg, NORMS, "norm_cfg")(channels)
    return ("gn" if isinstance(norm, nn.GroupNorm) else "bn"), norm


def relu(inplace: bool = False) -> nn.Module:
    """max(x, 0)."""
    return nn.ReLU(inplace)


def leaky_relu(negative_slope: NonNegative = 0.01, inplace: bool = False) -> nn.Module:
    """x above zero, `negative_slope` times x below."""
    return nn.LeakyReLU(negative_slope, inplace)


def silu(inplace: bool = False) -> nn.Module:
    """x times its sigmoid (arXiv:1702.03118)."""
    return nn.SiLU(inplace)


def gelu(approximate: Literal["none", "tanh"] = "none") -> nn.Module:
    """x times the normal distribution's cumulative function (arXiv:1606.08415)."""
    return nn.GELU(approximate)


ACTIVATIONS = {"ReLU": relu, "LeakyReLU": leaky_relu, "SiLU": silu, "GELU": gelu}
ActCfg = Literal["ReLU", "LeakyReLU", "SiLU", "GELU"] | Annotated[dict, OneOf(ACTIVATIONS)] | None


def build_activation(cfg: ActCfg) -> nn.Module:
    """An activation by name, or by a mapping with its `type` and arguments; None is the identity."""
    if cfg is None:
        return nn.Identity()
    return build({"type": cfg} if isinstance(cfg, str) else cfg, ACTIVATIONS, "act_cfg")


class ConvModule(nn.Module):
    """Convolution, norm and activation, with mmcv's parameter names: `conv.*`, and `gn.*` or `bn.*`.

    `bias=None` gives the convolution a bias if no norm follows.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0,
                 bias: bool | None = None, norm_cfg: NormCfg = None, act_cfg: ActCfg = "ReLU"):
        super().__init__()
        if bias is None:
            bias = norm_cfg is None
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        kaiming_init(self.conv)
        self.norm_name = None
        if norm_cfg is not None:
            self.norm_name, norm = build_norm(norm_cfg, out_channels)
            self.add_module(self.norm_name, norm)
        self.activate = build_activation(act_cfg)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) if self.norm_name is None else conv_norm(self.conv, getattr(self, self.norm_name), x)
        return F.relu_(x) if isinstance(self.activate, nn.ReLU) else self.activate(x)  # in place: nothing else needs x


class Scale(nn.Module):
    """A learned factor."""

    def __init__(self, value: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def kaiming_init(conv: nn.Conv2d, mode: str = "fan_out") -> None:
    """He initialisation (arXiv:1502.01852) for ReLU; the bias is zero."""
    nn.init.kaiming_normal_(conv.weight, mode=mode, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def normal_init(conv: nn.Conv2d, std: float = 0.01, bias: float = 0.0) -> None:
    """Weights from a normal distribution; the bias is a constant."""
    nn.init.normal_(conv.weight, std=std)
    if conv.bias is not None:
        nn.init.constant_(conv.bias, bias)


def prior_bias(prob: float = 0.01) -> float:
    """The bias with which a sigmoid starts at the score `prob` (RetinaNet, arXiv:1708.02002, section 3.3)."""
    return -math.log((1 - prob) / prob)
