"""Error analysis of one detector, or of two side by side: where each loses AP, where one is better, which lowest scores
suit each class, and how reliable the scores are."""
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data import CocoDataset, DataError
from data.coco.annotations import SIZES
from data.errors import counted
from data.output import write_text
from data.tables import markdown_table, points, text_table

from ..config import Config
from ..inference.detectors import load_with_data
from ..inference.thresholds import rule_of, write_thresholds
from .coco import Evaluation, coco_evaluation, mean_precision
from .evaluate import detect_views
from .scores import BINS, Reliability, choose_thresholds, reliability
from .tide import CORRECT, ERRORS, Judged, ap50, confusion_matrix, count_errors, judge, lost_ap, mean


@dataclass
class Analysis:
    """The errors of one detector on a data set. Lists have an entry for each class, None without objects."""

    name: str
    classes: list[str]
    ap: list[float | None]             # COCO's AP per class
    ap50: list[float | None]
    lost: dict[str, list[float | None]]  # AP50 that each type of error costs, per class
    by_size: dict[str, list[float | None]]  # AP per class of small, medium and large objects
    confusion: np.ndarray              # (K + 1, K + 1), see `confusion_matrix`
    judged: Judged
    annotations: Path                  # the file with the objects
    checkpoint: str = ""


def analyze(cfgs: Sequence[Config], checkpoints: Sequence[str], device: torch.device,
            score_thr: float = 0.3) -> list[Analysis]:
    """Evaluate checkpoints on data.val and sort their errors.

    Args:
        cfgs: a configuration for each checkpoint; their data.val must be the same.
        score_thr: detections with lower scores are left out of the confusion matrix.
    Raises:
        ConfigError, DataError, CheckpointError: bad input.
    """
    found, first = [], None
    for cfg, checkpoint, name in zip(cfgs, checkpoints, names_of(checkpoints)):
        detector, dataset = load_with_data(cfg, checkpoint, device)
        first = first or dataset
        if (dataset.annotation_file, dataset.image_ids) != (first.annotation_file, first.image_ids):
            raise DataError(f"data.val is {first.annotation_file} with {counted(len(first), 'image')} in one "
                            f"configuration and {dataset.annotation_file} with {len(dataset)} in another: "
                            "compare on the same images")
        evaluation = coco_evaluation(detect_views(detector, cfg, dataset, device), dataset, fast=False,
                                     matches=True)
        found.append(replace(analyze_evaluation(name, evaluation, dataset, score_thr), checkpoint=checkpoint))
    return found


def analyze_evaluation(name: str, evaluation: Evaluation, dataset: CocoDataset, score_thr: float = 0.3) -> Analysis:
    """The analysis of detections that pycocotools has evaluated."""
    judged, classes = judge(evaluation), range(dataset.num_classes)
    precision = evaluation.precision[:, :, :, :, -1]  # IoU threshold, recall, class, area: all and the sizes
    by_size = {size: [mean_precision(precision[:, :, k, a]) for k in classes] for a, size in enumerate(SIZES, start=1)}
    return Analysis(name, dataset.classes, [mean_precision(precision[:, :, k, 0]) for k in classes], ap50(judged),
                    lost_ap(judged), by_size, confusion_matrix(judged, score_thr), judged, dataset.annotation_file)


def names_of(paths: Sequence[str]) -> list[str]:
    """A short name for each checkpoint: its file's, or its folder's if the file is a run's last.pth or best.pth."""
    names = []
    for path in map(Path, paths):
        own = path.parent.name if path.stem in ("last", "best") and path.parent.name else path.stem
        names.append(own if own not in names else f"{path.parent.name}/{path.name}")
    return [name if name not in names[:i] else f"{name} ({i + 1})" for i, name in enumerate(names)]


Table = tuple[str, list[str], list[list[str]]]  # title, header, rows


def tables(found: Sequence[Analysis], score_thr: float = 0.3, precision: float | None = None) -> list[Table]:
    """The analysis as tables; for two detectors, with the difference of the second from the first.

    Args:
        precision: lowest scores are those that reach it, see `choose_threshold`; by default those with the best F1.
    """
    by_size = [{"AP": each.ap, "AP50": each.ap50, **each.by_size} for each in found]
    by_error = [{"AP50": each.ap50, **each.lost} for each in found]
    result = [points_table("AP, and by size of object", found, by_size),
              points_table("AP50, and what it would gain without the errors of one kind", found, by_error),
              count_table(found)]
    if len(found) == 2:
        result.append(found_table(found, score_thr))
    result += [threshold_table(found, precision), reliability_table(found, score_thr)]
    return result + [confusion_table(each, score_thr) for each in found]


def with_difference(name: str, values: Sequence[Sequence[float | None]], names: Sequence[str]) -> list[list[str]]:
    """A row of points for each detector and, if there are two, a row of their difference."""
    rows = [[name if i == 0 else "", label, *map(points, row)] for i, (label, row) in enumerate(zip(names, values))]
    if len(values) == 2:
        rows.append(["", "difference", *(points(None if None in pair else pair[1] - pair[0], signed=True)
                                         for pair in zip(*values))])
    return rows


def groups(classes: Sequence[str]) -> list[tuple[int | None, str]]:
    """The label and name of every row of a table: of all classes together, if there are several, and of each class."""
    return [(None, "all")] * (len(classes) > 1) + list(enumerate(classes))


def points_table(title: str, found: Sequence[Analysis], columns: Sequence[dict[str, list[float | None]]]) -> Table:
    """A table of values in points: the mean over classes, and each class. `columns` has each detector's, by header."""
    rows, names = [], [each.name for each in found]
    for k, name in groups(found[0].classes):
        rows += with_difference(name, [[mean(values) if k is None else values[k] for values in own.values()]
                                       for own in columns], names)
    return title, ["class", "model", *columns[0]], rows


