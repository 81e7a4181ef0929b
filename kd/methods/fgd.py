"""FGD: focal and global knowledge distillation for detectors (Yang et al., arXiv:2111.11837)."""
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.ranges import NonNegative, Number, Positive, Some
from losses import at_least_float32
from models import Detector, DetectorPass
from models.layers import from_host, kaiming_init

from .base import BarChart, HeatMap, Method, adapter

MAX_CELLS = 2 ** 26  # cells of a map, times boxes, that are in memory at once


class FGD(Method):
    """Imitation of feature maps, weighted by the teacher's attention and by objects, plus a global relation.

    Args:
        levels, student_modules, teacher_modules: the maps that are distilled, see `FeaturePairs`.
        temp: temperature of the attention (eq. 5, 6).
        alpha_fgd, beta_fgd: weights of features on objects and on background (eq. 9).
        gamma_fgd: weight of the imitation of the attention itself (eq. 10).
        lambda_fgd: weight of the global relation (eq. 13). A weight of 0 omits its part.
        adapter_kernel: kernel size of the convolution that is added where student and teacher differ in channels.
    """

    needs = ("features",)

    def __init__(self, student: Detector, teacher: Detector, levels: Some[Number] | None = None,
                 student_modules: Some[str] | None = None, teacher_modules: Some[str] | None = None,
                 temp: Positive = 0.5, alpha_fgd: NonNegative = 0.001, beta_fgd: NonNegative = 0.0005,
                 gamma_fgd: NonNegative = 0.001, lambda_fgd: NonNegative = 0.000005,
                 adapter_kernel: Literal[1, 3] = 1):
        super().__init__()
        self.pair_features(student, teacher, levels, student_modules, teacher_modules, None)
        self.part_weights = dict(alpha_fgd=alpha_fgd, beta_fgd=beta_fgd, gamma_fgd=gamma_fgd, lambda_fgd=lambda_fgd)
        self.losses = nn.ModuleList(FeatureLoss(*channels, temp, **self.part_weights, adapter_kernel=adapter_kernel)
                                    for channels in zip(self.pairs.student_channels, self.pairs.teacher_channels))

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        boxes = [t["boxes"] for t in student.targets]
        sizes = [t["image_size"] for t in student.targets]
        return {"loss_fgd": sum(loss(own, other, boxes, sizes)
                                for loss, (own, other) in zip(self.losses, self.pairs(student, teacher)))}

    def weights(self) -> dict[str, float]:
        return self.part_weights

    def charts(self, student: DetectorPass, teacher: DetectorPass, trained: bool
               ) -> dict[str, list[list[HeatMap | BarChart]]]:
        """Spatial attention of both models, foreground weights and channel attention; a column for each pair of maps.

        The student's map is shown after the convolution to the teacher's channels, if that convolution is trained.
        """
        columns, boxes = [], [target["boxes"] for target in student.targets[:1] if "boxes" in target]
        for loss, (own, other), (place, _) in zip(self.losses, self.pairs.maps(student, teacher), self.pairs.places()):
            if loss.align is not None and trained:
                own = loss.align(own)
            spatial, channel = zip(*(attention(x[:1].float(), loss.temp) for x in (other, own)))
            column = [HeatMap(f"{who}, {place}: attention up to {float(values.max()):.1f}", values[0])
                      for who, values in zip(("teacher", "student"), spatial)]
            if boxes:
                mask = box_masks([boxes[0].to(own.device)], [student.targets[0]["image_size"]], spatial[0])[0]
                column.append(HeatMap(f"foreground weight up to {float(mask.max()):.3f}", mask[0]))
            column += [BarChart(f"{who}'s {values.shape[1]} channels: up to {float(values.max()):.1f}, line at 1",
                                values[0], line=1.0) for who, values in zip(("teacher", "student"), channel)]
            columns.append(column)
        return {"attention": columns}


