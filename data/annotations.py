"""Reads a COCO-format annotation file into arrays, and checks all of it before anything is trained on it."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from data.errors import DataError

MAX_LISTED = 10  # problems named in an error; the rest are counted
MAX_COORDINATE = 1e9  # pixels; beyond it a box is not a box, and float32 would make it infinite


@dataclass
class Annotations:
    """The content of one annotation file. Lists have one entry per image, in the file's order."""

    file: Path
    image_ids: list[int | str]
    file_names: list[str]
    sizes: list[tuple[int, int]]  # (h, w) in pixels, as the file states them
    boxes: list[np.ndarray]  # (n, 4) float32, xyxy in pixels, not clipped to the image
    labels: list[np.ndarray]  # (n,) int64, 0..K-1
    ignored_boxes: list[np.ndarray]  # (m, 4) float32, crowds
    classes: list[str]  # name per label
    category_ids: list[int]  # the file's category id per label
    num_dropped_boxes: int  # boxes without area, thinner than a pixel, outside the image or marked "ignore"


def read_annotations(file: str | Path) -> Annotations:
    """Read and check a COCO-format annotation file.

    Labels number the file's categories in ascending order of their ids. Crowds become `ignored_boxes`. Boxes that
    nothing can be learned from are dropped and counted by mmdet's rule: no overlap with the image, no area, or an edge
    below one pixel. An annotation's `area` and `iscrowd` are optional.

    Raises DataError, in one line, if the file is missing, not JSON or not in COCO format, or if any entry is wrong:
    then with the first ten problems and the count of the others.
    """
    file = Path(file)
    content = _load_coco_json(file)
    images, annotations, categories = content["images"], content["annotations"], content["categories"]

    _raise_problems(
        file,
        _missing_keys(images, "images", ("id", "file_name", "width", "height"))
        + _missing_keys(annotations, "annotations", ("id", "image_id", "category_id", "bbox"))
        + _missing_keys(categories, "categories", ("id", "name")),
    )
    _raise_problems(file, _wrong_ids(images, "images", (int, str)) + _wrong_ids(categories, "categories", (int,)))
    problems = _wrong_ids(annotations, "annotations", (int, str))
    problems += [problem for image in images for problem in _image_problems(image)]
    image_ids, category_ids = {image["id"] for image in images}, {category["id"] for category in categories}
    problems += [p for annotation in annotations for p in _annotation_problems(annotation, image_ids, category_ids)]
    _raise_problems(file, problems)

    categories = sorted(categories, key=lambda category: category["id"])
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    boxes, labels, ignored_boxes, num_dropped = _sort_boxes(images, annotations, label_of)
    return Annotations(
        file=file,
        image_ids=[image["id"] for image in images],
        file_names=[image["file_name"] for image in images],
        sizes=[(int(image["height"]), int(image["width"])) for image in images],
        boxes=boxes,
        labels=labels,
        ignored_boxes=ignored_boxes,
        classes=[str(category["name"]) for category in categories],
        category_ids=list(label_of),
        num_dropped_boxes=num_dropped,
    )


