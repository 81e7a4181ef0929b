"""The `data` section of the configuration, and where its paths lead."""
import os
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError
from data.ranges import Count, FewOrNone, Share, Some


@dataclass
class Split:
    """One part of a data set, in COCO format. Relative paths are looked up in `$DENSEKD_DATA`; a path that starts with
    `./` starts from the folder of the configuration file. Of a list of paths, the first one that exists is used.
    """

    images: str  # folder of the images
    annotations: str  # COCO-format JSON file
    first: Count | None = None  # use only this many images, the first in the file

    def check_paths(self) -> None:
        """Raise DataError if the annotations or the folder of the images are not there."""
        check_there("annotation file", find_data(self.annotations))
        check_there("image folder", find_data(self.images), folder=True)


@dataclass
class DataConfig:
    """The `data` section."""

    train: Split  # training data
    val: Split | None = None  # data for evaluation
    batch_size: Count = 2  # images per process and step
    workers: FewOrNone = 2  # loader processes per training process; 0 loads in the training process itself
    scale: tuple[Count, Count] = (1333, 800)  # images are resized to fit it: longest long edge, longest short edge
    multi_scale: Some[tuple[Count, Count]] | None = None  # training draws one of these per image instead of `scale`
    flip: Share = 0.5  # probability of a horizontal flip in training
    skip_empty: bool = False  # leave images without boxes out of training
    skip_unreadable: bool = False  # training goes on without images that cannot be read, and counts them in the log
    antialias: bool = False  # smooth when shrinking images; the reference implementations do not
    group_by_aspect: bool = True  # training batches hold only landscape or only portrait images, which saves padding


def find_data(path: str | Path) -> Path:
    """Return an absolute path as it is, and a relative one below `$DENSEKD_DATA` (default: `datasets/`).

    The caller checks whether anything exists there.
    """
    return Path(os.environ.get("DENSEKD_DATA") or "datasets") / path


def check_there(what: str, path: Path, folder: bool = False) -> None:
    """Raise DataError if a path from a configuration does not exist, or is no folder and has to be one."""
    if not (path.is_dir() if folder else path.exists()):
        raise DataError(f"{what} {path} does not exist: correct the path, or set DENSEKD_DATA to the folder that "
                        "relative paths start from")
