"""What all formats share: boxes, images and their search by name, and text files in any encoding."""
import codecs
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from data.coco.problems import MAX_COORDINATE
from data.errors import DataError, listed
from data.inputs.find import IMAGE_SUFFIXES

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
CORNERS = ("xmin", "ymin", "xmax", "ymax")
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class Box(NamedTuple):
    """An object. Its corners are in pixels or, if the format does so, in fractions of the image's width and height."""

    name: str
    x1: float
    y1: float
    x2: float
    y2: float
    crowd: bool = False  # not learned, and not counted in evaluation
    place: str = ""  # the file, and the line or the number of the object in it


@dataclass
class LabelledImage:
    """An image with its objects."""

    file_name: str  # relative to the image folder, with / between folders
    boxes: list[Box]
    split: str | None = None  # the split that the format itself gives


@dataclass
class LabelledFolder:
    """Annotated images of any format."""

    image_folder: Path
    images: list[LabelledImage]
    classes: list[str]  # in the order of their labels
    relative: bool = False  # corners are fractions of the image's width and height
    notes: list[str] = field(default_factory=list)  # assumptions that were made


@dataclass
class Source:
    """Where the images and their annotations are, and what is said about them."""

    folder: Path  # holds both; for a table or CVAT's XML also the file
    annotations: Path | None = None  # file or folder, if it is not where the format has it
    images: Path | None = None  # folder, if it is not where the format has it
    names: Path | None = None  # the file with YOLO's class names
    encoding: str | None = None  # of text files; None: UTF-8

    def annotation_files(self, kind: str, suffix: str, *usual: str) -> list[Path]:
        """The annotation files in the given place, or in the subfolder with one of the usual names, or in the folder.

        They end with `suffix`, in upper or lower case. A folder for annotations alone is searched with its subfolders;
        the subfolders of `folder` itself, which may hold anything, only if it has none.
        Raises DataError, which names the `kind` of format, if there are none.
        """
        place = self.annotations or subfolder(self.folder, *usual)
        files = [place] if place.is_file() else []
        for pattern in ("*", "**/*") if place == self.folder else ("**/*",):
            files = files or sorted(path for path in place.glob(pattern) if path.suffix.lower() == suffix
                                    and path.is_file() and not path.name.startswith("."))
        if not files:
            raise DataError(f"input {self.folder} is not in {kind} format: {place} holds no *{suffix}; --annotations "
                            "names another folder")
        return files

    def image_folder(self, *usual: str) -> Path:
        """The given folder of the images, or the subfolder with one of the usual names, or the folder itself."""
        folder = self.folder if self.folder.is_dir() else self.folder.parent
        return self.images or subfolder(folder, *usual)

    def below(self, file: Path) -> Path:
        """The path of an annotation file from the folder in which it was searched."""
        folder = next((top for top in (self.annotations, self.folder) if top and file.is_relative_to(top)), file)
        return file.relative_to(folder) if file != folder else Path(file.name)

    def read(self, file: Path) -> str:
        return decode(file, self.encoding)


class ImageIndex:
    """The images in a folder and its subfolders, by name."""

    def __init__(self, folder: Path):
        self.folder = folder
        paths = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
        self.names = sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
        self._known = set(self.names)
        self._by_name: dict[str, list[str]] = {}
        for name in self.names:
            file_name = PureWindowsPath(name).name.lower()
            for key in (file_name, file_name.rpartition(".")[0]):
                self._by_name.setdefault(key, []).append(name)

    def find(self, stated: str, file: Path) -> str | None:
        """The image that the annotation `file` calls `stated`, relative to the folder; None if there is none.

        `stated` may be relative to the annotation file or to the image folder, it may lack the ending or have another
        one, and folders of another machine are left out. Of images with the same name, the one is meant whose folders
        are also those of the annotation file (train/a.xml, train/a.jpg).
        Raises ValueError if several images could be meant.
        """
        parts = PureWindowsPath(stated).parts  # it separates folders at / and at \
        if not parts:
            return None
        beside = os.path.relpath(file.parent, self.folder)
        for start in (beside, "."):
            exact = os.path.normpath(os.path.join(start, *parts)).replace(os.sep, "/")
            if exact in self._known:
                return exact
        name = parts[-1].lower()
        stem, _, ending = name.rpartition(".")
        keys = [name, stem] if "." + ending in IMAGE_SUFFIXES else [name]
        found = next((self._by_name[key] for key in keys if key in self._by_name), [])
        found = [name for name in found if parts[-1] in (name.split("/")[-1], PurePosixPath(name).stem)] or found
        near = {part.lower() for part in (*PureWindowsPath(beside).parts, *parts[:-1])}
        shared = [sum(part.lower() in near for part in name.split("/")[:-1]) for name in found]
        best = [name for name, count in zip(found, shared) if count == max(shared)]
        if len(best) > 1:
            raise ValueError(f"{stated!r} can be {best[0]} or {best[1]}: give images names of their own")
        return best[0] if best else None

    def find_one(self, names: Sequence[str], file: Path) -> str:
        """The first image that is found by one of the names, the likeliest first. Raises ValueError if none is."""
        for name in names:
            if (found := self.find(name, file)) is not None:
                return found
        raise ValueError(f"there is no image with this name in {self.folder}")


