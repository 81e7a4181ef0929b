"""Resizing and flipping images with their boxes. Images are uint8 tensors (3, h, w), RGB."""
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F


def resized_size(size: tuple[int, int], scale: tuple[int, int],
                 within: tuple[int | None, int | None] = (None, None)) -> tuple[int, int]:
    """The largest size (h, w) for an image of `size` (h, w) that fits `scale` and keeps the proportions.

    `scale` bounds the long and the short edge, in either order: (1333, 800) means a long edge of at most 1333 pixels
    and a short one of at most 800. `within` also bounds the height and the width, where it is not None.
    """
    h, w = size
    factor = min(max(scale) / max(h, w), min(scale) / min(h, w),
                 *(most / edge for most, edge in zip(within, size) if most is not None))
    # A very thin image keeps at least one pixel.
    return max(1, int(h * factor + 0.5)), max(1, int(w * factor + 0.5))


def padded_size(size: tuple[int, int], divisor: int = 32) -> tuple[int, int]:
    """`size` (h, w) with each edge rounded up to a multiple of `divisor`."""
    h, w = size
    return -(-h // divisor) * divisor, -(-w // divisor) * divisor


def resize_image(image: Tensor, size: tuple[int, int], antialias: bool = False) -> Tensor:
    """Bilinear resize of an image (3, h, w) to `size` (h, w)."""
    return F.resize(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=antialias)


def resize_boxes(boxes: Tensor, old_size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Scale boxes (n, 4) from an image of `old_size` (h, w) to one of `new_size`, and clip them to the new image."""
    (old_h, old_w), (new_h, new_w) = old_size, new_size
    ratios = boxes.new_tensor([new_w / old_w, new_h / old_h, new_w / old_w, new_h / old_h])
    return (boxes * ratios).clamp(min=boxes.new_zeros(4), max=boxes.new_tensor([new_w, new_h, new_w, new_h]))


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Mirror boxes (n, 4) left to right in an image of `width` pixels."""
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=1)


def flip_image(image: Tensor) -> Tensor:
    """Mirror an image (3, h, w) left to right."""
    return F.horizontal_flip(image)
