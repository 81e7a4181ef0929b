"""The `data` section of the configuration, and where its paths lead."""
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from data.augment import AUGMENTATIONS
from data.errors import DataError
from data.ranges import Count, FewOrNone, OneOf, Range, Share, Some

Ratio = Annotated[float, Range(0, 100, open=True)]
Augmentation = Literal["none", "light", "strong"] | Some[Annotated[dict, OneOf(AUGMENTATIONS, light=True)]]


@dataclass
class Split:
    """One part of a data set, in COCO format. Relative paths are looked up in `$DENSEKD_DATA`; a path that starts with
    `./` starts from the folder of the configuration file. Of a list of paths, the first one that exists is used.
    """

    images: str  # folder of the images
    annotations: str  # COCO-format JSON file
    first: Count | None = None  # use only this many images, the first in the file
    repeat: Count = 1  # how often training shows each image in an epoch

    def check_paths(self) -> None:
        """Raise DataError if the annotations or the folder of the images are not there."""
        check_there("annotation file", find_data(self.annotations))
        check_there("image folder", find_data(self.images), folder=True)


@dataclass
class Unlabelled:
    """Images without annotations, for distillation. Paths are as those of `data.train`."""

    images: str | Some[str]  # a folder, searched with its subfolders; or a list of folders, which are all used

    @property
    def folders(self) -> list[Path]:
        """The folders, as `find_data` resolves them."""
        return [find_data(path) for path in ([self.images] if isinstance(self.images, str) else self.images)]

    def check_paths(self) -> None:
        """Raise DataError if a folder is not there, or is in another one, so that its images would count twice."""
        for folder in self.folders:
            check_there("folder of data.unlabelled", folder, folder=True)
        real = [folder.resolve() for folder in self.folders]
        for i, folder in enumerate(real):
            for j, other in enumerate(real):
                if i != j and folder.is_relative_to(other):
                    raise DataError(f"data.unlabelled.images: {self.folders[i]} is "
                                    f"{'named twice' if folder == other else f'in {self.folders[j]}'}, so its images "
                                    "would be used twice: remove it")


@dataclass
class DataConfig:
    """The `data` section."""

    train: Split | Some[Split]  # training data; a list is united, and its classes are matched by name
    val: Split | None = None  # data for evaluation
    unlabelled: Unlabelled | None = None  # more training images, without annotations, for methods that need none
    unlabelled_ratio: Ratio = 1.0  # how many of them a batch has for each labelled image
    batch_size: Count = 2  # labelled images per process and step
    workers: FewOrNone = 2  # loader processes per training process; 0 loads in the training process itself
    worker_start: Literal["fork", "spawn"] | None = None  # how they start; null: fork on Linux, spawn on other systems
    scale: tuple[Count, Count] = (1333, 800)  # images are resized to fit it: longest long edge, longest short edge
    repeat_factor: Share | None = None  # training shows classes in a smaller share of images more often, as LVIS
    multi_scale: Some[tuple[Count, Count]] | None = None  # training draws one of these per image instead of `scale`
    flip: Share = 0.5  # probability of a horizontal flip in training
    train_augment: Augmentation = "none"  # more augmentation of training images: a preset, or a list
    skip_empty: bool = False  # leave images without boxes out of training
    skip_unreadable: bool = False  # training goes on without images that cannot be read, and counts them in the log
    antialias: bool = False  # smooth when shrinking images; the reference implementations do not
    group_by_aspect: bool = True  # training batches hold only landscape or only portrait images, which saves padding

    def __post_init__(self):
        if self.train == []:
            raise DataError("data.train: must not be an empty list: give images and annotations")
        if self.unlabelled is None and self.unlabelled_ratio != 1:
            raise DataError("data.unlabelled_ratio: is of use only with data.unlabelled, which is missing: remove it")
        if self.val is not None and self.val.repeat != 1:
            raise DataError("data.val.repeat: evaluation shows each image once: remove it")

    def parts(self, split: str) -> list[Split]:
        """The data sets of "train" or "val"; none if it is not set."""
        found = {"train": self.train, "val": self.val}[split]
        return found if isinstance(found, list) else [] if found is None else [found]


def find_data(path: str | Path) -> Path:
    """Return an absolute path as it is, and a relative one below `$DENSEKD_DATA` (default: `datasets/`).

    The caller checks whether anything exists there.
    """
    return Path(os.environ.get("DENSEKD_DATA") or "datasets") / path


def check_there(what: str, path: Path, folder: bool = False) -> None:
    """Raise DataError if a path from a configuration does not exist, or is no folder and has to be one."""
    if not (path.is_dir() if folder else path.exists()):
        problem = "is not a folder" if path.exists() else "does not exist"
        raise DataError(f"{what} {path} {problem}: correct the path, or set DENSEKD_DATA to the folder that relative "
                        "paths start from")
