"""Reads a COCO-format annotation file into arrays, and checks the whole file before training."""
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.coco.cache import Cache, open_entry
from data.coco.columns import Column, Texts
from data.coco.gather import BOX, DROPPED, IGNORED, Gathered, Wrong
from data.coco.problems import Problem, category_problems, find_problems
from data.coco.stream import Entries, Visit, no_garbage_collection, parse
from data.config import check_there
from data.errors import DataError, counted, listed
from data.shared import Damaged

# COCO's sizes of objects: ranges of the area in pixels.
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}


@dataclass
class Annotations:
    """The content of one annotation file, as arrays: `a` of them in the file, of `n` images, in the file's order.

    Annotations stand image by image, those of an image in the file's order. Pickled, what is stored in a file is named
    and not copied.
    """

    file: Path
    classes: list[str]            # name per label
    category_ids: list[int]       # the file's category id per label
    arrays: dict[str, np.ndarray]
    entry: Path | None = None     # the file that the arrays are mapped from
    # arrays: sizes (n, 2) int32, (h, w) in pixels, as the file states them; learnable (n,), the number of boxes to
    # learn; names and name_ends, see `Texts`; image_ids (n,), or id_texts and id_ends, in JSON; ends (n + 1,), where
    # the annotations of each image start; boxes (a, 4) float64 x, y, width, height, not clipped to the image; areas
    # (a,) float64; labels (a,) int32, 0..K-1; crowds (a,) bool; kinds (a,), see `data.coco.gather`

    def __len__(self) -> int:
        return len(self.arrays["sizes"])

    @property
    def num_dropped_boxes(self) -> int:
        """Boxes without area, thinner than a pixel, outside the image or marked "ignore"."""
        return int(np.count_nonzero(self.arrays["kinds"] == DROPPED))

    @property
    def image_ids(self) -> Column:
        """The ids of all images; like the next five, a sequence in the file's order."""
        return Column(self.image_id, range(len(self)))

    @property
    def file_names(self) -> Column:
        return Column(self.file_name, range(len(self)))

    @property
    def sizes(self) -> Column:
        return Column(self.size, range(len(self)), self.all_sizes)

    @property
    def boxes(self) -> Column:
        return Column(self.boxes_of, range(len(self)))

    @property
    def labels(self) -> Column:
        return Column(self.labels_of, range(len(self)), self.all_labels)

    @property
    def ignored_boxes(self) -> Column:
        return Column(self.ignored_of, range(len(self)))

    def image_id(self, image: int) -> int | str:
        if "image_ids" in self.arrays:
            return int(self.arrays["image_ids"][image])
        return json.loads(Texts(self.arrays["id_texts"], self.arrays["id_ends"])[image])

    def file_name(self, image: int) -> str:
        return Texts(self.arrays["names"], self.arrays["name_ends"])[image]

    def size(self, image: int) -> tuple[int, int]:
        """(h, w) in pixels, as the file states them."""
        return tuple(self.arrays["sizes"][image].tolist())

    def all_sizes(self, images: Sequence[int]) -> np.ndarray:
        """The sizes of images, (m, 2)."""
        return self.arrays["sizes"][as_index(images)]

    def boxes_of(self, image: int) -> np.ndarray:
        """(n, 4) float32, xyxy in pixels, not clipped to the image."""
        return self._corners(image, BOX)

    def ignored_of(self, image: int) -> np.ndarray:
        """(m, 4) float32, crowds."""
        return self._corners(image, IGNORED)

    def labels_of(self, image: int) -> np.ndarray:
        """(n,) int64, of the boxes."""
        rows = self._rows(image)
        return self.arrays["labels"][rows][self.arrays["kinds"][rows] == BOX].astype(np.int64)

    def all_labels(self, images: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The labels of images, one after the other, and how many each has; see `data.coco.columns.flat`."""
        own = self.arrays["kinds"] == BOX
        if len(images) < len(self):
            chosen = np.zeros(len(self), bool)
            chosen[as_index(images)] = True
            own &= np.repeat(chosen, np.diff(self.arrays["ends"]))
        return self.arrays["labels"][own].astype(np.int64), self.arrays["learnable"][as_index(images)]

    def truth_of(self, image: int) -> np.ndarray:
        """What evaluation needs of all annotations: (n, 7) float64, x, y, width, height, area, label, crowd."""
        rows = self._rows(image)
        return np.column_stack([self.arrays[name][rows] for name in ("boxes", "areas", "labels", "crowds")])

    def _rows(self, image: int) -> slice:
        ends = self.arrays["ends"]
        return slice(int(ends[image]), int(ends[image + 1]))

    def _corners(self, image: int, kind: int) -> np.ndarray:
        rows = self._rows(image)
        boxes = self.arrays["boxes"][rows][self.arrays["kinds"][rows] == kind]
        return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).astype(np.float32)

    def __reduce__(self) -> tuple:
        if self.entry is None:
            return Annotations, (self.file, self.classes, self.category_ids, self.arrays)
        return reopen, (self.file, self.entry)


def as_index(images: Sequence[int]) -> slice | np.ndarray:
    """Images as an index of arrays."""
    return slice(images.start, images.stop) if isinstance(images, range) else images


def reopen(file: Path, entry: Path) -> Annotations:
    """The annotations of a file in another process."""
    try:
        about, arrays = open_entry(entry, check=False)
    except (OSError, Damaged) as error:
        found = read_annotations(file)
        if found.entry is None or found.entry.name != entry.name:
            raise DataError(f"{entry}, with the annotations of {file}, cannot be read any more "
                            f"({getattr(error, 'strerror', None) or error}): start again") from None
        return found
    return Annotations(file, about["classes"], about["category_ids"], arrays, entry)


def read_annotations(file: str | Path) -> Annotations:
    """Read and check a COCO-format annotation file; what was read before is taken from the cache, see `Cache`.

    Labels number the file's categories in ascending order of their ids. Crowds become `ignored_boxes`. Useless
    boxes are dropped and counted, by mmdet's rule: no overlap with the image, no area, or an edge below one pixel. A
    negative edge is an error: there is an object, but its position is not known. An annotation's `area` and `iscrowd`
    are optional.
    Raises DataError, in one line, if the file is missing, not JSON or not in COCO format, or if an entry is wrong. For
    wrong entries, the line lists the first ten problems and counts the others.
    """
    file = Path(file)
    cache = Cache(file)
    found = cache.find()
    if found is None:
        with cache.locked():
            found = cache.find() or _parse(file, cache)
    about, arrays, entry = found
    return Annotations(file, about["classes"], about["category_ids"], arrays, entry)


def _parse(file: Path, cache: Cache) -> tuple[dict, dict[str, np.ndarray], Path | None]:
    """The content of a correct file, which is also stored: as `Cache.find` gives it."""
    gathered, found = Gathered(), hashlib.sha256()
    with no_garbage_collection():
        content = load_coco_json(file, gathered.visit, found)
        try:
            if category_problems(content["categories"]):
                raise Wrong
            categories = sorted(content["categories"], key=lambda category: category["id"])
            category_ids = [category["id"] for category in categories]
            arrays = gathered.arrays(category_ids)
        except Wrong:
            _raise_problems(file, find_problems(content))
            raise  # not reached: what is wrong is a problem
    about = {"classes": [str(category["name"]) for category in categories], "category_ids": category_ids}
    del content
    return cache.write(about, arrays, found.hexdigest()[:32]) or (about, arrays, None)


def read_categories(file: Path) -> tuple[list[str], list[int]]:
    """The names and ids of a file's categories, in the order of their labels; errors as in `read_annotations`."""
    categories = load_coco_json(file)["categories"]
    _raise_problems(file, category_problems(categories))
    categories = sorted(categories, key=lambda category: category["id"])
    return [str(category["name"]) for category in categories], [category["id"] for category in categories]


def load_coco_json(file: Path, visit: Visit = lambda key, entries: None, digest: Any = None) -> dict:
    """Parse the file and check its outermost level. Raises DataError in one line.

    Returns:
        The content. In a large file, `images` and `annotations` are no lists: they are parsed again each time that
        they are iterated over.
    Args:
        visit, digest: see `data.coco.stream.parse`.
    """
    check_there("annotation file", file)
    try:
        content = parse(file, visit, digest)
    except OSError as error:
        raise DataError(f"annotation file {file} cannot be read ({error.strerror}): make it a readable file") from error
    except (ValueError, RecursionError) as error:  # also for text that is not UTF-8 or nested too deeply
        raise DataError(f"annotation file {file} is not valid JSON ({error}): write or download it again") from error

    hint = "a COCO file is a JSON object with the lists images, annotations and categories"
    if not isinstance(content, dict):
        raise DataError(f"annotation file {file} is not in COCO format: it holds a {type(content).__name__}; {hint}")
    lists = ("images", "annotations", "categories")
    absent = [key for key in lists if not isinstance(content.get(key), (list, Entries))]
    if absent:
        raise DataError(f"annotation file {file} is not in COCO format: it has no list {', '.join(absent)}; {hint}")
    for key in ("images", "categories"):
        if not len(content[key]):
            raise DataError(f"annotation file {file} has no {key}: its list is empty; give a file that has some")
    return content


def _raise_problems(file: Path, problems: list[Problem]) -> None:
    if problems:
        texts = listed([problem.text for problem in problems])
        raise DataError(f"annotation file {file} has {counted(len(problems), 'problem')}: {texts}; correct the file")
