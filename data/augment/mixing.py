"""Augmentations that put several training images into one. The result has the size of the image that was asked for.

Late in training they stop, so that a detector ends on images that look like those it will see (as in YOLOX).
"""
from dataclasses import dataclass

import torch
from torchvision.transforms.v2 import functional as F

from data.augment.geometry import Part
from data.augment.sample import FILL, Another, Sample, check_order, joined, moved, uniform, whole
from data.ranges import Number, Positive, Share


@dataclass(frozen=True)
class Mosaic:
    """Four images, or parts of them, around a random point (YOLOv4). Each takes as long to read as an image alone."""

    p: Share = 0.5  # probability for each image
    scale: tuple[Part, Part] = (0.5, 1.0)  # edges become shorter by a factor, drawn between these for each of the four
    center: tuple[Share, Share] = (0.3, 0.7)  # the point is drawn between these shares of the width and the height
    stop_epoch: Number | None = None  # from this epoch on (the first is 0) it is left out; null: the last tenth of all

    def __post_init__(self):
        check_order("scale", self.scale)
        check_order("center", self.center)

    def __call__(self, sample: Sample, another: Another) -> Sample:
        h, w = sample.size
        y, x = (round(edge * uniform(*self.center)) for edge in (h, w))
        canvas = sample.image.new_tensor(FILL)[:, None, None].repeat(1, h, w)
        quarters = [(0, 0, y, x), (0, x, y, w), (y, 0, h, x), (y, x, h, w)]
        own, parts = whole(0, 3), []
        for number, (top, left, bottom, right) in enumerate(quarters):
            zoom = uniform(*self.scale)
            size = [max(1, round(h * zoom)), max(1, round(w * zoom))]
            tile = moved(sample, F.resize, zoom, size=size, antialias=True) if number == own else another(tuple(size))
            height, width = min(tile.size[0], bottom - top), min(tile.size[1], right - left)
            if not height or not width:
                continue
            tile = moved(tile, F.crop, top=whole(0, tile.size[0] - height), left=whole(0, tile.size[1] - width),
                         height=height, width=width)
            if number in (0, 1):  # a tile that is smaller than its quarter touches the point
                top = bottom - height
            if number in (0, 2):
                left = right - width
            canvas[:, top:top + height, left:left + width] = tile.image
            parts.append(tile._replace(boxes=tile.boxes + tile.boxes.new_tensor([left, top, left, top])))
        return joined(canvas, parts)


@dataclass(frozen=True)
class MixUp:
    """The image, mixed with a second one as if both were transparent; with the boxes of both (mixup for detection)."""

    p: Share = 0.5  # probability for each image
    alpha: Positive = 8.0  # the image's share is drawn from Beta(alpha, alpha): the larger, the nearer to one half
    stop_epoch: Number | None = None  # from this epoch on (the first is 0) it is left out; null: the last tenth of all

    def __call__(self, sample: Sample, another: Another) -> Sample:
        other = another(sample.size)
        (h, w), (height, width) = sample.size, other.size
        top, left = whole(0, h - height), whole(0, w - width)
        share = torch.distributions.Beta(self.alpha, self.alpha).sample()
        image = sample.image.clone()
        place = image[:, top:top + height, left:left + width]
        place.copy_((share * place + (1 - share) * other.image).round())
        other = other._replace(boxes=other.boxes + other.boxes.new_tensor([left, top, left, top]))
        return joined(image, [sample, other])