def count_table(found: Sequence[Analysis]) -> Table:
    """Numbers of errors: detections by their predicted class, and missed objects."""
    rows = []
    for k, name in groups(found[0].classes):
        for i, each in enumerate(found):
            counts = count_errors(each.judged, k)
            rows.append([name if i == 0 else "", each.name, *(str(counts[kind]) for kind in ("objects", *ERRORS))])
    return "How many errors there are, whatever their score", ["class", "model", "objects", *ERRORS], rows


def found_table(found: Sequence[Analysis], score_thr: float) -> Table:
    """The numbers of objects that both detectors, only one of them, or none find, by class and size."""
    own, other = (found_from(each.judged, score_thr) for each in found)
    judged, rows = found[0].judged, []
    for k, name in groups(found[0].classes):
        for size, (low, high) in {"all": (0, float("inf")), **SIZES}.items():
            here = (judged.object_area >= low) & (judged.object_area < high)
            here &= True if k is None else judged.object_label == k
            counts = [here, here & own & other, here & own & ~other, here & ~own & other, here & ~own & ~other]
            if here.any():
                rows.append([name, size, *(str(int(count.sum())) for count in counts)])
    title = f"Objects found (IoU 0.5, score {score_thr:g} or more)"
    return title, ["class", "size", "objects", "both", *(f"only {each.name}" for each in found), "none"], rows


def found_from(judged: Judged, score_thr: float) -> np.ndarray:
    """(G,) bool: the objects that a detection with at least this score finds."""
    finders = (judged.kind == CORRECT) & (judged.score >= score_thr)
    return np.isin(np.arange(len(judged.object_label)), judged.object[finders])


def threshold_table(found: Sequence[Analysis], precision: float | None) -> Table:
    """The lowest score that suits each class, and what is found with it; dashes where there is none."""
    chosen, rows = [choose_thresholds(each.judged, precision) for each in found], []
    for k, name in enumerate(found[0].classes):
        for i, each in enumerate(found):
            at = chosen[i][k]
            score = ("none" if precision is None else "not reached") if at.score is None else f"{at.score:.3f}"
            rows.append([name if i == 0 else "", each.name, score, points(at.precision), points(at.recall),
                         str(at.boxes), str(at.objects)])
    header = ["class", "model", "lowest score", "precision", "recall", "boxes", "objects"]
    return f"Lowest score of each class: {rule_of(precision)} (IoU 0.5)", header, rows


def reliability_table(found: Sequence[Analysis], score_thr: float) -> Table:
    """Mean score, precision and expected calibration error of the detections, in points, see `reliability`."""
    rows, names = [], [each.name for each in found]
    for k, name in groups(found[0].classes):
        own = [reliability(each.judged, k, score_thr) for each in found]
        shown = with_difference(name, [[one.mean(one.score), one.mean(one.precision), one.ece] for one in own], names)
        counts = [str(one.detections) for one in own] + [""] * (len(shown) - len(own))
        rows += [[*row[:2], count, *row[2:]] for row, count in zip(shown, counts)]
    title = f"Reliability of scores of {score_thr:g} or more (IoU 0.5, {BINS} bins)"
    return title, ["class", "model", "detections", "mean score", "precision", "ECE"], rows


def confusion_table(each: Analysis, score_thr: float) -> Table:
    rows = [[name, *map(str, row)] for name, row in zip([*each.classes, "(background)"], each.confusion.tolist())]
    rows[-1][-1] = ""
    title = f"{each.name}: objects (rows) taken for (columns), score {score_thr:g} or more"
    return title, ["object", *each.classes, "(missed)"], rows


def format_tables(found: Sequence[Analysis], score_thr: float = 0.3, markdown: bool = False,
                  precision: float | None = None) -> str:
    """All tables as text or as markdown, in points and counts."""
    make, heading = (markdown_table, "## ") if markdown else (text_table, "")
    gap = "\n\n" if markdown else "\n"
    return "\n\n".join(f"{heading}{title}{gap}{make(header, rows)}"
                       for title, header, rows in tables(found, score_thr, precision))


def save_analysis(found: Sequence[Analysis], out: Path, score_thr: float = 0.3, precision: float | None = None
                  ) -> list[Path]:
    """Write analysis.md, analysis.json with AP as fractions, and each detector's lowest scores into a folder.

    Returns:
        The files. The scores of a single detector are in thresholds.json, those of two in thresholds_NAME.json.
    """
    files = [out / "analysis.md", out / "analysis.json"]
    write_text(files[0], format_tables(found, score_thr, markdown=True, precision=precision) + "\n")
    content = [{"name": each.name, "classes": each.classes, "AP": each.ap, "AP50": each.ap50, "lost": each.lost,
                "errors": [count_errors(each.judged, k) for k in range(len(each.classes))], "AP_by_size": each.by_size,
                "confusion": each.confusion.tolist(), "score_thr": score_thr,
                "reliability": record(reliability(each.judged, None, score_thr)) | {"per_class": {
                    name: record(reliability(each.judged, k, score_thr)) for k, name in enumerate(each.classes)}}}
               for each in found]
    write_text(files[1], json.dumps(content, indent=1))
    for each in found:
        own = "" if len(found) == 1 else "_" + re.sub(r"[^\w.-]+", "_", each.name)
        files.append(out / f"thresholds{own}.json")
        write_thresholds(files[-1], each.classes, choose_thresholds(each.judged, precision), precision, each.checkpoint,
                         each.annotations)
    return files


def record(own: Reliability) -> dict:
    """A reliability for JSON, as fractions, and None where there are no detections."""
    return {"detections": own.detections, "ECE": own.ece, "score": own.mean(own.score),
            "precision": own.mean(own.precision)}
