"""The lowest scores of a detector's classes, as `analyze.py` chooses them and `predict.py` and `export.py` take them.

This module needs no PyTorch, so that a damaged file is found before it is imported.
"""
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data.errors import DataError, counted, listed, one_line, shown
from data.names import folded
from data.output import write_text

ADVICE = "analyze.py --out writes such a file"


@dataclass
class Threshold:
    """A class's chosen score, and what its detections with this score or more are at IoU 0.5.

    `score` is None for a class without a score to choose; the other values are then those of no detection.
    """

    score: float | None
    precision: float | None  # share of these detections that are right
    recall: float | None     # share of the class's objects that they find; None without objects
    boxes: int               # number of these detections
    objects: int             # number of the class's objects


def rule_of(precision: float | None) -> str:
    """How scores were chosen, in words."""
    return "the best F1" if precision is None else f"precision {precision:g} or more, with the lowest score"


def write_thresholds(path: Path, classes: Sequence[str], found: Sequence[Threshold], precision: float | None,
                     checkpoint: str, annotations: Path) -> None:
    """Write a file for `read_thresholds`.

    Args:
        found: a threshold for each class.
        precision: the precision that was asked for; None for the best F1.
        checkpoint, annotations: what the scores were chosen with, for people.
    """
    content = {"chosen_by": rule_of(precision), "iou": 0.5, "checkpoint": str(checkpoint),
               "annotations": str(annotations),
               "classes": {name: asdict(each) for name, each in zip(classes, found)}}
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_thresholds(path: Path) -> dict[str, float | None]:
    """The score of each class in a file, by the class's name; None for a class without one.

    Raises DataError, one line, if the file does not exist, cannot be read, or holds anything else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or one_line(error)}): {ADVICE}") from None
    except (ValueError, RecursionError) as error:  # also for text that is not UTF-8
        raise DataError(f"{path} cannot be read ({one_line(error)}): {ADVICE}") from None
    classes = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(classes, dict) or not classes:
        raise DataError(f"{path} holds no scores of classes: {ADVICE}")
    for name, entry in classes.items():
        if not isinstance(entry, dict) or "score" not in entry:
            raise DataError(f"{path} holds no score of {one_line(name, 60)}: {ADVICE}")
        score = entry["score"]
        if score is not None and (isinstance(score, bool) or not isinstance(score, (int, float))
                                  or not 0 <= score <= 1):  # also for NaN
            raise DataError(f"{path}: the score of {one_line(name, 60)} must be from 0 to 1 or null, not "
                            f"{shown(score)}: {ADVICE}")
    return {name: entry["score"] for name, entry in classes.items()}


def scores_for(path: Path, scores: dict[str, float | None], classes: Sequence[str]) -> list[float | None]:
    """The scores that `read_thresholds` has read, in the order of a detector's classes; the file's order is free.

    Names that differ only in case, spaces, `-` and `_` are the same, if they are so for one class only.
    Raises DataError, one line, if the file has other classes than the detector.
    """
    times, given = Counter(map(folded, scores)), Counter(map(folded, classes))
    alike = {folded(name): score for name, score in scores.items() if times[folded(name)] == given[folded(name)] == 1}
    found = [scores.get(name, alike.get(folded(name), "missing")) for name in classes]
    if "missing" in found or len(found) != len(scores):
        def said(names: Sequence[str]) -> str:
            return f"{counted(len(names), 'class')} ({listed([one_line(name, 60) for name in names], ', ')})"
        raise DataError(f"{path} is for {said(list(scores))}, and the detector has {said(classes)}: choose the scores "
                        "with this detector's checkpoint (analyze.py --out)")
    return found


def load_thresholds(path: Path, classes: Sequence[str]) -> list[float | None]:
    """The lowest score of each of a detector's classes, from a file; None for a class without one, whose detections
    are all left out. Raises DataError, one line, for a damaged file or other classes."""
    return scores_for(path, read_thresholds(path), classes)
