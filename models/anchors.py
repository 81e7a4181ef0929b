"""Anchor boxes on every cell of every level. Predictions are relative to them."""
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from data.errors import counted
from data.ranges import Count, Factor, Few, Positive, Share, Some

from .build import ConfigError


class Priors(NamedTuple):
    """Anchors of all levels in one sequence, in the order of flattened head outputs: level, then y, x, anchor."""

    boxes: Tensor        # (P, 4) xyxy in input pixels
    cells: Tensor        # (P, 2) x, y of the cell's top left corner in pixels, to compare with image sizes
    strides: Tensor      # (P,) in pixels
    level_sizes: tuple[int, ...]  # anchors per level, P in total

    def take(self, index: Tensor) -> "Priors":
        """The anchors at `index`, with empty `level_sizes`."""
        return Priors(self.boxes[index], self.cells[index], self.strides[index], ())

    @property
    def centers(self) -> Tensor:
        """(P, 2) x, y in pixels."""
        return (self.boxes[..., :2] + self.boxes[..., 2:]) / 2


class AnchorGenerator:
    """Anchors with the given scales and ratios on every cell, as in RetinaNet (arXiv:1708.02002, section 4).

    Args:
        strides: pixels per cell, for each level.
        ratios: height divided by width of the anchors.
        octave_base_scale, scales_per_octave: the scales are octave_base_scale * 2^(i / scales_per_octave).
        scales: the scales themselves, instead of octave_base_scale and scales_per_octave.
        base_sizes: for each level, the size in pixels that the scales multiply; by default its stride.
        center_offset: distance from a cell's top left corner to its anchors' centre, in x and in y, in strides.
        style: the project whose anchors to reproduce. mmdet orders a cell's anchors by ratio, then scale; detectron2
            by scale, then ratio. torchvision orders as mmdet, but it rounds sizes down and corners to whole pixels. Its
            stride is the padded image's size divided by the map's, which can be less than the nominal stride.
    """

    def __init__(self, strides: Some[Count], ratios: Some[Factor], octave_base_scale: Factor | None = None,
                 scales_per_octave: Few | None = None, scales: Some[Factor] | None = None,
                 base_sizes: Some[Positive] | None = None, center_offset: Share = 0.0,
                 style: Literal["mmdet", "detectron2", "torchvision"] = "mmdet"):
        if (scales is None) == (octave_base_scale is None or scales_per_octave is None):
            raise ConfigError("", "must have either scales, or both octave_base_scale and scales_per_octave")
        if base_sizes is not None and len(base_sizes) != len(strides):
            raise ConfigError("base_sizes", f"must have one entry per stride, {len(strides)} in total")
        if scales is None:
            scales = [octave_base_scale * 2 ** (i / scales_per_octave) for i in range(scales_per_octave)]
        self.strides, self.center_offset, self.style = list(strides), center_offset, style
        self.ratios, self.scales, self.base_sizes = list(ratios), list(scales), list(base_sizes or strides)
        self.num_anchors = len(ratios) * len(scales)
        self._cache: dict[tuple, Priors] = {}

    def base_anchors(self, level: int) -> Tensor:
        """The anchors of one cell (A, 4), xyxy relative to their centre."""
        size, whole = self.base_sizes[level], self.style == "torchvision"
        ratios, scales = (torch.tensor(values, dtype=torch.float64) for values in (self.ratios, self.scales))
        sides = (size * scales).floor() if whole else size * scales
        sides, heights = torch.broadcast_tensors(sides[None, :], ratios.sqrt()[:, None])  # (ratios, scales)
        if self.style == "detectron2":
            sides, heights = sides.T, heights.T
        w, h = (sides / heights).flatten(), (sides * heights).flatten()
        boxes = torch.stack([-w, -h, w, h], dim=1) / 2
        return boxes.round() if whole else boxes

    def __call__(self, sizes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> Priors:
        """Anchors for feature maps of the given (height, width), cached for later batches of the same shape."""
        if len(sizes) != len(self.strides):
            raise ConfigError("head.anchor_generator.strides", f"gives {counted(len(self.strides), 'level')}, but the "
                                                               f"features have {len(sizes)}")
        key = (tuple(map(tuple, sizes)), dtype, device)
        if key not in self._cache:
            if len(self._cache) >= 64:  # multi-scale training has many shapes
                self._cache.clear()
            image = [side * self.strides[0] for side in sizes[0]]  # height, width with padding
            levels = [self.level(i, size, image, dtype, device) for i, size in enumerate(sizes)]
            boxes, cells, strides, counts = zip(*levels)
            self._cache[key] = Priors(torch.cat(boxes), torch.cat(cells), torch.cat(strides), sum(counts, ()))
        return self._cache[key]

    def level(self, level: int, size: tuple[int, int], image: Sequence[int], dtype: torch.dtype,
              device: torch.device) -> Priors:
        """Anchors of one level for a map of (height, width), without the cache.

        Args:
            image: height and width of the padded image in pixels.
        """
        (height, width), stride, base = size, self.strides[level], self.base_anchors(level)
        step_y, step_x = stride, stride
        if self.style == "torchvision":
            step_y, step_x = image[0] // height, image[1] // width
        y, x = torch.meshgrid(torch.arange(height) * step_y, torch.arange(width) * step_x, indexing="ij")
        cell = torch.stack([x, y], dim=-1).reshape(-1, 1, 2).double()
        boxes = (cell.repeat(1, 1, 2) + self.center_offset * stride + base).reshape(-1, 4)
        cells = cell.expand(-1, base.shape[0], 2).reshape(-1, 2)
        strides = torch.full(boxes.shape[:1], stride)
        # As `from_host`: many shapes come for the first time with multi-scale training.
        moved = (x.to(device, dtype, non_blocking=device.type == "cuda") for x in (boxes, cells, strides))
        return Priors(*moved, (boxes.shape[0],))


PRIORS = {"AnchorGenerator": AnchorGenerator}
