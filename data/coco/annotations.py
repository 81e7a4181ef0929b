"""Reads a COCO-format annotation file into arrays, and checks the whole file before training."""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.coco.problems import Problem, category_problems, drop_reason, find_problems
from data.config import check_there
from data.errors import DataError, counted, listed

# COCO's sizes of objects: ranges of the area in pixels.
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}


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

    Labels number the file's categories in ascending order of their ids. Crowds become `ignored_boxes`. Useless
    boxes are dropped and counted, by mmdet's rule: no overlap with the image, no area, or an edge below one pixel. A
    negative edge is an error: there is an object, but its position is not known. An annotation's `area` and `iscrowd`
    are optional.
    Raises DataError, in one line, if the file is missing, not JSON or not in COCO format, or if an entry is wrong. For
    wrong entries, the line lists the first ten problems and counts the others.
    """
    file = Path(file)
    content = load_coco_json(file)
    _raise_problems(file, find_problems(content))
    images, annotations, categories = content["images"], content["annotations"], content["categories"]
    categories = sorted(categories, key=lambda category: category["id"])
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    boxes, labels, ignored_boxes, num_dropped = _sort_boxes(images, annotations, label_of)
    return Annotations(file=file, image_ids=[image["id"] for image in images],
                       file_names=[image["file_name"] for image in images],
                       sizes=[(int(image["height"]), int(image["width"])) for image in images], boxes=boxes,
                       labels=labels, ignored_boxes=ignored_boxes,
                       classes=[str(category["name"]) for category in categories], category_ids=list(label_of),
                       num_dropped_boxes=num_dropped)


def read_categories(file: Path) -> tuple[list[str], list[int]]:
    """The names and ids of a file's categories, in the order of their labels; errors as in `read_annotations`."""
    categories = load_coco_json(file)["categories"]
    _raise_problems(file, category_problems(categories))
    categories = sorted(categories, key=lambda category: category["id"])
    return [str(category["name"]) for category in categories], [category["id"] for category in categories]


def load_coco_json(file: Path) -> dict:
    """Parse the file and check its outermost level. Raises DataError in one line."""
    check_there("annotation file", file)
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"annotation file {file} cannot be read ({error.strerror}): make it a readable file") from error
    except (ValueError, RecursionError) as error:  # also for text that is not UTF-8 or nested too deeply
        raise DataError(f"annotation file {file} is not valid JSON ({error}): write or download it again") from error

    hint = "a COCO file is a JSON object with the lists images, annotations and categories"
    if not isinstance(content, dict):
        raise DataError(f"annotation file {file} is not in COCO format: it holds a {type(content).__name__}; {hint}")
    absent = [key for key in ("images", "annotations", "categories") if not isinstance(content.get(key), list)]
    if absent:
        raise DataError(f"annotation file {file} is not in COCO format: it has no list {', '.join(absent)}; {hint}")
    for key in ("images", "categories"):
        if not content[key]:
            raise DataError(f"annotation file {file} has no {key}: its list is empty; give a file that has some")
    return content


def _raise_problems(file: Path, problems: list[Problem]) -> None:
    if problems:
        texts = listed([problem.text for problem in problems])
        raise DataError(f"annotation file {file} has {counted(len(problems), 'problem')}: {texts}; correct the file")


def _sort_boxes(images: list[dict], annotations: list[dict],
                label_of: dict[int, int]) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], int]:
    """Return boxes, labels and ignored boxes per image, and the number of dropped boxes."""
    image_of = {image["id"]: image for image in images}
    boxes, labels, ignored = ({image_id: [] for image_id in image_of} for _ in range(3))
    num_dropped = 0
    for annotation in annotations:
        image_id = annotation["image_id"]
        if drop_reason(annotation, image_of[image_id]):
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
