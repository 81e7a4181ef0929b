"""A training image with its boxes while it is augmented, and what every augmentation does with boxes."""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from data.errors import DataError

IGNORED = -1  # the label of a box that is ignored in training
MIN_VISIBLE = 0.2  # a box with a smaller share of its area left is dropped
MIN_SIDE = 1.0  # pixels; a box with a shorter side is dropped, too
FILL = [124, 116, 104]  # new pixels get the mean colour of ImageNet


class Sample(NamedTuple):
    """An image and its boxes.

    Ignored boxes are among the others, so that everything that moves boxes moves them, too.
    """

    image: Tensor  # uint8 (3, h, w)
    boxes: Tensor  # (n, 4) float32, xyxy in the image's pixels and clipped to it
    labels: Tensor  # (n,) int64, or IGNORED
    visible: Tensor  # (n,) float32, the share of the annotated box that is left

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) in pixels."""
        return tuple(self.image.shape[-2:])


# Reads another training image, chosen at random, resized to fit (h, w) and randomly flipped.
Another = Callable[[tuple[int, int]], Sample]


@contextmanager
def random_draws(*seed: int) -> Iterator[None]:
    """A context in which the draws from PyTorch's generator of the CPU depend only on `seed`, natural numbers.

    The generator then goes on as if nothing had been drawn. Generators of devices are left alone.
    """
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(state[0]))
        yield


def apply(augmentations: Sequence[Any], sample: Sample, another: Another) -> Sample:
    """The sample after each augmentation, in order, with its probability."""
    for each in augmentations:
        if torch.rand(()) < each.p:
            sample = each(sample, another)
    return sample


def moved(sample: Sample, transform: Callable, zoom: float = 1.0, **arguments: Any) -> Sample:
    """Move the image and its boxes by a geometric function of torchvision.transforms.v2, called with `arguments`.

    Boxes are clipped, and those with little left are dropped. `zoom` is the factor by which lengths grow, which tells a
    box that was made smaller from one that was cut.
    """
    before = F.clamp_bounding_boxes(  # annotated boxes may reach beyond the image
        tv_tensors.BoundingBoxes(sample.boxes, format="XYXY", canvas_size=sample.size))
    after = F.clamp_bounding_boxes(transform(before, **arguments)).as_subclass(Tensor)
    left = area(after) / (area(before.as_subclass(Tensor)) * zoom ** 2).clamp(min=1e-9)
    image = transform(sample.image, **arguments)
    return without_hidden(Sample(image, after, sample.labels, sample.visible * left.clamp(max=1)))


def area(boxes: Tensor) -> Tensor:
    """The areas (n,) of boxes (n, 4)."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def without_hidden(sample: Sample) -> Sample:
    """Drop boxes with little left, and ignored boxes with nothing left."""
    ignored, sides = sample.labels == IGNORED, (sample.boxes[:, 2:] - sample.boxes[:, :2]).amin(dim=1)
    return kept(sample, torch.where(ignored, sides > 0, (sample.visible >= MIN_VISIBLE) & (sides >= MIN_SIDE)))


def kept(sample: Sample, which: Tensor) -> Sample:
    """The sample with only the boxes for which `which`, (n,) bool, is true."""
    return sample._replace(boxes=sample.boxes[which], labels=sample.labels[which], visible=sample.visible[which])


def joined(image: Tensor, parts: list[Sample]) -> Sample:
    """An image with the boxes of several samples, which are in its pixels already."""
    return Sample(image, *(torch.cat(each) for each in list(zip(*parts))[1:]))


def uniform(low: float, high: float) -> float:
    """A random number between two others."""
    return low + (high - low) * torch.rand(()).item()


def whole(low: int, high: int) -> int:
    """A random integer from `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, ()))


def check_order(name: str, limits: tuple[float, float]) -> None:
    """Raise DataError if the first of two limits is larger than the second."""
    if limits[0] > limits[1]:
        raise DataError(f"the first number of {name} must not be larger than the second, but it is {list(limits)}")
