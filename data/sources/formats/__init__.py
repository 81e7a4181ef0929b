"""Reads annotated images in common formats, a file for each."""
from pathlib import Path

from data.errors import DataError

from .cvat import read_cvat
from .labelme import read_labelme
from .shared import Box, LabelledFolder, LabelledImage, Source, raise_problems
from .tables import read_csv
from .voc import read_voc
from .yolo import read_yolo

__all__ = ["READERS", "Box", "LabelledFolder", "LabelledImage", "Source", "raise_problems", "read_labelled"]

READERS = {"voc": read_voc, "yolo": read_yolo, "csv": read_csv, "labelme": read_labelme, "cvat": read_cvat}


def read_labelled(kind: str, source: Path, names: Path | None = None, annotations: Path | None = None,
                  images: Path | None = None, encoding: str | None = None) -> LabelledFolder:
    """Read `source` in one of the formats of `READERS`.

    Args:
        names: the file with YOLO's class names if `source` has none.
        annotations, images: folders with other names or in other places than the format has; they are searched first
            as they are given, then in `source`.
        encoding: of text files that do not say it themselves; None: UTF-8.
    Raises DataError, in one line, if `source` has another format or wrong content; it lists the first ten problems.
    """
    if not source.exists():
        raise DataError(f"input {source} does not exist: correct the path")
    places = [place and _existing(place, source, option)
              for place, option in ((annotations, "--annotations"), (images, "--images"))]
    if places[1] and not places[1].is_dir():
        raise DataError(f"--images {images} is not a folder: give the folder of the images")
    return READERS[kind](Source(source, *places, names, encoding))


def _existing(place: Path, source: Path, option: str) -> Path:
    """`place`, or the place of this name in `source`. Raises DataError if neither exists."""
    for path in (place, source / place):
        if path.exists():
            return path
    raise DataError(f"{option} {place} does not exist, nor does {source / place}: correct the path")
