"""Reads Pascal VOC's XML files."""
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from data.errors import counted

from .shared import (
    CORNERS,
    Box,
    ImageIndex,
    ImageList,
    LabelledFolder,
    LabelledImage,
    Source,
    make_box,
    raise_problems,
    sorted_classes,
    split_in,
    subfolder,
)
from .xml_files import LINE, parse_xml

SPLITS = ("train", "val", "test", "trainval")


def read_voc(source: Source) -> LabelledFolder:
    """Read `Annotations/*.xml` with images in `JPEGImages/` or `images/`, or XML files next to their images.

    The names of these folders may be in upper or lower case. An image has the name of its XML file or, if there is
    none, the name that is stated there. `ImageSets/Main/{train,val,test}.txt` are the splits, or folders with these
    names. VOC's corners are 1-based and inclusive: the first pixel's box is (1, 1, 1, 1) there and (0, 0, 1, 1) here.
    If any box starts below 1, all corners are assumed to count from 0. Objects that are marked difficult become crowds,
    because VOC's evaluation does not count them.
    """
    files = source.annotation_files("Pascal VOC", ".xml", "annotations")
    index = ImageIndex(source.image_folder("jpegimages", "images"))
    found, problems = ImageList(), []
    for file in files:
        text = source.read(file)
        try:
            stated, boxes, wrong = _read_file(file, text)
            problems += wrong
            same = [stated] if PureWindowsPath(stated).stem.lower() == file.stem.lower() else []
            name = index.find_one([*same, file.stem, stated], file)
            found.add(name, boxes, file.name, split_in(source.below(file).parts[:-1]))
        except ValueError as error:
            problems.append(f"{file.name}: {error}")
    raise_problems(f"annotations in {files[0].parent} cannot be used", problems)
    images, notes = found.to_list(), []
    if any(min(box.x1, box.y1) < 1 for image in images for box in image.boxes):
        notes.append("some boxes start below 1: all corners are assumed to count from 0")
    else:
        for image in images:
            image.boxes = [box._replace(x1=box.x1 - 1, y1=box.y1 - 1) for box in image.boxes]
    if difficult := sum(box.crowd for image in images for box in image.boxes):
        are = ("object is marked difficult: it becomes a crowd", "objects are marked difficult: they become crowds")
        notes.append(f"{counted(difficult, *are)}, not learned")
    _assign_splits(images, source)
    return LabelledFolder(index.folder, images, sorted_classes(images), notes=notes)


def _read_file(file: Path, text: str) -> tuple[str, list[Box], list[str]]:
    """The image's name, its objects, and the problems with them. Raises ValueError: it is not XML."""
    root = parse_xml(text)
    boxes, problems = [], []
    for number, element in enumerate(root.iter("object"), start=1):
        place = f"{file.name} line {element.get(LINE)}: object {number}"
        name = (element.findtext("name") or "").strip()
        corners = [element.findtext(f"bndbox/{key}") for key in CORNERS]
        if not name or None in corners:
            problems.append(f"{place} has no {'name' if not name else 'bndbox with four corners'}")
            continue
        try:
            boxes.append(make_box(name, [corner.strip() for corner in corners], place,
                                  crowd=(element.findtext("difficult") or "").strip() == "1"))
        except ValueError as error:
            problems.append(f"{place}, {name}: {error}")
    return (root.findtext("filename") or "").strip(), boxes, problems


def _assign_splits(images: list[LabelledImage], source: Source) -> None:
    folder = subfolder(source.folder, "imagesets")
    if folder == source.folder:
        return
    folder = subfolder(folder, "main")
    lists = {name: folder / f"{name}.txt" for name in SPLITS if (folder / f"{name}.txt").is_file()}
    if "train" in lists:
        lists.pop("trainval", None)
    by_stem = {PurePosixPath(image.file_name).stem: image for image in images}
    for name, file in lists.items():
        for line in filter(None, map(str.strip, source.read(file).splitlines())):
            # Some lists add a flag (1: the class is in the image, -1: it is not) or the file's ending.
            entry = re.sub(r"\s+-?[01]$", "", line)
            image = by_stem.get(entry) or by_stem.get(PurePosixPath(entry).stem)
            if image is not None:
                image.split = name.removesuffix("val") if name == "trainval" else name
