"""Images without annotations: from files or videos, prepared for a detector."""
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import Tensor
from torch.utils.data import Dataset

from data.errors import UnreadableImage
from data.images import read_image
from data.transforms import padded_size, resize_image, resized_size

Item = TypeVar("Item")


class Sample(NamedTuple):
    """An image prepared for a detector, at one or more scales."""

    image: Tensor | None  # uint8 (3, h, w), as in the file; None if nobody needs it
    views: list[Tensor]  # uint8 (3, h, w), resized to fit each scale
    targets: list[dict]  # for each view: image_size, pad_size, original_size and image_id


def make_sample(image: Tensor, image_id: int, scales: Sequence[tuple[int, int]], antialias: bool = False,
                within: tuple[int | None, int | None] = (None, None)) -> Sample:
    """The sample that evaluation makes from an image, uint8 (3, h, w), at each scale (long edge, short edge), and no
    larger than `within` (height, width), where it is not None."""
    original_size = tuple(image.shape[1:])
    sizes = [resized_size(original_size, scale, within) for scale in scales]
    targets = [
        {"image_size": size, "pad_size": padded_size(size), "original_size": original_size, "image_id": image_id}
        for size in sizes
    ]
    return Sample(image, [resize_image(image, size, antialias) for size in sizes], targets)


class ImageFiles(Dataset):
    """Samples by index, see `make_sample`. For an image that cannot be read, the item is its error message.

    Args:
        paths: paths of the images.
        image_ids: one id per image.
        scales, antialias, within: see `make_sample`.
        originals: whether a sample holds the image as in the file, too. It is large, and takes time to be sent.
    """

    def __init__(self, paths: Sequence[Path], image_ids: Sequence[int], scales: Sequence[tuple[int, int]],
                 antialias: bool = False, originals: bool = True,
                 within: tuple[int | None, int | None] = (None, None)):
        self.paths, self.image_ids, self.scales, self.antialias = list(paths), list(image_ids), scales, antialias
        self.originals, self.within = originals, within

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample | str:
        try:
            image = read_image(self.paths[index])
        except UnreadableImage as error:
            return str(error)
        sample = make_sample(image, self.image_ids[index], self.scales, self.antialias, self.within)
        return sample if self.originals else sample._replace(image=None)


def batches_of_one_size(samples: Iterable[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Group samples whose views have the same padded sizes. Full batches are yielded at once, the others at the end.

    No image gets more padding than it would get alone, so the detections do not depend on the batch.
    """
    waiting: dict[tuple, list[Sample]] = {}
    for sample in samples:
        key = tuple(target["pad_size"] for target in sample.targets)
        batch = waiting.setdefault(key, [])
        batch.append(sample)
        if len(batch) == batch_size:
            yield waiting.pop(key)
    yield from waiting.values()


def portions(items: Iterable[Item], size: int) -> Iterator[Iterator[Item]]:
    """The items in portions of `size`, the last one smaller. Use up each portion before you ask for the next."""
    items = iter(items)
    for first in items:
        yield chain([first], islice(items, size - 1))
