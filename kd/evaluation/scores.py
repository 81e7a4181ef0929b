"""What a detector's scores are worth: precision and recall over the score, the best lowest score of each class, and
whether a score says how often such a detection is right. All at IoU 0.5, with the matches of COCO's evaluation."""
from dataclasses import dataclass

import numpy as np

from ..inference.thresholds import Threshold
from .tide import CORRECT, Judged

BINS = 15  # as in Guo et al.


@dataclass
class ScoreCurve:
    """Detections of one class with a score or more, for every score that occurs (n,), the highest first."""

    score: np.ndarray
    boxes: np.ndarray    # number of detections
    correct: np.ndarray  # number of these that are right
    objects: int         # number of the class's objects

    @property
    def precision(self) -> np.ndarray:
        return self.correct / self.boxes

    @property
    def recall(self) -> np.ndarray:
        """Zeros without objects, of which none is found."""
        return self.correct / max(self.objects, 1)

    @property
    def f1(self) -> np.ndarray:
        """The harmonic mean of precision and recall."""
        return 2 * self.correct / (self.boxes + self.objects)


def score_curve(judged: Judged, label: int) -> ScoreCurve:
    """The curve of one class. Matches are made from the best score down, so a lowest score does not change those above
    it."""
    here = judged.label == label
    order = np.argsort(-judged.score[here], kind="stable")
    score, right = judged.score[here][order], (judged.kind[here] == CORRECT)[order]
    last = np.flatnonzero(np.append(np.diff(score) != 0, True)[:len(score)])  # equal scores come together or not at all
    return ScoreCurve(score[last], last + 1, np.cumsum(right)[last], int((judged.object_label == label).sum()))


def choose_threshold(curve: ScoreCurve, precision: float | None = None) -> Threshold:
    """The score with the highest F1, of equals the highest; or the lowest score with at least a precision.

    There is none if no detection is right, or if the precision is not reached.
    """
    good = curve.correct > 0 if precision is None else (curve.precision >= precision) & (curve.correct > 0)
    if not good.any():
        return Threshold(None, None, None if curve.objects == 0 else 0.0, 0, curve.objects)
    i = int(np.argmax(curve.f1)) if precision is None else int(np.flatnonzero(good)[-1])
    return Threshold(float(curve.score[i]), float(curve.precision[i]), float(curve.recall[i]), int(curve.boxes[i]),
                     curve.objects)


def choose_thresholds(judged: Judged, precision: float | None = None) -> list[Threshold]:
    """A threshold for every class, see `choose_threshold`."""
    return [choose_threshold(score_curve(judged, k), precision) for k in range(judged.num_classes)]


@dataclass
class Reliability:
    """Detections in bins of equal width of the score, and how far their scores are from their precision.

    Lists have an entry for each bin, from the lowest scores to the highest.
    """

    count: np.ndarray      # (BINS,) number of detections
    score: np.ndarray      # (BINS,) their mean score; NaN in an empty bin
    precision: np.ndarray  # (BINS,) share of them that are right; NaN in an empty bin

    @property
    def detections(self) -> int:
        return int(self.count.sum())

    def mean(self, values: np.ndarray) -> float | None:
        """The mean over all detections of a value by bin; None without detections."""
        return float((np.nan_to_num(values) * self.count).sum() / self.detections) if self.detections else None

    @property
    def ece(self) -> float | None:
        """The expected calibration error; None without detections."""
        return self.mean(np.abs(self.score - self.precision))


def reliability(judged: Judged, label: int | None = None, floor: float = 0.3, bins: int = BINS) -> Reliability:
    """Scores and precisions of the detections of one class, or of all classes together.

    The expected calibration error (ECE) is the mean of |precision - mean score| over bins, each weighted with its share
    of the detections (Guo et al., arXiv:1706.04599, eq. 3). Bin m of M holds the scores in ((m - 1) / M, m / M]. For
    detectors, precision takes the place of accuracy: a detection is right if it finds an object of its class (the D-ECE
    of Küppers et al., arXiv:2004.13546, with bins of the score alone).

    Args:
        floor: detections with lower scores are left out: a detector has thousands of them, nearly all wrong.
    """
    here = judged.score >= floor
    if label is not None:
        here &= judged.label == label
    score, right = judged.score[here], judged.kind[here] == CORRECT
    place = np.clip(np.ceil(score * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Reliability(count, np.bincount(place, score, bins) / count, np.bincount(place, right, bins) / count)
