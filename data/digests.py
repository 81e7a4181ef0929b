"""Texts that stand for images as detectors get them."""
import hashlib

import torch
from torch import Tensor


def digest(image: Tensor, size: tuple[int, int]) -> str:
    """A short text that stands for an image as a detector gets it: its pixels, its padding, and its size without it.

    Args:
        image: (3, H, W) with padding.
        size: (h, w) without padding.
    """
    image = image.detach().cpu()
    found = hashlib.sha256(f"{image.dtype} {tuple(image.shape)} {tuple(map(int, size))} ".encode())
    rows = image.permute(1, 2, 0).contiguous()  # as `collate` has them, so that nothing is copied
    found.update(rows.flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:32]


def mirror_batch(images: Tensor, targets: list[dict]) -> Tensor:
    """A batch (N, 3, H, W) with each image mirrored left to right within its `image_size`; padding stays where it is.
    """
    mirrored = images.clone()
    for image, target in zip(mirrored, targets):
        height, width = map(int, target["image_size"])
        image[:, :height, :width] = image[:, :height, :width].flip(-1)
    return mirrored
