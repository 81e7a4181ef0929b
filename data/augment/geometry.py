"""Augmentations that move boxes. All but the crop and the quarter turn keep the size of the image."""
import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from data.augment.sample import FILL, IGNORED, Another, Sample, check_order, kept, moved, uniform, whole
from data.ranges import Positive, Range, Share

Angle = Annotated[float, Range(0, 180)]
Shear = Annotated[float, Range(0, 60)]
AtLeastOne = Annotated[float, Range(1)]
Part = Annotated[float, Range(0, 1, open=True)]
CROP_TRIES = 10  # until a crop with a box is found


@dataclass(frozen=True)
class RandomCrop:
    """Cut out a part of the image; boxes whose centre is inside stay, clipped. A crop has a box if the image has one.

    It comes before the resize, wherever it stands in the list: objects in it then become larger, with all the detail
    of the file.
    """

    p: Share = 0.5  # probability for each image
    scale: tuple[Part, Part] = (0.5, 1.0)  # share of the image's area, drawn between these
    ratio: tuple[Positive, Positive] = (0.75, 1.33)  # factor of the image's own proportions

    before_resize: ClassVar[bool] = True

    def __post_init__(self):
        check_order("scale", self.scale)
        check_order("ratio", self.ratio)

    def __call__(self, sample: Sample, another: Another) -> Sample:
        for _ in range(CROP_TRIES):
            h, w = sample.size
            part, stretch = uniform(*self.scale), math.exp(uniform(*map(math.log, self.ratio)))
            height = min(h, max(1, round(h * math.sqrt(part / stretch))))
            width = min(w, max(1, round(w * math.sqrt(part * stretch))))
            top, left = whole(0, h - height), whole(0, w - width)
            centers = (sample.boxes[:, :2] + sample.boxes[:, 2:]) / 2 - sample.boxes.new_tensor([left, top])
            inside = ((centers > 0) & (centers < centers.new_tensor([width, height]))).all(dim=1)
            is_object = sample.labels != IGNORED
            cut = moved(kept(sample, inside | ~is_object), F.crop, top=top, left=left, height=height, width=width)
            if not is_object.any() or (cut.labels != IGNORED).any():
                return cut
        return sample


@dataclass(frozen=True)
class RandomZoomOut:
    """Shrink the image and put it at a random place in a plain image of the same size."""

    p: Share = 0.5  # probability for each image
    side_range: tuple[AtLeastOne, AtLeastOne] = (1.0, 2.0)  # edges become shorter by a factor, drawn between these

    def __post_init__(self):
        check_order("side_range", self.side_range)

    def __call__(self, sample: Sample, another: Another) -> Sample:
        h, w = sample.size
        factor = uniform(*self.side_range)
        height, width = max(1, round(h / factor)), max(1, round(w / factor))
        top, left = whole(0, h - height), whole(0, w - width)
        small = moved(sample, F.resize, zoom=math.sqrt(height * width / (h * w)), size=[height, width], antialias=True)
        return moved(small, F.pad, padding=[left, top, w - width - left, h - height - top], fill=FILL)


@dataclass(frozen=True)
class RandomAffine:
    """Shift, scale, rotate and shear the image (torchvision's RandomAffine); its size stays.

    A rotated or sheared box becomes the upright box around it, which is larger than the object: use small angles.
    """

    p: Share = 0.5  # probability for each image
    degrees: Angle = 0.0  # rotated by up to this angle, in both directions
    translate: tuple[Share, Share] = (0.1, 0.1)  # shifted by up to these shares of the width and the height
    scale: tuple[Positive, Positive] = (0.8, 1.2)  # factor of the size of objects, drawn between these
    shear: Shear = 0.0  # sheared along x by up to this angle, in both directions

    def __post_init__(self):
        check_order("scale", self.scale)

    def __call__(self, sample: Sample, another: Another) -> Sample:
        affine = v2.RandomAffine(self.degrees, tuple(self.translate), tuple(self.scale), self.shear or None)
        drawn = affine.make_params([sample.image])
        return moved(sample, F.affine, zoom=drawn["scale"], interpolation=InterpolationMode.BILINEAR, fill=FILL,
                     **drawn)


@dataclass(frozen=True)
class RandomVerticalFlip:
    """Mirror the image top to bottom, for images without an up and down (microscopy, aerial)."""

    p: Share = 0.5  # probability for each image

    def __call__(self, sample: Sample, another: Another) -> Sample:
        return moved(sample, F.vertical_flip)


@dataclass(frozen=True)
class RandomQuarterTurn:
    """Turn the image by 90, 180 or 270 degrees, for images without an up and down (microscopy, aerial).

    Two of these turns make a portrait image of a landscape image: with images that are not square, batches get more
    padding.
    """

    p: Share = 0.75  # probability for each image; with 0.75, the four directions are equally frequent

    def __call__(self, sample: Sample, another: Another) -> Sample:
        return moved(sample, F.rotate, angle=90 * whole(1, 3), expand=True)
