"""Gathers the entries of a COCO file into arrays, and finds out whether all of them are correct."""
import json
import re
from collections.abc import Callable
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np

from data.coco.columns import Texts
from data.coco.problems import MAX_COORDINATE, image_problems

BOX, IGNORED, DROPPED = range(3)  # what an annotation is in training: an object, a crowd, or left out
BLOCK = 2 ** 20   # annotations that are worked on at a time
MISSING = object()
_plain_name = re.compile(r"[\w-][\w. -]*(?:/[\w-][\w. -]*)*", re.ASCII).fullmatch  # a correct file name at first sight
_image_keys = itemgetter("id", "file_name", "width", "height")
_annotation_keys = itemgetter("id", "image_id", "category_id", "bbox")
_optional_keys = itemgetter("area", "iscrowd")


class Wrong(Exception):
    """Something in the file is wrong. `find_problems` says what."""


class Gathered:
    """The images and annotations of a file, as `data.coco.stream.parse` passes them.

    Attributes: `wrong`, the lists in which an entry has a problem of its own.
    """

    def __init__(self):
        self.wrong: set[str] = set()
        self.parts: dict[str, list] = {"images": [], "annotations": []}

    def visit(self, key: str, entries: list | None) -> None:
        """Take the next entries of a list; None before the first ones."""
        if entries is None:
            self.parts[key] = []
            self.wrong.discard(key)
        elif entries and key not in self.wrong:
            try:
                self.parts[key].append(_image_columns(entries) if key == "images" else _annotation_columns(entries))
            except Wrong:
                self.wrong.add(key)

    def arrays(self, category_ids: list[int]) -> dict[str, np.ndarray]:
        """The arrays of `Annotations`, by name; the gathered ones are forgotten.

        Args:
            category_ids: the id of each label.
        Raises Wrong.
        """
        if self.wrong:
            raise Wrong
        image_ids, names, sizes = (list(each) for each in zip(*self.parts.pop("images")))
        image_ids, texts = joined(image_ids), Texts.of(list(chain.from_iterable(taken(names))))
        sizes = np.concatenate(sizes)
        ids, image_of, category_of, *rest = map(list, zip(*self.parts.pop("annotations") or [_annotation_columns([])]))
        check_unique(image_ids)
        check_unique(joined(ids))
        image_of = places(joined(image_of), image_ids)
        found = {"labels": places(joined(category_of), id_array(category_ids)).astype(np.int32)}
        for name, parts in zip(("boxes", "areas", "crowds", "ignored"), rest):
            found[name] = joined(parts)
        found["kinds"] = np.empty(len(image_of), np.uint8)
        for start in range(0, len(image_of), BLOCK):
            rows = slice(start, start + BLOCK)
            drop = useless(found["boxes"][rows], found["areas"][rows], sizes[image_of[rows]]) | found["ignored"][rows]
            found["kinds"][rows] = np.where(drop, DROPPED, np.where(found["crowds"][rows], IGNORED, BOX))
        del found["ignored"]
        learnable = np.bincount(image_of[found["kinds"] == BOX], minlength=len(image_ids)).astype(np.int32)
        if (image_of[1:] < image_of[:-1]).any():
            order = np.argsort(image_of, kind="stable")
            for name in found:
                found[name] = found[name][order]
        found |= {"ends": np.append(0, np.cumsum(np.bincount(image_of, minlength=len(image_ids)))),
                  "learnable": learnable, "sizes": sizes.astype(np.int32), "names": texts.content,
                  "name_ends": texts.ends}
        if image_ids.dtype == object:
            texts = Texts.of([json.dumps(each) for each in image_ids])
            return found | {"id_texts": texts.content, "id_ends": texts.ends}
        return found | {"image_ids": image_ids}


def taken(parts: list) -> list:
    """The same list, whose parts are freed when it is."""
    found = parts[:]
    parts.clear()
    return found


