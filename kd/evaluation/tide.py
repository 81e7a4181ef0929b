"""Why a detector loses AP: the error types of TIDE (Bolya et al., arXiv:2008.08115, section 2).

The cost of a type is how much AP at IoU 0.5 would rise if all errors of this type, and no others, were corrected.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask
from pycocotools.cocoeval import COCOeval

FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU from which an object counts as found; up to which it counts as not touched
CORRECT, CLASS, BOX, BOTH, DUPLICATE, NOTHING = range(6)
KINDS = {"classification": CLASS, "localisation": BOX, "both": BOTH, "duplicate": DUPLICATE, "background": NOTHING}
ERRORS = (*KINDS, "missed")


@dataclass
class Judged:
    """All detections and objects of a data set, with their errors. Classes are numbered from 0."""

    num_classes: int
    image: np.ndarray    # (D,) number of its image; detections inside crowds of their class are left out
    box: np.ndarray      # (D, 4) x, y, width, height
    label: np.ndarray    # (D,)
    score: np.ndarray    # (D,)
    kind: np.ndarray     # (D,) CORRECT, or the type of its error
    object: np.ndarray   # (D,) the object that it finds, or that it alone would find if corrected; otherwise -1
    object_image: np.ndarray  # (G,) crowds are left out
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


def judge(evaluation: COCOeval) -> Judged:
    """Find every detection's type of error from pycocotools' matches of boxes at IoU 0.5, after its `evaluate()`."""
    params = evaluation.params
    at = int(np.abs(params.iouThrs - FOREGROUND).argmin())
    images, areas = len(params.imgIds), len(params.areaRng)
    detections, objects = [], []
    for i in range(images):
        place, own, theirs = {}, [], []  # the objects' numbers by annotation id, this image's detections and objects
        matched = [(k, evaluation.evalImgs[k * areas * images + i]) for k in range(len(params.catIds))]
        matched = [(k, match) for k, match in matched if match is not None]
        for k, match in matched:
            for annotation in (evaluation.cocoGt.anns[number] for number in match["gtIds"]):
                if not annotation["iscrowd"]:
                    place[annotation["id"]] = len(objects) + len(theirs)
                    theirs.append((i, k, *annotation["bbox"], annotation["area"]))
        for k, match in matched:
            for number, partner, ignored in zip(match["dtIds"], match["dtMatches"][at], match["dtIgnore"][at]):
                if not ignored:
                    found = evaluation.cocoDt.anns[number]
                    own.append((i, k, *found["bbox"], found["score"], place.get(int(partner), -1)))
        detections += judge_image(sorted(own, key=lambda row: -row[6]), theirs, len(objects))
        objects += theirs
    d, g = np.array(detections).reshape(-1, 9), np.array(objects).reshape(-1, 7)
    return Judged(len(params.catIds), d[:, 0].astype(int), d[:, 2:6], d[:, 1].astype(int), d[:, 6], d[:, 8].astype(int),
                  d[:, 7].astype(int), g[:, 0].astype(int), g[:, 2:6], g[:, 1].astype(int), g[:, 6])


def judge_image(detections: list[tuple], objects: list[tuple], first: int) -> list[tuple]:
    """One image's detections, best first, with their kinds.

    Args:
        detections: rows of image, label, box, score and the number of the object found, or -1.
        objects: rows of image, label, box and area, numbered from `first`.
    Returns:
        The rows, each with its kind. If a detection would find an object once its error is corrected, and no other
        detection finds it and no better one would, the row has the number of that object.
    """
    labels = np.array([row[1] for row in objects], dtype=int)
    taken = np.isin(np.arange(len(objects)) + first, [row[7] for row in detections])
    overlap = iou([row[2:6] for row in detections], [row[2:6] for row in objects])
    claimed, rows = set(), []
    for row, overlaps in zip(detections, overlap):
        kind, number = CORRECT, row[7]
        if number < 0:
            kind, index = kind_of_error(overlaps, labels == row[1], taken)
            if index >= 0 and not taken[index] and index not in claimed:
                claimed.add(index)
                number = first + index
        rows.append((*row[:7], number, kind))
    return rows


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


def iou(boxes: list, others: list) -> np.ndarray:
    """IoU (D, G) of boxes x, y, width, height, as pycocotools computes it."""
    if not boxes or not others:
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


def image_aps(evaluation: COCOeval, labels: Sequence[int]) -> dict[int, float]:
    """For each image with objects, by its number, the AP of its own detections: those of all these classes in one list,
    by score; the mean over the IoU thresholds. Averages of it compare two detectors image by image.
    """
    params = evaluation.params
    images, areas, found = len(params.imgIds), len(params.areaRng), {}
    for i, number in enumerate(params.imgIds):
        matches = [evaluation.evalImgs[k * areas * images + i] for k in labels]  # of objects of all sizes
        matches = [match for match in matches if match is not None]
        objects = sum(int((np.asarray(match["gtIgnore"]) == 0).sum()) for match in matches)
        if not objects:
            continue
        scores = np.concatenate([match["dtScores"] for match in matches])
        right, ignored = (np.concatenate([match[key] for match in matches], axis=1) > 0
                          for key in ("dtMatches", "dtIgnore"))
        found[number] = float(np.mean([average_precision(scores[~out], hit[~out], objects)
                                       for hit, out in zip(right, ignored)]))
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
    for i in np.union1d(judged.image, judged.object_image):
        own = np.flatnonzero((judged.image == i) & (judged.score >= score_thr))  # best first
        objects = np.flatnonzero(judged.object_image == i)
        overlap, free = iou(list(judged.box[own]), list(judged.object_box[objects])), np.ones(len(objects), dtype=bool)
        for d, overlaps in zip(own, overlap):
            candidates = np.where(free, overlaps, 0)
            if len(objects) and candidates.max() >= FOREGROUND:
                free[candidates.argmax()] = False
                matrix[judged.object_label[objects[candidates.argmax()]], judged.label[d]] += 1
            else:
                matrix[k, judged.label[d]] += 1
        np.add.at(matrix, (judged.object_label[objects[free]], k), 1)
    return matrix
