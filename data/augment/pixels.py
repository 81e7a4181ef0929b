"""Augmentations that change pixels and move no box.

They come after the resize, because images of cameras are several times larger than what a detector gets, and these
functions take time for every pixel.
"""
import math
from dataclasses import dataclass
from typing import Annotated

from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data.augment.sample import FILL, Another, Sample, area, check_order, without_hidden
from data.ranges import NonNegative, Positive, Range, Share

Hue = Annotated[float, Range(0, 0.5)]


@dataclass(frozen=True)
class ColorJitter:
    """Change brightness, contrast, saturation and hue, in random order (torchvision's ColorJitter)."""

    p: Share = 0.5  # probability for each image
    brightness: NonNegative = 0.2  # the factor of the brightness is drawn from 1 - this to 1 + this
    contrast: NonNegative = 0.2  # the same for the contrast
    saturation: NonNegative = 0.2  # the same for the saturation
    hue: Hue = 0.0  # the hue is shifted by up to this share of the colour circle; this takes much time

    def __call__(self, sample: Sample, another: Another) -> Sample:
        jitter = v2.ColorJitter(self.brightness, self.contrast, self.saturation, self.hue)
        return sample._replace(image=jitter(sample.image))


@dataclass(frozen=True)
class RandomGrayscale:
    """Make the image grey; it keeps three channels."""

    p: Share = 0.1  # probability for each image

    def __call__(self, sample: Sample, another: Another) -> Sample:
        return sample._replace(image=F.rgb_to_grayscale(sample.image, num_output_channels=3))


@dataclass(frozen=True)
class GaussianBlur:
    """Blur the image (torchvision's GaussianBlur); this takes much time on large images."""

    p: Share = 0.1  # probability for each image
    sigma: tuple[Positive, Positive] = (0.1, 1.5)  # the standard deviation in pixels is drawn between these

    def __post_init__(self):
        check_order("sigma", self.sigma)

    def __call__(self, sample: Sample, another: Another) -> Sample:
        side = 2 * math.ceil(2 * self.sigma[1]) + 1  # pixels beyond two standard deviations count for little
        # A kernel must not reach over the whole image.
        kernel = [min(side, 2 * ((edge - 1) // 2) + 1) for edge in reversed(sample.size)]
        return sample._replace(image=v2.GaussianBlur(kernel, tuple(self.sigma))(sample.image))


@dataclass(frozen=True)
class RandomErasing:
    """Fill a rectangle with a uniform colour (torchvision's RandomErasing); boxes with little left are dropped."""

    p: Share = 0.5  # probability for each image
    scale: tuple[Share, Share] = (0.02, 0.1)  # share of the image's area, drawn between these
    ratio: tuple[Positive, Positive] = (0.3, 3.3)  # height of the rectangle divided by its width

    def __post_init__(self):
        check_order("scale", self.scale)
        check_order("ratio", self.ratio)

    def __call__(self, sample: Sample, another: Another) -> Sample:
        erasing = v2.RandomErasing(1.0, tuple(self.scale), tuple(self.ratio), value=FILL)
        drawn = erasing.make_params([sample.image])
        if drawn["v"] is None:  # no rectangle of this shape fits into the image
            return sample
        top, left, h, w = (drawn[key] for key in "ijhw")
        covered = sample.boxes.clamp(sample.boxes.new_tensor([left, top, left, top]),
                                     sample.boxes.new_tensor([left + w, top + h, left + w, top + h]))
        seen = 1 - area(covered) / area(sample.boxes).clamp(min=1e-9)
        image = F.erase(sample.image, **drawn)
        return without_hidden(sample._replace(image=image, visible=sample.visible * seen))