class FeatureLoss(nn.Module):
    """FGD on one level. The parameter names are those of the original code."""

    def __init__(self, student_channels: int, teacher_channels: int, temp: float = 0.5, alpha_fgd: float = 0.001,
                 beta_fgd: float = 0.0005, gamma_fgd: float = 0.001, lambda_fgd: float = 0.000005,
                 adapter_kernel: int = 1):
        super().__init__()
        self.temp = temp
        self.alpha_fgd, self.beta_fgd, self.gamma_fgd, self.lambda_fgd = alpha_fgd, beta_fgd, gamma_fgd, lambda_fgd
        self.align = None
        if student_channels != teacher_channels:
            self.align = adapter(student_channels, teacher_channels, adapter_kernel)
        if lambda_fgd:
            self.conv_mask_s, self.channel_add_conv_s = context_block(teacher_channels)
            self.conv_mask_t, self.channel_add_conv_t = context_block(teacher_channels)

    def forward(self, student: Tensor, teacher: Tensor, boxes: list[Tensor],
                image_sizes: list[tuple[int, int]]) -> Tensor:
        """The loss, a scalar.

        Args:
            student, teacher: maps (N, C_s, H, W) and (N, C_t, H, W).
            boxes: per image (n, 4) xyxy in input pixels.
            image_sizes: per image (height, width) before padding.
        """
        terms = self.terms(student, teacher, boxes, image_sizes)
        weights = {"fg": self.alpha_fgd, "bg": self.beta_fgd, "mask": self.gamma_fgd, "relation": self.lambda_fgd}
        return sum(weights[name] * term for name, term in terms.items())

    def terms(self, student: Tensor, teacher: Tensor, boxes: list[Tensor],
              image_sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
        """The four parts whose weight is not zero, unweighted: `fg`, `bg`, `mask`, `relation`."""
        if self.align is not None:
            student = self.align(student)
        student, teacher = at_least_float32(student), at_least_float32(teacher)
        n, terms = len(student), {}
        spatial_t, channel_t = attention(teacher, self.temp)
        if self.alpha_fgd or self.beta_fgd:
            fg, bg = box_masks(boxes, image_sizes, spatial_t)
            error = ((student - teacher) ** 2 * channel_t[:, :, None, None]).sum(1) * spatial_t  # (N, H, W)
            if self.alpha_fgd:
                terms["fg"] = (error * fg).sum() / n
            if self.beta_fgd:
                terms["bg"] = (error * bg).sum() / n
        if self.gamma_fgd:
            spatial_s, channel_s = attention(student, self.temp)
            terms["mask"] = (channel_s - channel_t).abs().sum() / n + (spatial_s - spatial_t).abs().sum() / n
        if self.lambda_fgd:
            related_s = student + self.channel_add_conv_s(context(student, self.conv_mask_s))
            related_t = teacher + self.channel_add_conv_t(context(teacher, self.conv_mask_t))
            terms["relation"] = F.mse_loss(related_s, related_t, reduction="sum") / n
        return terms


def context_block(channels: int) -> tuple[nn.Conv2d, nn.Sequential]:
    """GcBlock (arXiv:1904.11492): a weight for each cell, and layers that add to every channel, at first nothing."""
    mask = nn.Conv2d(channels, 1, 1)
    kaiming_init(mask, mode="fan_in")
    half = channels // 2
    add = nn.Sequential(nn.Conv2d(channels, half, 1), nn.LayerNorm([half, 1, 1]), nn.ReLU(inplace=True),
                        nn.Conv2d(half, channels, 1))
    nn.init.zeros_(add[-1].weight)
    nn.init.zeros_(add[-1].bias)
    return mask, add


def context(x: Tensor, mask: nn.Conv2d) -> Tensor:
    """(N, C, 1, 1): the map (N, C, H, W) pooled by a learned spatial softmax."""
    weight = mask(x).flatten(1).softmax(-1)
    return torch.einsum("ncp,np->nc", x.flatten(2), weight.to(x.dtype))[:, :, None, None]


def attention(x: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    """Spatial (N, H, W) and channel (N, C) attention of a map (N, C, H, W); each averages to 1 (eq. 5, 6)."""
    n, c, h, w = x.shape
    value = x.abs()
    spatial = h * w * (value.mean(1).flatten(1) / temp).softmax(-1).view(n, h, w)
    return spatial, c * (value.mean((2, 3)) / temp).softmax(-1)


def box_masks(boxes: list[Tensor], image_sizes: list[tuple[int, int]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Foreground and background weights (N, H, W): 1 / area of the smallest box on a cell; the background sums to 1.

    As in the original, boxes are divided by the image's size without padding and scaled to the whole padded map.
    """
    n, h, w = like.shape
    most = max(1, *map(len, boxes))
    padded = like.new_zeros(n, most, 4)
    real = torch.zeros(n, most, dtype=torch.bool, device=like.device)
    for i, b in enumerate(boxes):
        padded[i, :len(b)], real[i, :len(b)] = b, True
    height, width = from_host(image_sizes, like).T[:, :, None]  # each (N, 1)
    left, right = (padded[..., 0] / width * w).floor(), (padded[..., 2] / width * w).ceil()
    top, bottom = (padded[..., 1] / height * h).floor(), (padded[..., 3] / height * h).ceil()
    weight = real / (bottom + 1 - top) / (right + 1 - left)

    x, y = torch.arange(w, device=like.device), torch.arange(h, device=like.device)
    columns = (x >= left.unsqueeze(-1)) & (x <= right.unsqueeze(-1))                      # (N, G, W)
    rows = ((y >= top.unsqueeze(-1)) & (y <= bottom.unsqueeze(-1))) * weight.unsqueeze(-1)  # (N, G, H)
    fg = like.new_zeros(n, h, w)
    size = max(1, MAX_CELLS // (n * h * w))
    for row, column in zip(rows.split(size, dim=1), columns.split(size, dim=1)):
        fg = torch.maximum(fg, (row.unsqueeze(-1) * column.unsqueeze(-2)).amax(1))
    bg = (fg <= 0).to(like.dtype)
    return fg, bg / bg.sum((1, 2), keepdim=True).clamp(min=1)
