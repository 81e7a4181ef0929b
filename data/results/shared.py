"""What all formats of detections share."""
import io
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, Protocol

from data.errors import DataError
from data.output import naming


class ImageDetections(NamedTuple):
    """The detections on an image, or on a frame of a video, the best first."""

    name: str  # of the file, with / between folders
    size: tuple[int, int]  # (h, w)
    image_id: int
    boxes: list[list[float]]  # x1, y1, x2, y2 in pixels, from 0
    scores: list[float]
    labels: list[int]
    frame: int | None = None  # of a video, from 0


class Writer(Protocol):
    """Writes detections into a folder; `add` is called for each image, and `close` at the end, also after an error.

    Args:
        folder: for the files, which `files` names for people.
        classes: names of the labels.
        category_ids: their ids in COCO format.
    Raises:
        DataError: files that are not from this run would be overwritten.
        OutputError: a file cannot be written.
    """

    files: str

    def __init__(self, folder: Path, classes: Sequence[str], category_ids: Sequence[int]): ...

    def add(self, image: ImageDetections) -> None: ...

    def close(self) -> None: ...

    @staticmethod
    def file_of(name: str) -> str | None:
        """The file for an image, from the folder, if each has its own."""


def own_file(name: str, frame: int | None, ending: str) -> str:
    """The name of a file for one image: `a/b.jpg` has `a/b.txt`, and frame 7 of a video `b.mp4` has `b.mp4/000007.txt`.
    """
    return str(PurePosixPath(name).with_suffix(ending)) if frame is None else f"{name}/{frame:06d}{ending}"


def new_place(path: Path) -> Path:
    """A path where there is nothing yet, or an empty folder. Raises DataError: it may be somebody's annotations."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise DataError(f"{path} exists, and may be annotations or earlier results: give another --out, or remove it")
    return path


class Growing:
    """A text file that is complete after every `add`, whenever the program stops.

    Args:
        before, after: what stands before and after the parts.
        between: what separates them.
    """

    def __init__(self, path: Path, before: str = "", after: str = "", between: str = ""):
        self.path, self.after, self.between, self.any = path, after.encode(), between.encode(), False
        with naming(path):
            self.file: IO[bytes] = open(path, "wb")
            self.file.write(before.encode() + self.after)
            self.file.flush()

    def add(self, parts: Sequence[str]) -> None:
        if not parts:
            return
        # Names that are not in UTF-8 keep their bytes.
        content = self.between.join(part.encode(errors="surrogateescape") for part in parts)
        with naming(self.path):
            self.file.seek(-len(self.after), io.SEEK_END)
            self.file.write((self.between if self.any else b"") + content + self.after)
            self.file.flush()
        self.any = True

    def close(self) -> None:
        with naming(self.path):
            self.file.close()