def useless(boxes: np.ndarray, areas: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Whether training leaves each box out, by the rule of `data.coco.problems.drop_reason`.

    Args:
        boxes: (n, 4) float64 x, y, width, height; areas: (n,) float64; sizes: (n, 2) of their images, (h, w).
    """
    x, y, w, h = boxes.T
    visible_w = np.minimum(x + w, sizes[:, 1]) - np.maximum(x, 0)
    visible_h = np.minimum(y + h, sizes[:, 0]) - np.maximum(y, 0)
    return (w < 1) | (h < 1) | (areas <= 0) | (visible_w <= 0) | (visible_h <= 0)


def _image_columns(entries: list) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Ids, file names and sizes (h, w) of images."""
    ids, names, widths, heights = columns(entries, _image_keys)
    check_types(ids, {int, str})
    sizes = np.column_stack([numbers(heights, {int, float}), numbers(widths, {int, float})])
    if not ((sizes >= 1) & (sizes < MAX_COORDINATE) & (sizes == np.floor(sizes))).all():
        raise Wrong
    for name, entry in zip(names, entries):
        if not (type(name) is str and _plain_name(name)) and image_problems(entry):
            raise Wrong
    return id_array(ids), list(names), sizes


def _annotation_columns(entries: list) -> tuple[np.ndarray, ...]:
    """Ids, image ids, category ids, boxes x, y, width, height, areas, and the marks "iscrowd" and "ignore"."""
    ids, image_ids, category_ids, boxes = columns(entries, _annotation_keys)
    check_types(ids, {int, str})
    check_types(image_ids, {int, str, bool})
    check_types(category_ids, {int, bool})
    check_types(boxes, {list})
    if not set(map(len, boxes)) <= {4}:
        raise Wrong
    boxes = numbers(list(chain.from_iterable(boxes)), {int, float}).reshape(-1, 4)
    if not ((np.abs(boxes) < MAX_COORDINATE).all() and (boxes[:, 2:] >= 0).all()):
        raise Wrong
    try:
        areas, crowds = columns(entries, _optional_keys)[:2]
    except Wrong:
        areas, crowds = ([entry.get(key, absent) for entry in entries]
                         for key, absent in (("area", MISSING), ("iscrowd", 0)))
    return (id_array(ids), id_array(image_ids), id_array(category_ids), boxes, area_array(areas, boxes), marks(crowds),
            marks([entry.get("ignore", 0) for entry in entries]))


def columns(entries: list, get: Callable[[dict], tuple]) -> list[tuple]:
    """The values of each key, of all entries."""
    try:
        return list(zip(*map(get, entries))) if entries else [()] * 4
    except (KeyError, TypeError, IndexError):  # no such key, or no object at all
        raise Wrong from None


def check_types(values: Any, kinds: set[type]) -> None:
    if not set(map(type, values)) <= kinds:
        raise Wrong


def numbers(values: Any, kinds: set[type]) -> np.ndarray:
    """Numbers as float64."""
    check_types(values, kinds)
    try:
        return np.fromiter(values, np.float64, len(values))
    except OverflowError:  # beyond what any value may be
        raise Wrong from None


def area_array(values: Any, boxes: np.ndarray) -> np.ndarray:
    """Areas; those that the file does not have are those of the boxes."""
    own = np.fromiter((value is not MISSING for value in values), bool, len(values))
    areas = boxes[:, 2] * boxes[:, 3]
    given = [value for value in values if value is not MISSING]
    areas[own] = numbers(given, {int, float, bool})
    if not (np.abs(areas) < MAX_COORDINATE ** 2).all() and not all(abs(v) < MAX_COORDINATE ** 2 for v in given):
        raise Wrong
    return areas


def marks(values: Any) -> np.ndarray:
    """Values that are 0 or 1, as bool."""
    try:
        if not set(values) <= {0, 1}:
            raise Wrong
    except TypeError:  # a list or an object
        raise Wrong from None
    return np.fromiter(values, bool, len(values))


def id_array(values: Any) -> np.ndarray:
    """Ids as int64, or as objects if there are texts or very large numbers among them."""
    if set(map(type, values)) <= {int, bool}:
        try:
            return np.fromiter(values, np.int64, len(values))
        except OverflowError:
            pass
    found = np.empty(len(values), object)
    found[:] = values
    return found


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """Arrays as one; the list of them is empty afterwards, so that they do not stay in memory."""
    return np.concatenate(taken(parts))


def check_unique(ids: np.ndarray) -> None:
    """Raise Wrong if an id occurs twice."""
    if ids.dtype == object:
        if len(set(ids.tolist())) < len(ids):
            raise Wrong
    elif not (ids[1:] > ids[:-1]).all():
        ids = np.sort(ids)
        if (ids[1:] == ids[:-1]).any():
            raise Wrong


def places(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The place of each id among the known ones, which are unique; raises Wrong if it is not there."""
    if object in (ids.dtype, known.dtype):
        place = {key: k for k, key in enumerate(known.tolist())}
        try:
            return np.fromiter((place[key] for key in ids.tolist()), np.int64, len(ids))
        except KeyError:
            raise Wrong from None
    low, high = int(known.min()), int(known.max())
    if len(ids) and not (low <= ids.min() and ids.max() <= high):
        raise Wrong
    if high - low < 2 ** 20 + 4 * len(known):  # almost always: a table is the fastest
        table = np.full(high - low + 1, -1, np.int32)
        table[known - low] = np.arange(len(known))
        found = table[ids - low]
    else:
        order = np.argsort(known)
        found = order[np.minimum(np.searchsorted(known, ids, sorter=order), len(known) - 1)]
        found = np.where(known[found] == ids, found, -1)
    if (found < 0).any():
        raise Wrong
    return found
