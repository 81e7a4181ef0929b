"""Reads LabelMe's JSON files."""
import json
import math

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
    sorted_classes,
    split_in,
)

WITHOUT_BOX = ("point", "points", "line", "linestrip")  # kinds of shapes


def read_labelme(source: Source) -> LabelledFolder:
    """Read a JSON file for each image, which are next to each other or in folders of their own.

    Rectangles, polygons and circles become their bounding boxes; points and lines are left out. Folders named train,
    val (or valid) and test are splits. JSON files without `shapes` are not LabelMe's and are left out.
    """
    files = source.annotation_files("LabelMe", ".json", "annotations", "labels")
    index = ImageIndex(source.image_folder("images"))
    found, problems, others, without = ImageList(), [], 0, 0
    for file in files:
        place, text = source.below(file), source.read(file)
        try:
            content = json.loads(text)
            if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
                others += 1
                continue
            boxes = []
            for number, shape in enumerate(content["shapes"], start=1):
                if _kind(shape) in WITHOUT_BOX:
                    without += 1
                    continue
                try:
                    boxes.append(_read_shape(shape, f"{place}: shape {number}"))
                except ValueError as error:
                    problems.append(f"{place}: shape {number}: {error}")
            name = index.find_one([str(content.get("imagePath") or ""), file.stem], file)
            found.add(name, boxes, str(place), split_in(place.parts[:-1]))
        except (ValueError, RecursionError) as error:
            problems.append(f"{place}: {error}")
    raise_problems(f"annotations in {files[0].parent} cannot be used", problems)
    images, notes = found.to_list(), []
    if not images:
        raise DataError(f"input {source.folder} is not in LabelMe format: no *.json has a list of shapes")
    if others:
        notes.append(f"{counted(others, 'JSON file')} without shapes: left out")
    if without:
        notes.append(f"{counted(without, 'shape')} without a box (points and lines): left out")
    return LabelledFolder(index.folder, images, sorted_classes(images), notes=notes)


def _kind(shape: object) -> str:
    return str(shape.get("shape_type") or "polygon") if isinstance(shape, dict) else ""


def _read_shape(shape: object, place: str) -> Box:
    """The box around a shape. Raises ValueError, which names the problem."""
    label, points = (shape.get("label"), shape.get("points")) if isinstance(shape, dict) else (None, None)
    if not isinstance(label, str) or not label.strip():
        raise ValueError("it has no label")
    if not (isinstance(points, list) and len(points) >= 2
            and all(isinstance(point, list) and len(point) == 2 for point in points)):
        raise ValueError("it has no list of points, which are x and y")
    corners = box_around(points)
    if _kind(shape) == "circle":  # its centre, and a point on it
        (x, y), end = points[:2]
        radius = math.dist((x, y), end)
        corners = [x - radius, y - radius, x + radius, y + radius]
    return make_box(label.strip(), corners, place)
