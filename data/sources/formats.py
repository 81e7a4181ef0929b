"""Reads annotated images in common formats: Pascal VOC's XML, YOLO's text files, and CSV tables."""
import codecs
import csv
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import yaml

from data.errors import DataError, listed
from data.inputs.files import IMAGE_SUFFIXES

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
VOC_SPLITS = ("train", "val", "test", "trainval")
CSV_COLUMNS = {"file": ("file", "filename", "image"), "x1": ("x1", "xmin"), "y1": ("y1", "ymin"),
               "x2": ("x2", "xmax"), "y2": ("y2", "ymax"), "class": ("class", "label")}  # and other tools' names


class Box(NamedTuple):
    """An object. Its corners are in pixels or, if the format does so, in fractions of the image's width and height."""

    name: str
    x1: float
    y1: float
    x2: float
    y2: float
    crowd: bool = False  # not learned, and not counted in evaluation


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


def read_labelled(kind: str, source: Path, names: Path | None = None) -> LabelledFolder:
    """Read `source` as "voc", "yolo" or "csv"; `names` is the file with YOLO's class names if `source` has none.

    Raises DataError, in one line, if `source` has another format or wrong content; it lists the first ten problems.
    """
    if not source.exists():
        raise DataError(f"input {source} does not exist: correct the path")
    return {"voc": read_voc, "yolo": lambda path: read_yolo(path, names), "csv": read_csv}[kind](source)


def raise_problems(what: str, problems: Sequence[str]) -> None:
    """Raise DataError if there are problems."""
    if problems:
        raise DataError(f"{what}: {listed(problems)}")


def read_text(file: Path) -> str:
    """A text file in UTF-8, or in UTF-16 with a byte order mark. Raises DataError if it is in another encoding."""
    content = file.read_bytes()
    try:
        return content.decode("utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[:error.start].count(b"\n") + 1
        raise DataError(f"{file} line {line} is not in UTF-8: save the file in this encoding") from None


def subfolder(folder: Path, *names: str) -> Path:
    """The folder in `folder` that has one of the names, in upper or lower case; `folder` itself if there is none."""
    found = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()} if folder.is_dir() else {}
    return next((found[name] for name in names if name in found), folder)


def sorted_classes(images: Iterable[LabelledImage]) -> list[str]:
    return sorted({box.name for image in images for box in image.boxes})


# --- Pascal VOC ---


