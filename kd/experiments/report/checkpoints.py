"""What only the checkpoints of runs can tell: errors, precision over recall, and detections on single images."""
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from data import CocoDataset, DataError
from data.tables import points
from models import ConfigError
from models.weights import CheckpointError

from ...build import teacher_model
from ...config import Config, parse_config
from ...evaluation.analyze import Analysis, analyze_evaluation
from ...evaluation.coco import coco_evaluation, precision_recall
from ...evaluation.evaluate import detect_views
from ...evaluation.tide import ERRORS, mean
from ...inference.detectors import load_with_data
from ...work_dir.records import RunRecord, is_number, read_json
from ..compare import Row, judge_gain

SAME = 0.005  # difference in AP up to which a checkpoint is taken for that of the record; processors round differently
WRONG = (ConfigError, DataError, CheckpointError)

log = logging.getLogger("densekd")


@dataclass
class Measured:
    """A detector on the images of its data.val."""

    name: str
    analysis: Analysis
    curves: dict  # of `precision_recall`
    dataset: CocoDataset


@dataclass
class Evidence:
    """What is known beyond the records of runs. Runs are named by their paths."""

    measured: dict[Path, Measured] = field(default_factory=dict)
    teachers: dict[Path, Measured] = field(default_factory=dict)  # of the run that was distilled
    errors: dict[Path, dict[str, float | None]] = field(default_factory=dict)  # see `errors_of`
    notes: list[str] = field(default_factory=list)                # what could not be had, and why


def checkpoint_of(run: RunRecord) -> Path | None:
    """The run's last.pth, otherwise its best.pth."""
    return next((path for name in ("last.pth", "best.pth") if (path := run.path / name).is_file()), None)


def measure(rows: Sequence[Row], device: torch.device, score_thr: float) -> Evidence:
    """Evaluate the checkpoint of each run on data.val, and the teacher of each distilled setting, whose AP is filled in
    where it was not known.

    What does not work for one run is a note, and the others go on.
    Raises:
        DataError: no run has a checkpoint.
    """
    runs = [run for row in rows for run in row.runs if run.config is not None]
    if not any(checkpoint_of(run) for run in runs):
        raise DataError("--analyze: none of the runs has a last.pth or best.pth: give work dirs that still hold them, "
                        "or leave out --analyze")
    found, teachers = Evidence(), {}
    for run in runs:
        path = checkpoint_of(run)
        if path is None:
            found.notes.append(f"{run.name} has no checkpoint.")
            continue
        log.info(f"evaluating {path}")
        try:
            one = measure_one(run.name, plain_config(run), path, device, score_thr)
        except WRONG as error:
            found.notes.append(f"{run.name}: {error}.")
            continue
        found.measured[run.path], found.errors[run.path] = one, errors_of(one.analysis)
        recorded, now = run.evaluations[-1]["AP"], mean(one.analysis.ap)
        if recorded is not None and now is not None and abs(recorded - now) > SAME:
            found.notes.append(f"{path} has an AP of {points(now)} now, and {points(recorded)} in the last line of the "
                               "records: the checkpoint or the data are others.")
    for row in rows:
        run = next((run for run in row.runs if run.path in found.measured), None)
        if row.methods and run is not None:
            add_teacher(found, run, teachers, device, score_thr)
            if row.teacher is None and run.path in found.teachers:
                row.teacher = mean(found.teachers[run.path].analysis.ap)
                if row.gain is not None:  # now the share of the gap is known
                    judge_gain(row, next(other for other in rows if other.name == row.verdict.baseline))
    return found


def plain_config(run: RunRecord) -> Config:
    """The run's configuration without what only training needs."""
    return parse_config({key: run.config[key] for key in ("model", "data", "eval") if key in run.config})


def measure_one(name: str, cfg: Config, checkpoint: Path | str, device: torch.device, score_thr: float,
                part: str | None = None) -> Measured:
    """Raises as `load_with_data`."""
    detector, dataset = load_with_data(cfg, checkpoint, device, part)
    evaluation = coco_evaluation(detect_views(detector, cfg, dataset, device), dataset, fast=False,
                                 matches=True)
    return Measured(name, analyze_evaluation(name, evaluation, dataset, score_thr),
                    precision_recall(evaluation, dataset), dataset)


def add_teacher(found: Evidence, run: RunRecord, known: dict[str, Measured | None], device: torch.device,
                score_thr: float) -> None:
    """Evaluate the first teacher of a run on the run's data.val, unless it is `known` by its source."""
    cfg = parse_config(run.config)
    entry = cfg.teachers[0]
    if entry.features_only or entry.checkpoint is None or None in (entry.class_map or ()):
        found.notes.append(f"The teacher of {run.name} is not drawn: it does not detect all classes by itself.")
        return
    if entry.source not in known:
        known[entry.source] = None
        log.info(f"evaluating the teacher {entry.source}")
        try:
            model = asdict(teacher_model(entry)) | ((run.teacher_models or [None])[0] or {})
            if entry.class_map is None:
                model["head"] = {"num_classes": cfg.model.head.get("num_classes")} | model["head"]
            own = plain_config(run) | {"model": model}
            own["eval"] = dict(own.get("eval") or {}) | {"class_map": entry.class_map}
            known[entry.source] = measure_one("the teacher", parse_config(own), entry.source, device, score_thr,
                                              entry.part)
        except WRONG as error:
            found.notes.append(f"The teacher of {run.name}: {error}.")
    if known[entry.source] is not None:
        found.teachers[run.path] = known[entry.source]


def errors_of(analysis: Analysis) -> dict[str, float | None]:
    """AP50, and what each kind of error costs of it: means over the classes, as fractions."""
    return {"AP50": mean(analysis.ap50)} | {kind: mean(analysis.lost[kind]) for kind in ERRORS}


def stored_errors(run: RunRecord) -> dict[str, float | None] | None:
    """`errors_of`, from the analysis.json that `analyze.py --out` has left in a work dir; None if there is none.

    Raises:
        DataError: it is not of the run's last evaluation, or of another kind.
    """
    path, advice = run.path / "analysis.json", "analyze.py --out writes it again"
    if not path.is_file():
        return None
    content = read_json(path, advice, list)
    try:
        one, = content
        own, aps = {"AP50": one["AP50"], **{kind: one["lost"][kind] for kind in ERRORS}}, dict(
            zip(one["classes"], one["AP"]))
        right = all(value is None or is_number(value) for values in (*own.values(), aps.values()) for value in values)
    except (TypeError, KeyError, ValueError, AttributeError):
        right = False
    if not right:
        raise DataError(f"{path} is not the analysis of one detector: {advice}")
    recorded = run.evaluations[-1].get("per_class") or {}
    if aps.keys() != recorded.keys() or any((aps[name] is None) != (recorded[name] is None) or abs(
            (aps[name] or 0) - (recorded[name] or 0)) > SAME for name in aps):
        raise DataError(f"{path} is not of the run's last evaluation: {advice}")
    return {name: mean(values) for name, values in own.items()}
