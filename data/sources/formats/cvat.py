"""Reads CVAT's XML files for images."""
import math
from pathlib import Path
from xml.etree.ElementTree import Element

from data.errors import DataError, counted

from .shared import (
    Box,
    ImageIndex,
    ImageList,
    LabelledFolder,
    Source,
    box_around,
    make_box,
    raise_problems,
    read_number,
    sorted_classes,
    split_in,
)
from .xml_files import LINE, parse_xml

SHAPES = ("box", "polygon", "ellipse", "mask")
WITHOUT_BOX = ("polyline", "points", "tag", "cuboid", "skeleton")


def read_cvat(source: Source) -> LabelledFolder:
    """Read CVAT's format "CVAT for images 1.1": an XML file (or several) for many images, which are in subfolders.

    Boxes, polygons, ellipses and masks become their bounding boxes, also if they are rotated; other shapes are left
    out. CVAT's subsets called Train, Validation and Test are splits.
    """
    files = source.annotation_files("CVAT", ".xml", "annotations")
    index = ImageIndex(source.image_folder("images"))
    found, problems, without, listed = ImageList(), [], 0, 0
    for file in files:
        text = source.read(file)
        try:
            root = parse_xml(text)
        except ValueError as error:
            problems.append(f"{file.name}: {error}")
            continue
        if root.find("track") is not None:
            problems.append(f"{file.name}: it has tracks of a video: export it as CVAT for images 1.1")
        for image in root.iter("image"):
            listed += 1
            try:
                name = index.find_one([image.get("name", "")], file)
                boxes, wrong = _read_image(image, file)
                problems += wrong
                without += sum(shape.tag in WITHOUT_BOX for shape in image)
                found.add(name, boxes, file.name, split_in([image.get("subset", ""), *name.split("/")[:-1]]))
            except ValueError as error:
                problems.append(f"{file.name} line {image.get(LINE)}: image {image.get('name')!r}: {error}")
    raise_problems(f"annotations in {files[0].parent} cannot be used", problems)
    if not listed:
        raise DataError(f"input {source.folder} is not in CVAT format: {files[0]} has no element <image>")
    notes = [f"{counted(without, 'shape')} without a box ({', '.join(WITHOUT_BOX)}): left out"] * (without > 0)
    images = found.to_list()
    return LabelledFolder(index.folder, images, sorted_classes(images), notes=notes)


def _read_image(image: Element, file: Path) -> tuple[list[Box], list[str]]:
    """The objects of an image, and the problems with them."""
    boxes, problems = [], []
    for number, shape in enumerate((shape for shape in image if shape.tag in SHAPES), start=1):
        place = f"{file.name} line {shape.get(LINE)}: image {image.get('name')}, object {number}"
        label = (shape.get("label") or "").strip()
        try:
            if not label:
                raise ValueError("it has no label")
            boxes.append(_read_shape(shape, label, place))
        except ValueError as error:
            problems.append(f"{place}: {error}")
    return boxes, problems


def _read_shape(shape: Element, label: str, place: str) -> Box:
    """The box around a shape. Raises ValueError, which names the problem."""
    if shape.tag == "polygon":
        points = [point.split(",") for point in shape.get("points", "").split(";")]
        if any(len(point) != 2 for point in points):
            raise ValueError("its points are not of the form x,y;x,y")
        return make_box(label, box_around(points), place)
    if shape.tag == "mask":
        x, y, w, h = (read_number(shape.get(key), key) for key in ("left", "top", "width", "height"))
        return make_box(label, [x, y, x + w, y + h], place)
    if shape.tag == "box":
        keys = ("xtl", "ytl", "xbr", "ybr")
        box = make_box(label, [shape.get(key) for key in keys], place, keys=keys)
        x, y, a, b = (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2, (box.x2 - box.x1) / 2, (box.y2 - box.y1) / 2
    else:
        x, y, a, b = (read_number(shape.get(key), key) for key in ("cx", "cy", "rx", "ry"))
    turn = math.radians(read_number(shape.get("rotation", 0), "rotation"))
    if not turn and shape.tag == "box":
        return box
    cos, sin = abs(math.cos(turn)), abs(math.sin(turn))
    extent = math.hypot if shape.tag == "ellipse" else lambda *parts: sum(parts)
    half_w, half_h = extent(a * cos, b * sin), extent(a * sin, b * cos)
    return make_box(label, [x - half_w, y - half_h, x + half_w, y + half_h], place)
