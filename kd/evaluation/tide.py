"""Why a detector loses AP: the error types of TIDE (Bolya et al., arXiv:2008.08115, section 2).

The cost of a type is how much AP at IoU 0.5 would rise if all errors of this type, and no others, were corrected.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask

from .coco import Evaluation

FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU from which an object counts as found; up to which it counts as not touched
CORRECT, CLASS, BOX, BOTH, DUPLICATE, NOTHING = range(6)
KINDS = {"classification": CLASS, "localisation": BOX, "both": BOTH, "duplicate": DUPLICATE, "background": NOTHING}
ERRORS = (*KINDS, "missed")


@dataclass
class Judged:
    """All detections and objects of a data set, with their errors. Classes are numbered from 0."""

    num_classes: int
    image: np.ndarray    # (D,) number of its image, ascending; detections inside crowds of their class are left out
    box: np.ndarray      # (D, 4) x, y, width, height
    label: np.ndarray    # (D,)
    score: np.ndarray    # (D,)
    kind: np.ndarray     # (D,) CORRECT, or the type of its error
    object: np.ndarray   # (D,) the object that it finds, or that it alone would find if corrected; otherwise -1
    object_image: np.ndarray  # (G,) ascending; crowds are left out
    object_box: np.ndarray    # (G, 4)
    object_label: np.ndarray  # (G,)
    object_area: np.ndarray   # (G,) as annotated; COCO's sizes depend on it

    @property
    def found(self) -> np.ndarray:
        """(G,) bool: objects that are found."""
        return np.isin(np.arange(len(self.object_label)), self.object[self.kind == CORRECT])

    @property
    def missed(self) -> np.ndarray:
        """(G,) bool: objects that no detection finds, or would find with its box or class corrected."""
        return ~np.isin(np.arange(len(self.object_label)), self.object)


def judge(evaluation: Evaluation) -> Judged:
    """Find every detection's type of error from an evaluation's `matches` of boxes at IoU 0.5."""
    truth, rows, classes = evaluation.truth, evaluation.rows, len(evaluation.params.catIds)
    low, high = evaluation.params.areaRng[0]
    far = (truth[:, 6] != 0) | (truth[:, 4] < low) | (truth[:, 4] > high)  # pycocotools has them last
    objects = np.lexsort((far, truth[:, 5], evaluation.truth_images))
    objects = objects[truth[objects, 6] == 0]  # crowds are left out
    number = np.full(len(truth) + 1, -1)  # of each annotation as an object; the last is for none
    number[objects] = np.arange(len(objects))
    own = np.lexsort((rows[:, 5], -rows[:, 4], evaluation.row_images))
    own = own[evaluation.counts[own]]
    images = np.arange(len(evaluation.params.imgIds) + 1)
    ends = np.searchsorted(evaluation.row_images[own], images)
    object_ends = np.searchsorted(evaluation.truth_images[objects], images)
    partners = number[evaluation.partners[own]]
    kinds = np.full(len(own), CORRECT)
    for i in images[:-1]:
        here, there = slice(ends[i], ends[i + 1]), slice(object_ends[i], object_ends[i + 1])
        partners[here], kinds[here] = judge_image(rows[own[here]], partners[here], truth[objects[there]],
                                                  object_ends[i])
    return Judged(classes, evaluation.row_images[own], rows[own, :4], rows[own, 5].astype(int), rows[own, 4], kinds,
                  partners, evaluation.truth_images[objects], truth[objects, :4], truth[objects, 5].astype(int),
                  truth[objects, 4])


def judge_image(detections: np.ndarray, partners: np.ndarray, objects: np.ndarray, first: int
                ) -> tuple[np.ndarray, np.ndarray]:
    """The object of each of one image's detections, and its kind.

    Args:
        detections: (d, 6) box, score and label, best first.
        partners: (d,) the number of the object found, or -1.
        objects: (g, 7) box, area, label, numbered from `first`.
    Returns:
        The partners, and the kinds (d,). If a detection would find an object once its error is corrected, and no other
        detection finds it and no better one would, its partner is the number of that object.
    """
    labels, partners, kinds = objects[:, 5], partners.copy(), np.full(len(detections), CORRECT)
    taken, claimed = np.isin(np.arange(len(objects)) + first, partners), set()
    wrong = np.flatnonzero(partners < 0)
    for d, overlaps in zip(wrong, iou(detections[wrong, :4], objects[:, :4])):
        kinds[d], index = kind_of_error(overlaps, labels == detections[d, 5], taken)
        if index >= 0 and not taken[index] and index not in claimed:
            claimed.add(index)
            partners[d] = first + index
    return partners, kinds


def kind_of_error(overlaps: np.ndarray, same: np.ndarray, taken: np.ndarray) -> tuple[int, int]:
    """The type of error of a detection that finds nothing, and the object that it is meant for, or -1.

    Args:
        overlaps: (G,) IoU with the image's objects; same: (G,) those of its class; taken: (G,) those found.
    """
    if not len(overlaps):
        return NOTHING, -1
    own, other = np.where(same, overlaps, 0), np.where(same, 0, overlaps)
    if BACKGROUND <= own.max() <= FOREGROUND:
        return BOX, int(own.argmax())
    if other.max() >= FOREGROUND:
        return CLASS, int(other.argmax())
    if np.where(taken, own, 0).max() >= FOREGROUND:
        return DUPLICATE, -1
    return (NOTHING if overlaps.max() <= BACKGROUND else BOTH), -1


def iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU (D, G) of boxes x, y, width, height, as pycocotools computes it."""
    if not len(boxes) or not len(others):
        return np.zeros((len(boxes), len(others)))
    return mask.iou(np.array(boxes, dtype=float), np.array(others, dtype=float), [0] * len(others))


