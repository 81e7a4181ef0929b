"""Images without annotations: files, folders, globs and frames of videos, prepared for a detector."""
import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from data.errors import DataError, UnreadableImage
from data.transforms import padded_size, read_image, resize_image, resized_size

# The file types that are searched for in a folder. An image that cannot be read is reported, not skipped silently.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"}
VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}


class Source(NamedTuple):
    """An input file."""

    path: Path
    name: str  # relative to the given folder, with / between folders

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


class Sample(NamedTuple):
    """An image prepared for a detector, at one or more scales."""

    image: Tensor  # uint8 (3, h, w), as in the file
    views: list[Tensor]  # uint8 (3, h, w), resized to fit each scale
    targets: list[dict]  # for each view: image_size, pad_size, original_size and image_id


def find_files(inputs: Sequence[str | Path]) -> list[Source]:
    """The images and videos of files, folders (with all subfolders) and globs, sorted by name within each input.

    Raises DataError if an input has no image or video, or if two files have the same name.
    """
    found: list[Source] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES)
            root = path
        else:
            files = [path] if path.exists() else sorted(map(Path, glob.glob(str(given), recursive=True)))
            files = [file for file in files if file.is_file()]
            root = os.path.commonpath([file.parent for file in files]) if files else path
        if not files:
            what = "holds no image or video" if path.is_dir() else "does not exist, and as a glob it matches no file"
            raise DataError(f"input {given} {what}: give a file, a folder or a glob in quotes")
        found += [Source(file, file.relative_to(root).as_posix()) for file in files]
    by_name: dict[str, Path] = {}
    for path, name in found:
        if name in by_name:
            raise DataError(f"inputs {by_name[name]} and {path} are both called {name}: give them in separate runs")
        by_name[name] = path
    return found


def make_sample(image: Tensor, image_id: int, scales: Sequence[tuple[int, int]], antialias: bool = False) -> Sample:
    """The sample that evaluation makes from an image, uint8 (3, h, w), at each scale (long edge, short edge)."""
    original_size = tuple(image.shape[1:])
    sizes = [resized_size(original_size, scale) for scale in scales]
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
        scales, antialias: see `make_sample`.
    """

    def __init__(self, paths: Sequence[Path], image_ids: Sequence[int], scales: Sequence[tuple[int, int]],
                 antialias: bool = False):
        self.paths, self.image_ids, self.scales, self.antialias = list(paths), list(image_ids), scales, antialias

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample | str:
        try:
            image = read_image(self.paths[index])
        except UnreadableImage as error:
            return str(error)
        return make_sample(image, self.image_ids[index], self.scales, self.antialias)


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
