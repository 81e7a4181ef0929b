"""What runs show: figures over seeds, gains over the student alone with a verdict, and costs."""
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, median, stdev

import torch

from data import DataConfig
from models import build_detector
from models.checkpoints.sources import file_hash, is_address

from ..evaluation.coco import AP_FIGURES
from ..evaluation.cost import count_flops, count_parameters, typical_size
from ..work_dir.records import RunRecord, group_runs, methods_of, read_run, setting, teacher_entries
from .verdict import CANNOT_TELL, Judgement, judge, paired_interval


@dataclass
class Row:
    """Runs that differ only in the seed. AP are fractions, from the last evaluation; None: not known."""

    name: str
    methods: str
    runs: list[RunRecord]
    figures: dict[str, tuple[float | None, float | None]]  # mean and standard deviation over seeds
    gain: float | None = None       # in AP over the student alone, mean over the seeds that both have
    interval: float | None = None   # half the width of its confidence interval, from two or more pairs of one seed
    teacher: float | None = None    # the teacher's AP
    gap_closed: float | None = None  # the gain as a share of the teacher's lead over the student alone, if that is sure
    verdict: Judgement | None = None     # on the gain over the student alone in the same number of epochs
    equal_time: Judgement | None = None  # over the shortest student alone that was trained for as long, or longer
    longer: float | None = None          # the time of that as a multiple of this setting's
    epochs_to_equal: float | None = None  # of the student alone, that take as long as this setting
    seconds: float | None = None    # of training, without evaluations, mean over seeds
    estimated: bool = False         # whether the seconds follow from images_per_second
    relative_cost: float | None = None  # time as a multiple of the student's alone, over the seeds that both have
    peak_memory: float | None = None    # bytes, see `peak_memory`, the most of all seeds
    step_flops: float | None = None  # see `step_flops`
    parameters: int | None = None
    flops: int | None = None        # of one image of data.scale
    images_per_second: float | None = None  # in training


def compare(runs: Sequence[RunRecord], known_teacher: float | None = None) -> list[Row]:
    """A row for every setting among the runs that have been evaluated, in the order of the first run of each.

    `known_teacher` is the AP of teachers for which no run has it.
    """
    groups = group_runs([run for run in runs if run.evaluations])
    rows = [Row(name, methods_of(members[0].config), members,
                {figure: over_seeds([run.evaluations[-1].get(figure) for run in members]) for figure in AP_FIGURES},
                images_per_second=speed(members)) for name, members in groups.items()]
    for row in rows:
        judge_costs(row)
    alone = {setting(row.runs[0].config): row for row in rows
             if row.runs[0].config is not None and row.runs[0].finished and not row.methods}
    for row in rows:
        config = row.runs[0].config
        if config is None:
            continue
        scale = tuple((config.get("data") or {}).get("scale", DataConfig.scale))
        row.parameters, row.flops = cost(json.dumps(config["model"]), scale)
        row.step_flops = step_flops(row.runs[0], scale)
        if row.methods and row.runs[0].finished:
            row.teacher = teacher_ap(row.runs[0], runs)
            row.teacher = known_teacher if row.teacher is None else row.teacher
            judge_gain(row, alone.get(setting(config, distilled=False)))
            judge_time(row, alone)
        elif row.methods:
            row.verdict = Judgement(CANNOT_TELL, "training has not ended")
    return rows