def read_voc(source: Path) -> LabelledFolder:
    """Read `Annotations/*.xml` with images in `JPEGImages/` or `images/`, or XML files next to their images.

    The names of these folders may be in upper or lower case. `ImageSets/Main/{train,val,test}.txt` are the splits.
    VOC's corners are 1-based and inclusive: the first pixel's box is (1, 1, 1, 1) there and (0, 0, 1, 1) here. If any
    box starts below 1, all corners are assumed to count from 0. Objects that are marked difficult become crowds,
    because VOC's evaluation does not count them.
    """
    annotations, image_folder = subfolder(source, "annotations"), subfolder(source, "jpegimages", "images")
    files = sorted(annotations.glob("*.xml"))
    if not files:
        raise DataError(f"input {source} is not in Pascal VOC format: {annotations} holds no *.xml")
    by_stem = {p.stem: p.name for p in sorted(image_folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES}
    images, problems = [], []
    for file in files:
        try:
            stated, boxes = _read_voc_file(file)
            name = by_stem.get(file.stem) or by_stem.get(PurePosixPath(stated).stem)
            if name is None:
                raise ValueError(f"there is no image with this name in {image_folder}")
            images.append(LabelledImage(name, boxes))
        except (ValueError, ElementTree.ParseError) as error:
            problems.append(f"{file.name}: {error}")
    raise_problems(f"annotations in {annotations} cannot be used", problems)
    notes = []
    if any(min(box.x1, box.y1) < 1 for image in images for box in image.boxes):
        notes.append("some boxes start below 1: all corners are assumed to count from 0")
    else:
        for image in images:
            image.boxes = [box._replace(x1=box.x1 - 1, y1=box.y1 - 1) for box in image.boxes]
    if difficult := sum(box.crowd for image in images for box in image.boxes):
        notes.append(f"{difficult} objects are marked difficult: they become crowds, which are not learned")
    _assign_voc_splits(images, source / "ImageSets" / "Main")
    return LabelledFolder(image_folder, images, sorted_classes(images), notes=notes)


class _WithoutDoctype(ElementTree.TreeBuilder):
    """Builds a document's tree, unless it declares a document type: its entities could expand bytes to gigabytes."""

    def doctype(self, name: str, public_id: str | None, system: str | None) -> None:
        raise ValueError("it declares a document type, which annotations do not need")


def _read_voc_file(file: Path) -> tuple[str, list[Box]]:
    """The image's name and objects. Raises ValueError or ParseError."""
    root = ElementTree.fromstring(file.read_bytes(), ElementTree.XMLParser(target=_WithoutDoctype()))
    boxes = []
    for number, element in enumerate(root.iter("object")):
        name = (element.findtext("name") or "").strip()
        corners = [element.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        if not name or None in corners:
            raise ValueError(f"object {number} has no {'name' if not name else 'bndbox with four corners'}")
        boxes.append(Box(name, *map(float, corners), crowd=(element.findtext("difficult") or "").strip() == "1"))
    return (root.findtext("filename") or "").strip(), boxes


def _assign_voc_splits(images: list[LabelledImage], folder: Path) -> None:
    lists = {name: folder / f"{name}.txt" for name in VOC_SPLITS if (folder / f"{name}.txt").is_file()}
    if "train" in lists:
        lists.pop("trainval", None)
    by_stem = {PurePosixPath(image.file_name).stem: image for image in images}
    for name, file in lists.items():
        for line in filter(None, map(str.strip, read_text(file).splitlines())):
            # Some lists add a flag (1: the class is in the image, -1: it is not) or the file's ending.
            entry = re.sub(r"\s+-?[01]$", "", line)
            image = by_stem.get(entry) or by_stem.get(PurePosixPath(entry).stem)
            if image is not None:
                image.split = name.removesuffix("val") if name == "trainval" else name


# --- YOLO ---


def read_yolo(source: Path, names: Path | None = None) -> LabelledFolder:
    """Read images in `images/` and text files in `labels/` (split folders above or below), or next to the images.

    A line is `class x y width height`, centre and size in fractions of the image. A polygon, `class x1 y1 x2 y2 x3 y3
    ...`, becomes its bounding box. An image without a text file has no objects. Folders named train, val (or valid) and
    test are splits. The class names are in a YAML file with `names`, or one per line in classes.txt or *.names.
    """
    paths = sorted(p.relative_to(source) for p in source.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if any("images" in path.parts for path in paths):
        paths = [path for path in paths if "images" in path.parts]
    if not paths:
        raise DataError(f"input {source} is not in YOLO format: there are no images in it")
    classes = _read_yolo_names(source, names)
    images, problems, labelled = [], [], 0
    for path in paths:
        parts = list(path.with_suffix(".txt").parts)
        if "images" in parts:
            parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
        file, boxes = source.joinpath(*parts), []
        if file.is_file():
            labelled += 1
            for number, line in enumerate(read_text(file).splitlines(), start=1):
                try:
                    boxes += [_read_yolo_line(line, classes)] if line.strip() else []
                except ValueError as error:
                    problems.append(f"{file.relative_to(source)} line {number}: {error}")
        split = next((SPLIT_NAMES[part.lower()] for part in path.parts[:-1] if part.lower() in SPLIT_NAMES), None)
        images.append(LabelledImage(path.as_posix(), boxes, split))
    if not labelled:
        raise DataError(f"input {source} is not in YOLO format: no image has a text file in labels/ or beside it")
    raise_problems(f"labels in {source} cannot be used", problems)
    notes = [f"{len(images) - labelled} images have no label file: they have no objects"] * (labelled < len(images))
    return LabelledFolder(source, images, classes, relative=True, notes=notes)


def _read_yolo_line(line: str, classes: list[str]) -> Box:
    """The box of one line. Raises ValueError, which names the problem."""
    values = [float(word) for word in line.split()]
    if len(values) < 5 or len(values) % 2 == 0 or not all(map(math.isfinite, values)):
        raise ValueError(f"{line.strip()[:60]!r} is neither class, x, y, width, height nor a class and a polygon")
    label, *rest = values
    if label != int(label) or not 0 <= label < len(classes):
        raise ValueError(f"class {line.split()[0]} is not in 0 to {len(classes) - 1}")
    if not all(-0.01 <= value <= 1.01 for value in rest):
        raise ValueError(f"{line.strip()[:60]!r} has values outside 0 to 1: are they in pixels?")
    if len(rest) == 4:
        x, y, w, h = rest
        return Box(classes[int(label)], x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    return Box(classes[int(label)], min(rest[::2]), min(rest[1::2]), max(rest[::2]), max(rest[1::2]))


def _read_yolo_names(source: Path, names: Path | None) -> list[str]:
    beside = [*sorted(source.glob("*.y*ml")), source / "classes.txt", *sorted(source.glob("*.names"))]
    for file in [names] if names else beside:
        if not file.is_file():
            continue
        text = read_text(file)
        if file.suffix in (".yaml", ".yml"):
            try:
                content = yaml.load(text, Loader=yaml.BaseLoader)  # names stay as they are written: no, 010, ~
            except yaml.YAMLError as error:
                raise DataError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
            listed = content.get("names") if isinstance(content, dict) else None
            if isinstance(listed, dict) and set(listed) == set(map(str, range(len(listed)))):
                listed = [listed[str(k)] for k in range(len(listed))]
        else:
            listed = [line.strip() for line in text.splitlines() if line.strip()]
        if isinstance(listed, list) and listed:
            return _checked_names(listed, file)
    raise DataError(f"the class names are not known: {names or source} has no YAML file with names, no classes.txt and "
                    "no *.names; give --names FILE")


def _checked_names(names: list, file: Path) -> list[str]:
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"{file}: the class names must be texts, not lists or mappings")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{file}: the class name {twice[0]!r} occurs twice; give each class a name of its own")
    return names


# --- CSV ---


def read_csv(source: Path) -> LabelledFolder:
    """Read a CSV file, or a folder of CSV files, with columns file, x1, y1, x2, y2 and class, in pixels from 0.

    The columns may also have the names that other tools give them, see `CSV_COLUMNS`; further columns are ignored. Each
    row is a box; a row with only a file is an image without objects. File names are relative to the folder of the CSV
    file, or to the folder `images` in it. CSV files named train, val (or valid) and test are splits.
    """
    files = sorted(source.glob("*.csv")) if source.is_dir() else [source]
    if not files:
        raise DataError(f"input {source} holds no *.csv")
    images: dict[str, LabelledImage] = {}
    problems: list[str] = []
    for file in files:
        split = SPLIT_NAMES.get(file.stem.lower())
        text = read_text(file)
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        try:
            header = [name.strip().lower() for name in next(reader, [])]
            places = {column: next((header.index(name) for name in names if name in header), None)
                      for column, names in CSV_COLUMNS.items()}
            if missing := [column for column, place in places.items() if place is None]:
                raise DataError(f"{file} has no column {', '.join(missing)}: its first line must name them")
            for row in filter(None, reader):
                try:
                    name, box = _read_csv_row([row[place].strip() if place < len(row) else ""
                                               for place in places.values()])
                    image = images.setdefault(name, LabelledImage(name, [], split))
                    if image.split != split:
                        raise ValueError(f"{name} is also in a table of another split")
                    image.boxes += [box] if box else []
                except ValueError as error:
                    problems.append(f"{file.name} line {reader.line_num}: {error}")
        except csv.Error as error:  # a field of more than 131072 characters: a quotation mark is not closed
            problems.append(f"{file.name} line {reader.line_num}: {error}")
    raise_problems(f"tables in {source} cannot be used", problems)
    folder = files[0].parent
    if images and not (folder / next(iter(images))).exists() and (folder / "images").is_dir():
        folder = folder / "images"
    return LabelledFolder(folder, list(images.values()), sorted_classes(images.values()))


def _read_csv_row(values: list[str]) -> tuple[str, Box | None]:
    """The file and its box, or None without a box, from the values of `CSV_COLUMNS`. Raises ValueError."""
    name, *corners, label = values
    if not name:
        raise ValueError("it has no file")
    if not label and not any(corners):
        return name, None
    if not label or not all(corners):
        raise ValueError("it must have a class and four corners, or only a file")
    try:
        return name, Box(label, *map(float, corners))
    except ValueError:
        raise ValueError(f"corners {', '.join(corners)} are not numbers") from None
