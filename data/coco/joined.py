"""Several data sets as one: classes united by name, and how often each image is shown in an epoch."""
import copy
from collections.abc import Mapping, Sequence
from itertools import count

import numpy as np

from data.coco.dataset import CocoDataset
from data.errors import DataError
from data.names import folded

PER_IMAGE = ("file_names", "origins", "sizes", "boxes", "labels", "ignored_boxes", "repeats")


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
    dataset.labels = [label_of[labels] for labels in dataset.labels]
    dataset.category_ids = [ids[name] if name in ids else next(new) for name in classes]
    dataset.classes, dataset.num_classes = list(classes), len(classes)


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
        setattr(joined, name, [value for each in datasets for value in getattr(each, name)])
    joined.image_ids = [f"{k}/{image_id}" if k else image_id for k, each in enumerate(datasets)
                        for image_id in each.image_ids]
    joined.annotation_file = ", ".join(str(each.annotation_file) for each in datasets)  # for messages
    joined.num_dropped_boxes = sum(each.num_dropped_boxes for each in datasets)
    joined.num_skipped_images = sum(each.num_skipped_images for each in datasets)
    return joined


def oversample(labels: Sequence[np.ndarray], repeats: Sequence[float], threshold: float) -> list[float]:
    """How often each image is shown in an epoch so that rare classes are seen more often (LVIS, arXiv:1908.03195v2,
    appendix B.2): r(c) = max(1, sqrt(threshold / f(c))) for a class, the largest r(c) for an image.

    Args:
        labels: of each image.
        repeats: how often each image would be shown without this; the result is multiplied with it.
        threshold: classes in a smaller share f(c) of the images are shown more often.
    """
    present = [np.unique(each) for each in labels]
    shown = np.zeros(1 + max((each.max() for each in present if len(each)), default=0))
    for classes, times in zip(present, repeats):
        shown[classes] += times
    factors = np.maximum(1, np.sqrt(threshold * sum(repeats) / np.maximum(shown, 1)))
    return [times * float(factors[classes].max(initial=1)) for classes, times in zip(present, repeats)]
