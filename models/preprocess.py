"""Normalisation of a detector's input with its pixel statistics."""
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from data.ranges import Positive, Range
from losses import widest_float

Pixel = Annotated[float, Range(0, 255)]


class Preprocess(nn.Module):
    """Turns uint8 RGB batches into the input that the detector was trained on.

    Args:
        mean, std: per channel, in 0..255, in the order of `channel_order`.
        channel_order: the order that the detector takes; images are read as RGB.
    """

    def __init__(self, mean: tuple[Pixel, Pixel, Pixel] = (123.675, 116.28, 103.53),
                 std: tuple[Positive, Positive, Positive] = (58.395, 57.12, 57.375),
                 channel_order: Literal["rgb", "bgr"] = "rgb"):
        super().__init__()
        self.channel_order, self.statistics = channel_order, (list(mean), list(std))
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64).view(3, 1, 1), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Preprocess":
        # The statistics move to another device but stay as exact as it allows. They are cast where they are used.
        device = fn(torch.zeros(0, device=self.mean.device)).device
        self.mean, self.std = (torch.tensor(values, dtype=widest_float(device), device=device).view(3, 1, 1)
                               for values in self.statistics)
        return self

    def forward(self, images: Tensor, targets: list[dict], dtype: torch.dtype = torch.float32) -> Tensor:
        """Normalise a uint8 RGB batch (N, 3, H, W); pixels beyond each `image_size` become zero."""
        return zero_padding(self.normalise(images, dtype), targets)

    def normalise(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """A uint8 RGB batch (N, 3, H, W) with the detector's statistics and channel order."""
        if self.channel_order == "bgr":
            images = images.flip(1)
        # A batch may be in channels-last memory format, and then the whole detector would use that format.
        images = images.to(dtype, memory_format=torch.contiguous_format)
        return (images - self.mean.to(dtype)) / self.std.to(dtype)

    def convert(self, images: Tensor, targets: list[dict], source: "Preprocess") -> Tensor:
        """Convert images that `source` has normalised to this detector's statistics and channel order."""
        same_order = self.channel_order == source.channel_order
        if same_order and self.statistics == source.statistics:
            return images
        images = images * source.std.to(images.dtype) + source.mean.to(images.dtype)
        if not same_order:
            images = images.flip(1)
        return zero_padding((images - self.mean.to(images.dtype)) / self.std.to(images.dtype), targets)


def zero_padding(images: Tensor, targets: list[dict]) -> Tensor:
    """Set everything beyond each image's `image_size` to zero, in place."""
    for image, target in zip(images, targets):
        height, width = target["image_size"]
        image[:, int(height):] = 0
        image[:, :, int(width):] = 0
    return images
