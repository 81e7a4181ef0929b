"""Feature pyramid network (arXiv:1612.03144) with the references' parameter names."""
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import counted
from data.ranges import AllOr, Count, Few, Number, Positive, Some

from .build import ConfigError, read_section
from .layers import ActCfg, ConvModule, NormCfg


@dataclass
class Upsample:
    """How a map is enlarged: arguments of torch.nn.functional.interpolate."""

    mode: Literal["nearest", "nearest-exact", "bilinear", "bicubic", "area"] = "nearest"
    scale_factor: Positive | None = None  # null: to the size of the next finer level
    align_corners: bool | None = None     # only with bilinear and bicubic

    def __post_init__(self):
        if self.align_corners is not None and self.mode not in ("bilinear", "bicubic"):
            raise ConfigError("align_corners", f"needs the mode bilinear or bicubic, not {self.mode}")


class FPN(nn.Module):
    """Top-down pyramid over backbone levels.

    Args:
        in_channels: channels of every backbone level (derived from the backbone when not given).
        out_channels: channels of every output.
        num_outs: number of outputs; strided convolutions or max-pooling give those beyond the backbone's levels.
        start_level, end_level: first and last backbone level used; -1 is the last level of the backbone.
        add_extra_convs: the input of the first extra convolution: the last backbone level, its lateral, or the last
            output. off uses max-pooling instead of convolutions. True means on_input.
        relu_before_extra_convs: ReLU before each extra convolution except the first.
        no_norm_on_lateral: the lateral convolutions have no norm.
        norm_cfg, act_cfg: norm and activation of every convolution; none by default.
        upsample_cfg: how a map is enlarged to be added to the next finer one.
    """

    def __init__(self, in_channels: Some[Count], out_channels: Count, num_outs: Few, start_level: Number = 0,
                 end_level: AllOr = -1,
                 add_extra_convs: bool | Literal["off", "on_input", "on_lateral", "on_output"] = "off",
                 relu_before_extra_convs: bool = False, no_norm_on_lateral: bool = False, norm_cfg: NormCfg = None,
                 act_cfg: ActCfg = None, upsample_cfg: Upsample | None = None):
        super().__init__()
        last = len(in_channels) - 1
        end_level = last if end_level == -1 else end_level
        levels = end_level - start_level + 1
        if not 0 <= start_level <= end_level <= last:
            wrong = "start_level" if start_level > last else "end_level"
            raise ConfigError(wrong, f"levels {start_level}..{end_level} are not among the backbone's 0..{last}")
        if num_outs < levels or (end_level < last and num_outs != levels):
            raise ConfigError("num_outs", f"{counted(num_outs, 'output')} cannot be made from backbone levels "
                                               f"{start_level}..{end_level} of 0..{last}")
        self.start_level, self.end_level, self.num_outs = start_level, end_level, num_outs
        self.in_channels = list(in_channels)
        self.out_channels = [out_channels] * num_outs
        self.extra_source = {True: "on_input", False: "off"}.get(add_extra_convs, add_extra_convs)
        self.relu_before_extra_convs = relu_before_extra_convs
        self.upsample = read_section(Upsample, upsample_cfg or {}, "upsample_cfg")

        def conv(channels: int, kernel: int, stride: int = 1, norm: NormCfg = norm_cfg) -> ConvModule:
            return ConvModule(channels, out_channels, kernel, stride, kernel // 2, norm_cfg=norm, act_cfg=act_cfg)

        lateral_norm = None if no_norm_on_lateral else norm_cfg
        self.lateral_convs = nn.ModuleList(
            conv(in_channels[i], 1, norm=lateral_norm) for i in range(start_level, end_level + 1))
        self.fpn_convs = nn.ModuleList(conv(out_channels, 3) for _ in range(levels))
        if self.extra_source != "off":
            for i in range(num_outs - levels):
                from_input = i == 0 and self.extra_source == "on_input"
                self.fpn_convs.append(conv(in_channels[end_level] if from_input else out_channels, 3, 2))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def out_strides(self, in_strides: list[int]) -> list[int]:
        """Stride of each output in pixels, from the strides of the backbone's levels."""
        strides = in_strides[self.start_level:self.end_level + 1]
        factor = self.upsample.scale_factor
        if factor and any(coarse != factor * fine for fine, coarse in zip(strides, strides[1:])):
            raise ConfigError("model.neck.upsample_cfg.scale_factor", f"is {factor:g}, and the backbone's strides are "
                                                                      f"{strides}: remove it")
        while len(strides) < self.num_outs:
            strides = strides + [strides[-1] * 2]
        return strides

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """`num_outs` maps of (N, out_channels, H_l, W_l) from the backbone's levels, finest first."""
        if len(inputs) != len(self.in_channels):
            raise ValueError(f"FPN was built for {len(self.in_channels)} backbone levels but got {len(inputs)}")
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, inputs[self.start_level:])]
        for i in range(len(laterals) - 1, 0, -1):
            size = None if self.upsample.scale_factor else laterals[i - 1].shape[-2:]
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=size, **vars(self.upsample))
        outs = [conv(x) for conv, x in zip(self.fpn_convs, laterals)]
        if self.extra_source == "off":
            while len(outs) < self.num_outs:
                outs.append(F.max_pool2d(outs[-1], 1, stride=2))
            return outs
        source = {"on_input": inputs[self.end_level], "on_lateral": laterals[-1], "on_output": outs[-1]}
        for i, conv in enumerate(self.fpn_convs[len(laterals):]):
            if i == 0:
                x = source[self.extra_source]
            else:
                x = F.relu(outs[-1]) if self.relu_before_extra_convs else outs[-1]
            outs.append(conv(x))
        return outs