def _load_coco_json(file: Path) -> dict:
    """Parse the file and check its outermost level."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"annotation file {file} does not exist: correct the path, or set DENSEKD_DATA to the folder "
            "that relative paths start from"
        ) from None
    except OSError as error:
        raise DataError(f"annotation file {file} cannot be read ({error.strerror}): make it a readable file") from error
    except ValueError as error:  # also what is not UTF-8
        raise DataError(f"annotation file {file} is not valid JSON ({error}): write or download it again") from error

    hint = "a COCO file is a JSON object with the lists images, annotations and categories"
    if not isinstance(content, dict):
        raise DataError(f"annotation file {file} is not in COCO format: it holds a {type(content).__name__}; {hint}")
    absent = [key for key in ("images", "annotations", "categories") if not isinstance(content.get(key), list)]
    if absent:
        raise DataError(f"annotation file {file} is not in COCO format: it has no list {', '.join(absent)}; {hint}")
    for key in ("images", "categories"):
        if not content[key]:
            raise DataError(f"annotation file {file} has no {key}: its list is empty, give a file that has some")
    return content


def _raise_problems(file: Path, problems: list[str]) -> None:
    if problems:
        listed = "; ".join(problems[:MAX_LISTED])
        rest = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DataError(f"annotation file {file} has {count}: {listed}{rest}; correct the file")


def _missing_keys(entries: list, name: str, keys: tuple[str, ...]) -> list[str]:
    problems = []
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            problems.append(f"{name}[{position}] is not an object")
            continue
        missing = [key for key in keys if key not in entry]
        if missing:
            problems.append(f"{name}[{position}] has no {', '.join(missing)}")
    return problems


def _wrong_ids(entries: list[dict], name: str, kinds: tuple[type, ...]) -> list[str]:
    """Ids of another type than `kinds`, and ids that occur more than once."""
    problems = [f"{name} id {entry['id']!r} is not an id" for entry in entries if not isinstance(entry["id"], kinds)]
    counts = Counter(entry["id"] for entry in entries if isinstance(entry["id"], kinds))
    return problems + [f"{name} id {key!r} occurs {count} times" for key, count in counts.items() if count > 1]


def _image_problems(image: dict) -> list[str]:
    problems = []
    size = (image["width"], image["height"])
    if not all(isinstance(edge, (int, float)) and 1 <= edge < MAX_COORDINATE for edge in size):
        problems.append(f"image {image['id']!r} has width and height {size}")
    name = image["file_name"]
    if not isinstance(name, str) or not name:
        problems.append(f"image {image['id']!r} has file_name {name!r}")
    elif PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        problems.append(f"image {image['id']!r} has file_name {name!r}, which leads out of the image folder")
    return problems


def _annotation_problems(annotation: dict, image_ids: set, category_ids: set) -> list[str]:
    problems = []
    box, name = annotation["bbox"], f"annotation {annotation['id']!r}"
    # The comparison is false for NaN.
    if not (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(value, (int, float)) and abs(value) < MAX_COORDINATE for value in box)
    ):
        problems.append(f"{name} has bbox {box}, not four finite numbers")
    if not isinstance(annotation.get("area", 0), (int, float)):
        problems.append(f"{name} has area {annotation['area']!r}")
    for key, known in (("image_id", image_ids), ("category_id", category_ids)):
        value = annotation[key]
        if not isinstance(value, (int, str)) or value not in known:
            problems.append(f"{name} has the unknown {key} {value!r}")
    return problems


def _sort_boxes(
    images: list[dict], annotations: list[dict], label_of: dict[int, int]
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], int]:
    """Return boxes, labels and ignored boxes per image, and the number of dropped boxes."""
    image_of = {image["id"]: image for image in images}
    boxes, labels, ignored = ({image_id: [] for image_id in image_of} for _ in range(3))
    num_dropped = 0
    for annotation in annotations:
        image_id = annotation["image_id"]
        if not _is_usable(annotation, image_of[image_id]):
            num_dropped += 1
            continue
        x, y, w, h = annotation["bbox"]
        if annotation.get("iscrowd"):
            ignored[image_id].append((x, y, x + w, y + h))
        else:
            boxes[image_id].append((x, y, x + w, y + h))
            labels[image_id].append(label_of[annotation["category_id"]])

    def box_arrays(rows_of: dict) -> list[np.ndarray]:
        return [np.array(rows, dtype=np.float32).reshape(-1, 4) for rows in rows_of.values()]

    label_arrays = [np.array(values, dtype=np.int64) for values in labels.values()]
    return box_arrays(boxes), label_arrays, box_arrays(ignored), num_dropped


def _is_usable(annotation: dict, image: dict) -> bool:
    x, y, w, h = annotation["bbox"]
    visible_w = min(x + w, image["width"]) - max(x, 0)
    visible_h = min(y + h, image["height"]) - max(y, 0)
    area = annotation.get("area", w * h)
    return not annotation.get("ignore") and visible_w > 0 and visible_h > 0 and area > 0 and w >= 1 and h >= 1
