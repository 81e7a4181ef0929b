"""Reads YOLO's text files."""
from collections.abc import Iterator
from pathlib import Path

import yaml

from data.errors import DataError, counted

from .shared import (
    Box,
    ImageIndex,
    LabelledFolder,
    LabelledImage,
    Source,
    box_around,
    make_box,
    raise_problems,
    read_number,
    split_in,
    subfolder,
)


def read_yolo(source: Source) -> LabelledFolder:
    """Read images in `images/` and text files in `labels/` (split folders above or below), or next to the images.

    A line is `class x y width height`, centre and size in fractions of the image. A polygon, `class x1 y1 x2 y2 x3 y3
    ...`, becomes its bounding box. A further number at the end is a confidence, which is not used. An image without a
    text file has no objects. Folders named train, val (or valid) and test are splits. The class names are in a YAML
    file with `names`, or one per line in classes.txt or *.names.
    """
    index = ImageIndex(source.images or source.folder)
    names = index.names
    if not source.images and any("images" in _lower(name) for name in names):
        names = [name for name in names if "images" in _lower(name)]
    if not names:
        raise DataError(f"input {index.folder} is not in YOLO format: there are no images in it")
    classes = _read_names(source)
    images, problems, labelled, confidences = [], [], 0, 0
    for name in names:
        image = LabelledImage(name, [], split_in(name.split("/")[:-1]))
        images.append(image)
        file = next((path for path in _label_files(source, name) if path.is_file()), None)
        if file is None:
            continue
        labelled += 1
        for number, line in enumerate(source.read(file).splitlines(), start=1):
            place = f"{source.below(file)} line {number}"
            try:
                if words := line.split():
                    image.boxes.append(_read_line(words, classes, place))
                    confidences += len(words) % 2 == 0
            except ValueError as error:
                problems.append(f"{place}: {error}")
    if not labelled:
        raise DataError(f"input {source.folder} is not in YOLO format: no image has a text file in "
                        f"{source.annotations or 'labels/ or beside it'}")
    raise_problems(f"labels in {source.annotations or source.folder} cannot be used", problems)
    notes = []
    if missing := len(images) - labelled:
        have = "image has no label file: it has", "images have no label file: they have"
        notes.append(f"{counted(missing, *have)} no objects")
    if confidences:
        notes.append(f"{counted(confidences, 'line')} with a confidence: it is not used")
    return LabelledFolder(index.folder, images, classes, relative=True, notes=notes)


def _lower(name: str) -> list[str]:
    """The folders in an image's name, in lower case."""
    return name.lower().split("/")[:-1]


def _label_files(source: Source, name: str) -> Iterator[Path]:
    """Where the text file of an image can be, the likeliest place first."""
    folders, stem = Path(name).parent.parts, Path(name).stem
    place = len(folders) - 1 - _lower(name)[::-1].index("images") if "images" in _lower(name) else None
    above, below = folders[:place], folders[place + 1:] if place is not None else ()
    if source.annotations:
        tops = [source.annotations.joinpath(*above, *below), source.annotations]
    elif source.images:  # labels/ beside the folder of the images
        homes = [subfolder(source.folder, "labels"), subfolder(source.images.parent, "labels"), source.images]
        tops = [home.joinpath(*folders) for home in homes]
    elif place is None:
        tops = [source.folder.joinpath(*folders)]
    else:
        tops = [subfolder(source.folder.joinpath(*above), "labels").joinpath(*below)]
    return (top / f"{stem}{ending}" for top in tops for ending in (".txt", ".TXT"))


def _read_line(words: list[str], classes: list[str], place: str) -> Box:
    """The box of one line. Raises ValueError, which names the problem."""
    label, *rest = [read_number(word, "value") for word in words]
    shown = repr(" ".join(words)[:60])
    if len(rest) < 4:
        raise ValueError(f"{shown} is neither class, x, y, width, height nor a class and a polygon")
    if label != int(label) or not 0 <= label < len(classes):
        raise ValueError(f"class {words[0]} is not in 0 to {len(classes) - 1}")
    name, rest = classes[int(label)], rest[:len(rest) // 2 * 2]  # without the confidence
    if len(rest) == 4:
        for key, value in zip(("width", "height"), rest[2:]):
            if value < 0:
                raise ValueError(f"{key} {value:g} is negative")
    if not all(-0.01 <= value <= 1.01 for value in rest):
        raise ValueError(f"{shown} has values outside 0 to 1: are they in pixels?")
    if len(rest) > 4:
        return make_box(name, box_around(zip(rest[::2], rest[1::2])), place)
    x, y, w, h = rest
    return make_box(name, [x - w / 2, y - h / 2, x + w / 2, y + h / 2], place)


def _read_names(source: Source) -> list[str]:
    """The class names. Raises DataError if they are not known or wrong."""
    labels = source.annotations or subfolder(source.folder, "labels")  # where LabelImg puts its classes.txt
    beside = [*sorted(source.folder.glob("*.y*ml")), source.folder / "classes.txt",
              *sorted(source.folder.glob("*.names")), labels / "classes.txt"]
    for file in [source.names] if source.names else beside:
        if not file.is_file():
            continue
        text = source.read(file)
        if file.suffix in (".yaml", ".yml"):
            try:
                content = yaml.load(text, Loader=yaml.BaseLoader)  # names stay as they are written: no, 010, ~
            except yaml.YAMLError as error:
                raise DataError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
            listed = content.get("names") if isinstance(content, dict) else None
            if isinstance(listed, dict):
                absent = [k for k in range(len(listed)) if str(k) not in listed]
                if absent:
                    raise DataError(f"{file}: names has no class {absent[0]}: number its "
                                    f"{counted(len(listed), 'class')} from 0, without a gap")
                listed = [listed[str(k)] for k in range(len(listed))]
        else:
            listed = text.rstrip().splitlines()
        if isinstance(listed, list) and listed:
            return _checked_names(listed, file)
    raise DataError(f"the class names are not known: {source.names or source.folder} has no YAML file with names, no "
                    "classes.txt and no *.names; give --names FILE")


def _checked_names(names: list, file: Path) -> list[str]:
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"{file}: the class names must be texts, not lists or mappings")
    names = [name.strip() for name in names]
    if "" in names:
        raise DataError(f"{file}: class {names.index('')} has no name; the classes count from 0")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{file}: the class name {twice[0]!r} occurs twice; give each class a name of its own")
    return names
