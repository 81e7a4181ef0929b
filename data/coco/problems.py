"""Finds all problems in the content of a COCO-format annotation file in one pass."""
from collections import Counter
from pathlib import PurePosixPath, PureWindowsPath
from typing import NamedTuple

from data.errors import shown

MAX_COORDINATE = 1e9  # pixels; no real box has a larger coordinate, and float32 could make it infinite

CATEGORY_KEYS = ("id", "name")


class Problem(NamedTuple):
    """One thing that must be corrected before the file can be used."""

    kind: str  # the heading for problems of this kind
    text: str  # the entry and its wrong value


def find_problems(content: dict) -> list[Problem]:
    """The problems that must be corrected in the parsed lists `images`, `annotations` and `categories` of a file.

    Missing keys hide other problems, so if there are any, only they are returned. The same holds for images and
    categories with a wrong or repeated id.
    """
    images, annotations, categories = content["images"], content["annotations"], content["categories"]
    problems = (
        _missing_keys(images, "images", ("id", "file_name", "width", "height"))
        + _missing_keys(annotations, "annotations", ("id", "image_id", "category_id", "bbox"))
        + _missing_keys(categories, "categories", CATEGORY_KEYS)
    )
    if problems:
        return problems
    problems = _wrong_ids(images, "images", (int, str)) + _wrong_ids(categories, "categories", (int,))
    if problems:
        return problems
    problems = _wrong_ids(annotations, "annotations", (int, str)) + _name_problems(categories)
    problems += [problem for image in images for problem in image_problems(image)]
    image_ids, category_ids = {image["id"] for image in images}, {category["id"] for category in categories}
    problems += [p for annotation in annotations for p in _annotation_problems(annotation, image_ids, category_ids)]
    return problems


def category_problems(categories: list) -> list[Problem]:
    """The problems in the list `categories` alone."""
    return (_missing_keys(categories, "categories", CATEGORY_KEYS) or _wrong_ids(categories, "categories", (int,))
            or _name_problems(categories))


def drop_reason(annotation: dict, image: dict) -> str | None:
    """Why the box of a correct annotation is useless for training, by mmdet's rule; None if it is useful."""
    x, y, w, h = annotation["bbox"]
    visible_w = min(x + w, image["width"]) - max(x, 0)
    visible_h = min(y + h, image["height"]) - max(y, 0)
    if annotation.get("ignore"):
        return 'marked "ignore"'
    if w <= 0 or h <= 0 or annotation.get("area", w * h) <= 0:
        return "without area"
    if visible_w <= 0 or visible_h <= 0:
        return "outside the image"
    return "thinner than a pixel" if w < 1 or h < 1 else None


def _is_finite(value: object) -> bool:
    """Whether the value is a number within the bounds of coordinates; NaN is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_COORDINATE


def _wrong_value(box: object) -> str:
    """Which of four values is no coordinate, and why."""
    if not isinstance(box, list) or len(box) != 4:
        return ""
    key, value = next((key, value) for key, value in zip(("x", "y", "width", "height"), box) if not _is_finite(value))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    return f": its {key} is {'too large' if is_number else 'not a number'}"


def _is_text(value: object) -> bool:
    """Whether the value is one line of text that can be printed and can be a file name."""
    if not isinstance(value, str) or value.splitlines() != [value] or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can contain half a character
        return False
    return True


def _missing_keys(entries: list, name: str, keys: tuple[str, ...]) -> list[Problem]:
    problems = []
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            problems.append(Problem("missing keys", f"{name}[{position}] is not an object"))
            continue
        missing = [key for key in keys if key not in entry]
        if missing:
            problems.append(Problem("missing keys", f"{name}[{position}] has no {', '.join(missing)}"))
    return problems


def _wrong_ids(entries: list[dict], name: str, kinds: tuple[type, ...]) -> list[Problem]:
    """Ids whose type is not in `kinds`, and ids that occur more than once."""

    def is_id(value: object) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool)

    wrong = [f"{name} id {shown(entry['id'])} is not an id" for entry in entries if not is_id(entry["id"])]
    counts = Counter(entry["id"] for entry in entries if is_id(entry["id"]))
    wrong += [f"{name} id {shown(key)} occurs {count} times" for key, count in counts.items() if count > 1]
    return [Problem("ids", text) for text in wrong]


def _name_problems(categories: list[dict]) -> list[Problem]:
    """Names that cannot be printed, and names that two classes share: results are reported by name."""
    names = [str(category["name"]) for category in categories]
    wrong = [f"category {shown(c['id'])}: wrong name {shown(c['name'])}" for c in categories
             if not (isinstance(c["name"], (str, int, float)) and _is_text(str(c["name"])))]
    wrong += [f"categories name {shown(name)} occurs {count} times" for name, count in Counter(names).items()
              if count > 1]
    return [Problem("class names", text) for text in wrong]


def image_problems(image: dict) -> list[Problem]:
    """The problems with the size and the file name of an entry that has both."""
    problems = []
    size, name = (image["width"], image["height"]), image["file_name"]
    if not all(_is_finite(edge) and edge >= 1 and edge == int(edge) for edge in size):
        problems.append(Problem("image sizes", f"image {shown(image['id'])} has wrong width and height {shown(size)}"))
    if not _is_text(name):
        problems.append(Problem("file names", f"image {shown(image['id'])} has wrong file_name {shown(name)}"))
    # The same names are valid on every system. On Windows, backslashes could lead out of the folder.
    elif any(kind(name).anchor or ".." in kind(name).parts for kind in (PurePosixPath, PureWindowsPath)):
        text = f"image {shown(image['id'])} has file_name {shown(name)}, which leads out of the image folder"
        problems.append(Problem("file names", text))
    return problems


def _annotation_problems(annotation: dict, image_ids: set, category_ids: set) -> list[Problem]:
    box, name = annotation["bbox"], f"annotation {shown(annotation['id'])}"
    problems = []
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box))):
        problems.append(Problem("boxes", f"{name} has bbox {shown(box)}, not four finite numbers{_wrong_value(box)}"))
    elif box[2] < 0 or box[3] < 0:
        problems.append(Problem("boxes", f"{name} has bbox {box} with negative width or height: are corners swapped?"))
    area = annotation.get("area", 0)
    if not isinstance(area, (int, float)) or not abs(area) < MAX_COORDINATE ** 2:
        problems.append(Problem("boxes", f"{name} has wrong area {shown(area)}"))
    for key in ("iscrowd", "ignore"):
        if annotation.get(key, 0) not in (0, 1):  # a string counts as true, even "0"
            problems.append(Problem("flags", f"{name} has {key} {shown(annotation[key])}, not 0 or 1"))
    for key, known in (("image_id", image_ids), ("category_id", category_ids)):
        value = annotation[key]
        if not isinstance(value, (int, str)) or value not in known:
            problems.append(Problem("unknown ids", f"{name} has the unknown {key} {shown(value)}"))
    return problems
