"""Several data sets as one: classes united by name, and how often each image is shown in an epoch."""
import copy
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count

import numpy as np

from data.coco.columns import Column, Joined, flat
from data.coco.dataset import CocoDataset
from data.errors import DataError
from data.names import folded

PER_IMAGE = ("file_names", "origins", "sizes", "boxes", "labels", "ignored_boxes", "truth", "repeats")
LABEL = 5  # column of `truth`


def unite_classes(classes_of: Mapping[str, Sequence[str]]) -> list[str]:
    """The names of the classes of several data sets, each once, in the order in which they first appear.

    Args:
        classes_of: the names by data set, which is named as in a message.
    Raises DataError if a name is there in another spelling: in upper or lower case, with a space, "-" or "_".
    """
    first: dict[str, str] = {}  # the data set in which a name appears first
    for where, classes in classes_of.items():
        spelled = {folded(name): name for name in first}
        for name in classes:
            known = spelled.get(folded(name), name)
            if name not in first and name != known:
                raise DataError(f'{where} has the class "{name}", and {first[known]} has "{known}": spell the name in '
                                "the same way in both files")
        first |= {name: where for name in classes if name not in first}
    return list(first)


def use_classes(dataset: CocoDataset, classes: Sequence[str]) -> None:
    """Number a data set's labels as in `classes`, which has all its names. Names that it lacks get new category ids."""
    if dataset.classes == list(classes):
        return
    label_of = np.array([classes.index(name) for name in dataset.classes])
    ids, new = dict(zip(dataset.classes, dataset.category_ids)), count(max(dataset.category_ids) + 1)
    dataset.labels, dataset.truth = renumbered(dataset.labels, label_of), renumbered(dataset.truth, label_of)
    dataset.category_ids = [ids[name] if name in ids else next(new) for name in classes]
    dataset.classes, dataset.num_classes = list(classes), len(classes)


def renumbered(column: Column, label_of: np.ndarray) -> Column:
    """A data set's labels, or its truth, with other numbers."""
    return Column(partial(_renumber, column, label_of), range(len(column)), partial(_renumber_all, column, label_of))


def _renumber(column: Column, label_of: np.ndarray, index: int) -> np.ndarray:
    values = column[index]
    if values.ndim == 1:
        return label_of[values]
    values[:, LABEL] = label_of[values[:, LABEL].astype(np.int64)]
    return values


def _renumber_all(column: Column, label_of: np.ndarray, _: range) -> tuple[np.ndarray, np.ndarray]:
    labels, lengths = flat(column)
    return label_of[labels], lengths


def _prefixed(k: int, image_ids: Column, index: int) -> str:
    return f"{k}/{image_ids[index]}"


def join(datasets: Sequence[CocoDataset], key: str) -> CocoDataset:
    """One data set with the images of all; a single one is returned as it is.

    Image ids of data set k, after the first, become "k/id", so that none occurs twice.

    Args:
        key: the key of the list in the configuration, for messages.
    Raises DataError: see `unite_classes`.
    """
    if len(datasets) == 1:
        return datasets[0]
    classes = unite_classes({f"{key}.{k} ({each.annotation_file})": each.classes for k, each in enumerate(datasets)})
    for each in datasets:
        use_classes(each, classes)
    joined = copy.copy(datasets[0])
    for name in PER_IMAGE:
        setattr(joined, name, Joined([getattr(each, name) for each in datasets]))
    joined.image_ids = Joined([Column(partial(_prefixed, k, each.image_ids), range(len(each))) if k else each.image_ids
                               for k, each in enumerate(datasets)])
    joined.annotation_file = ", ".join(str(each.annotation_file) for each in datasets)  # for messages
    joined.num_dropped_boxes = sum(each.num_dropped_boxes for each in datasets)
    joined.num_skipped_images = sum(each.num_skipped_images for each in datasets)
    return joined


def oversample(labels: Sequence[np.ndarray], repeats: Sequence[float], threshold: float) -> np.ndarray:
    """How often each image is shown in an epoch so that rare classes are seen more often (LVIS, arXiv:1908.03195v2,
    appendix B.2): r(c) = max(1, sqrt(threshold / f(c))) for a class, the largest r(c) for an image.

    Args:
        labels: of each image.
        repeats: how often each image would be shown without this; the result is multiplied with it.
        threshold: classes in a smaller share f(c) of the images are shown more often.
    """
    labels, lengths = flat(labels)
    repeats, classes = np.array(repeats), 1 + labels.max(initial=0)
    # each class of an image once, in the order of the images
    images, present = np.divmod(np.unique(np.repeat(np.arange(len(lengths)), lengths) * classes + labels), classes)
    shown = np.bincount(present, repeats[images], classes)
    factors = np.maximum(1, np.sqrt(threshold * repeats.sum() / np.maximum(shown, 1)))
    largest = np.ones(len(lengths))
    np.maximum.at(largest, images, factors[present])
    return repeats * largest