def over_seeds(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and, for two or more values, the sample's standard deviation."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None, stdev(known) if len(known) > 1 else None


def speed(runs: Sequence[RunRecord]) -> float | None:
    """The median of images per second in training, because first steps are slow and a machine may be shared."""
    lines = [line["images_per_second"] for run in runs for line in run.steps if "images_per_second" in line]
    return median(lines) if lines else None


def judge_gain(row: Row, alone: Row | None) -> None:
    """Fill in the gain over the student alone, by pairs of one seed, the verdict, the relative cost, and the share of
    the gap to the teacher. The share is left out if the interval of the student's own AP is as wide as the gap."""
    pairs = pairs_of(row, alone)
    if not pairs:
        row.verdict = Judgement(CANNOT_TELL, "no run of the student alone with the same settings and seed")
        return
    row.verdict = judge([after - before for before, after in pairs], alone.name)
    row.gain, row.interval = row.verdict.gain, row.verdict.interval
    times = times_of(row, alone)
    if times is not None:
        row.relative_cost = times[0] / times[1]
        row.epochs_to_equal = row.relative_cost * alone.runs[0].done
    student, uncertainty = paired_interval([before for before, _ in pairs])
    gap = None if row.teacher is None else row.teacher - student
    if gap is not None and uncertainty is not None and gap > uncertainty:
        row.gap_closed = row.gain / gap


def judge_time(row: Row, alone: dict[str, Row]) -> None:
    """Fill in the verdict over the student alone at equal time, if one of the runs of it took long enough."""
    kind, found = setting(row.runs[0].config, distilled=False, length=False), []
    for other in alone.values():
        times = times_of(row, other)
        if (times is not None and times[1] >= times[0] and other.runs[0].done >= row.runs[0].done and
                setting(other.runs[0].config, length=False) == kind):
            found.append((times[1] / times[0], other))
    if found:
        row.longer, shortest = min(found, key=lambda each: each[0])
        if pairs := pairs_of(row, shortest):
            row.equal_time = judge([after - before for before, after in pairs], shortest.name)


def pairs_of(row: Row, alone: Row | None) -> list[tuple[float, float]]:
    """The last AP of the student alone and of this setting, for every seed that both have."""
    if alone is None:
        return []
    own, base = ({run.seed: run.evaluations[-1]["AP"] for run in each.runs} for each in (row, alone))
    return [(base[seed], own[seed]) for seed in own if seed in base and None not in (own[seed], base[seed])]


def times_of(row: Row, alone: Row) -> tuple[float, float] | None:
    """The mean seconds of this setting and of the student alone, over the seeds that both have.

    None if a time is not known, or if they are of different machines, which cannot be compared.
    """
    own, base = ({run.seed: run for run in each.runs} for each in (row, alone))
    pairs = [(own[seed], base[seed]) for seed in own if seed in base]
    times = [(seconds_of(mine)[0], seconds_of(theirs)[0]) for mine, theirs in pairs]
    if not times or any(not seconds for pair in times for seconds in pair):
        return None
    if any(machine_of(mine) != machine_of(theirs) for mine, theirs in pairs):
        return None
    return mean(mine for mine, _ in times), mean(theirs for _, theirs in times)


def seconds_of(run: RunRecord) -> tuple[float | None, bool]:
    """The seconds of training, and whether they are estimated."""
    known = run.training_seconds
    return (run.estimated_seconds, True) if known is None else (known, False)


def machine_of(run: RunRecord) -> dict:
    return {"processes": 1} | run.machine


def judge_costs(row: Row) -> None:
    """Fill in the time and the memory of training."""
    times = [seconds_of(run) for run in row.runs]
    if all(seconds is not None for seconds, _ in times):
        row.seconds, row.estimated = mean(seconds for seconds, _ in times), any(guess for _, guess in times)
    row.peak_memory = max((peak for run in row.runs
                           if (peak := run.evaluations[-1].get("peak_memory_bytes")) is not None), default=None)


def step_flops(run: RunRecord, scale: tuple[int, int]) -> float | None:
    """Rough floating-point operations of an optimiser step on images of `scale`, without losses and methods.

    The student counts three times, as its backward pass takes twice its forward pass; a teacher only runs forward.
    None if it is not recorded what a teacher is built from.
    """
    entries = teacher_entries(run.config)
    models = run.teacher_models or [entry.get("model") for entry in entries]
    if len(models) != len(entries) or not all(models):
        return None
    classes = run.config["model"]["head"].get("num_classes")
    teachers = [model | {"head": {"num_classes": classes} | model["head"]} for model in models]
    images = 3 * cost(json.dumps(run.config["model"]), scale)[1] + sum(
        cost(json.dumps(model), scale)[1] for model in teachers)
    return images * run.images_per_step


def teacher_ap(run: RunRecord, runs: Sequence[RunRecord]) -> float | None:
    """AP of the teacher in its own run; for several teachers, the AP of the best one.

    The run is among `runs`, or in the folder of the checkpoint. If the file still exists, its SHA-256 must be that of
    the file that was distilled from. For a last.pth it is the last AP of the run, for a best.pth the best.
    """
    found = []
    for path, digest in run.teachers.items():
        if is_address(path):  # published by others, not measured in a run
            continue
        checkpoint = Path(path)
        places = [checkpoint, *(other.path / checkpoint.name for other in runs if other.config is not None)]
        for place in places:
            if place.is_file() and hash_of(place.resolve(), place.stat().st_mtime_ns) == digest:
                found.append(ap_of(place, run, runs))
                break
        else:  # if the file is gone, the run's records still have its AP
            found.append(None if checkpoint.exists() else ap_of(checkpoint, run, runs))
    return max((ap for ap in found if ap is not None), default=None)


def ap_of(checkpoint: Path, student: RunRecord, runs: Sequence[RunRecord]) -> float | None:
    """The AP that a checkpoint had when its run wrote it, on the images that its student was evaluated on."""
    folder = checkpoint.resolve().parent
    run = next((run for run in runs if run.path.resolve() == folder), None)
    if run is None and (folder / "metrics.jsonl").is_file():
        run = read_run(folder, folder / "metrics.jsonl")
    if run is None or (run.config is not None and run.config["data"]["val"] != student.config["data"]["val"]):
        return None
    known = [line["AP"] for line in run.evaluations if line["AP"] is not None]
    if not known or checkpoint.name not in ("last.pth", "best.pth"):
        return None
    return known[-1] if checkpoint.name == "last.pth" else max(known)


@cache
def hash_of(path: Path, changed: int) -> str:
    return file_hash(path)


@cache
def cost(model: str, scale: tuple[int, int]) -> tuple[int, int]:
    """Parameters and floating-point operations of a `model` section, as JSON, on one image of (long, short) edges."""
    with torch.device("meta"):
        detector = build_detector(json.loads(model), pretrained=False)
    return count_parameters(detector), count_flops(detector, typical_size(scale))