def average_precision(scores: np.ndarray, correct: np.ndarray, objects: int) -> float | None:
    """COCO's AP of one class at one IoU: mean of monotone precision at 101 recalls. None without objects."""
    if objects == 0:
        return None
    correct = correct[np.argsort(-scores, kind="stable")]
    found = np.cumsum(correct)
    precision = found / np.arange(1, len(found) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(found / objects, np.linspace(0, 1, 101), side="left")
    return float(np.append(precision, np.zeros(1))[np.minimum(places, len(precision))].mean())


def class_aps(labels: np.ndarray, scores: np.ndarray, correct: np.ndarray, objects: np.ndarray) -> list[float | None]:
    """AP of every class; `objects` (K,) are the numbers of objects."""
    return [average_precision(scores[labels == k], correct[labels == k], int(count)) for k, count in enumerate(objects)]


def ap50(judged: Judged) -> list[float | None]:
    """AP at IoU 0.5 of every class, the same as from pycocotools."""
    objects = np.bincount(judged.object_label, minlength=judged.num_classes)
    return class_aps(judged.label, judged.score, judged.kind == CORRECT, objects)


def image_aps(evaluation: Evaluation, labels: Sequence[int]) -> dict[int, float]:
    """For each image with objects, by its number, the AP of its own detections: those of all these classes in one list,
    by score; the mean over the IoU thresholds. Averages of it compare two detectors image by image.

    Args:
        evaluation: one with `hits`.
    """
    truth, rows, images = evaluation.truth, evaluation.rows, len(evaluation.params.imgIds)
    low, high = evaluation.params.areaRng[0]
    counted = (truth[:, 6] == 0) & (truth[:, 4] >= low) & (truth[:, 4] <= high) & np.isin(truth[:, 5], labels)
    objects = np.bincount(evaluation.truth_images[counted], minlength=images)
    own = np.flatnonzero(np.isin(rows[:, 5], labels))
    own = own[np.argsort(evaluation.row_images[own], kind="stable")]
    ends = np.searchsorted(evaluation.row_images[own], np.arange(images + 1))
    found = {}
    for number in np.flatnonzero(objects):
        here = own[ends[number]:ends[number + 1]]
        scores, hits = rows[here, 4], evaluation.hits[:, here]
        found[int(number)] = float(np.mean([average_precision(scores[hit >= 0], hit[hit >= 0] > 0, objects[number])
                                            for hit in hits]))
    return found


def lost_ap(judged: Judged) -> dict[str, list[float | None]]:
    """For every type of error, the gain in each class's AP at IoU 0.5 if all errors of this type are corrected.

    A wrong box or class becomes that of its object, if nothing else finds the object and no better detection would.
    Other detections with this error are removed. Missed objects are no longer counted; if a class then has no objects
    left, its AP is 1, because it lost all of its AP by missing them (TIDE's own code says 0).
    """
    before, objects = ap50(judged), np.bincount(judged.object_label, minlength=judged.num_classes)
    correct, lost = judged.kind == CORRECT, {}
    for name, kind in KINDS.items():
        wrong = judged.kind == kind
        mended = wrong & (judged.object >= 0)
        labels = np.where(mended, judged.object_label[judged.object], judged.label) if mended.any() else judged.label
        keep = ~wrong | mended
        lost[name] = gains(class_aps(labels[keep], judged.score[keep], (correct | mended)[keep], objects), before)
    missed = np.bincount(judged.object_label[judged.missed], minlength=judged.num_classes)
    after = class_aps(judged.label, judged.score, correct, objects - missed)
    lost["missed"] = gains([1.0 if ap is None else ap for ap in after], before)
    return lost


def count_errors(judged: Judged, label: int | None = None) -> dict[str, int]:
    """Numbers of objects, of errors by type and of missed objects, for a class or all; errors by detected class."""
    here = judged.label >= 0 if label is None else judged.label == label
    objects = judged.object_label >= 0 if label is None else judged.object_label == label
    counts = {name: int((here & (judged.kind == kind)).sum()) for name, kind in KINDS.items()}
    return {"objects": int(objects.sum()), **counts, "missed": int((objects & judged.missed).sum())}


def gains(after: list[float | None], before: list[float | None]) -> list[float | None]:
    """Differences by class; None for a class without objects."""
    return [None if b is None else a - b for a, b in zip(after, before)]


def mean(values: list[float | None]) -> float | None:
    """The mean over classes that have objects."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def confusion_matrix(judged: Judged, score_thr: float) -> np.ndarray:
    """(K + 1, K + 1) counts of objects by their class (row) and the class that they were detected as (column).

    Detections with `score_thr` or more, best first, take the free object that they overlap most, if the IoU is 0.5 or
    more. The last row counts detections that take no object, the last column objects that no detection takes.
    """
    k = judged.num_classes
    matrix = np.zeros((k + 1, k + 1), dtype=int)
    images = np.union1d(judged.image, judged.object_image)
    ends, object_ends = (np.searchsorted(each, [*images, np.inf]) for each in (judged.image, judged.object_image))
    for i in range(len(images)):
        own = np.arange(ends[i], ends[i + 1])  # best first
        own = own[judged.score[own] >= score_thr]
        objects = np.arange(object_ends[i], object_ends[i + 1])
        overlap, free = iou(judged.box[own], judged.object_box[objects]), np.ones(len(objects), dtype=bool)
        for d, overlaps in zip(own, overlap):
            candidates = np.where(free, overlaps, 0)
            if len(objects) and candidates.max() >= FOREGROUND:
                free[candidates.argmax()] = False
                matrix[judged.object_label[objects[candidates.argmax()]], judged.label[d]] += 1
            else:
                matrix[k, judged.label[d]] += 1
        np.add.at(matrix, (judged.object_label[objects[free]], k), 1)
    return matrix