class ImageList:
    """The images that are annotated so far, each from one source."""

    def __init__(self):
        self._images: dict[str, tuple[LabelledImage, str]] = {}

    def add(self, name: str, boxes: list[Box], source: str, split: str | None = None) -> None:
        """Raises ValueError if the image was added from another source, a file or a name in a table, or split."""
        image, before = self._images.setdefault(name, (LabelledImage(name, [], split), source))
        if before != source:
            raise ValueError(f"{before} is about the same image, {name}: leave one of them out")
        if image.split != split:
            raise ValueError(f"{name} is also in a table of another split")
        image.boxes += boxes

    def to_list(self) -> list[LabelledImage]:
        return [image for image, _ in self._images.values()]


def make_box(name: str, corners: Sequence[str | float], place: str, crowd: bool = False,
             keys: Sequence[str] = CORNERS) -> Box:
    """A box from its corners x1, y1, x2, y2, which `keys` names in messages. Raises ValueError: a wrong corner."""
    values = [read_number(value, key) for key, value in zip(keys, corners, strict=True)]
    for low, high in ((0, 2), (1, 3)):
        if values[high] < values[low]:
            raise ValueError(f"{keys[high]} {corners[high]} is less than {keys[low]} {corners[low]}")
    return Box(name, *values, crowd=crowd, place=place)


def read_number(value: object, key: str) -> float:
    """A finite number. Raises ValueError, which says that `key` is none."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{key} {str(value).strip()[:60]!r} is not a number")
    if abs(number) >= MAX_COORDINATE:
        raise ValueError(f"{key} {value} is too large: no image has this position")
    return number


def box_around(points: Iterable[Sequence[float]]) -> list[float]:
    """The corners x1, y1, x2, y2 of the box around points (x, y)."""
    xs, ys = zip(*((read_number(x, "x"), read_number(y, "y")) for x, y in points))
    return [min(xs), min(ys), max(xs), max(ys)]


def raise_problems(what: str, problems: Sequence[str]) -> None:
    """Raise DataError if there are problems."""
    if problems:
        raise DataError(f"{what}: {listed(problems)}")


def decode(file: Path, encoding: str | None) -> str:
    """A text file. Its byte order mark says the encoding, or its XML declaration, or `encoding`, by default UTF-8.

    Raises DataError if it is in another encoding.
    """
    content = file.read_bytes()
    mark = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), None)
    # A declaration that can be read as ASCII is not in UTF-16, whatever it says.
    declared = re.match(rb"\s*<\?xml[^>]*?encoding\s*=\s*[\"'](?!utf-?16|utf-?32)([\w.:-]+)", content, re.I)
    named = mark or (declared[1].decode("ascii") if declared else None) or encoding or "utf-8"
    try:
        return content.decode(named)
    except LookupError:
        raise DataError(f"{file} is in the encoding {named}, which is not known: save the file in UTF-8") from None
    except UnicodeError as error:
        line = content[:getattr(error, "start", 0)].count(b"\n") + 1
        what = "save the file in this encoding" if mark or declared else (
            "name another encoding with --encoding" if encoding else
            "name its encoding with --encoding, for example cp1252, gbk or latin-1")
        raise DataError(f"{file} line {line} is not in {named.upper()}: {what}") from None


def subfolder(folder: Path, *names: str) -> Path:
    """The folder in `folder` that has one of the names, in upper or lower case; `folder` itself if there is none."""
    found = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()} if folder.is_dir() else {}
    return next((found[name] for name in names if name in found), folder)


def split_in(words: Iterable[str]) -> str | None:
    """The split that the first of the words (folders or files) names that is the name of one."""
    return next((SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES), None)


def sorted_classes(images: Iterable[LabelledImage]) -> list[str]:
    return sorted({box.name for image in images for box in image.boxes})
