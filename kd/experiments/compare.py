"""A table of runs: figures over seeds, gains over the student alone, and costs."""
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import torch

from data import DataConfig
from data.errors import listed
from data.output import write_text
from data.tables import csv_table, markdown_table, percent, points, text_table
from models import build_detector
from models.checkpoints.sources import file_hash, is_address

from ..evaluation.coco import AP_FIGURES
from ..evaluation.cost import count_flops, count_parameters, typical_size
from ..work_dir.records import RunRecord, group_runs, methods_of, read_run, setting

CONFIDENCE = 0.95


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
    gap_closed: float | None = None  # the gain as a share of the teacher's lead over the student alone
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
    alone = {setting(row.runs[0].config): row for row in rows
             if row.runs[0].config is not None and row.runs[0].finished and not row.methods}
    for row in rows:
        config = row.runs[0].config
        if config is None:
            continue
        row.parameters, row.flops = cost(json.dumps(config["model"]), tuple(
            (config.get("data") or {}).get("scale", DataConfig.scale)))
        if row.methods and row.runs[0].finished:
            row.teacher = teacher_ap(row.runs[0], runs)
            row.teacher = known_teacher if row.teacher is None else row.teacher
            judge_gain(row, alone.get(setting(config, distilled=False)))
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
    """Fill in the gain over the student alone, by pairs of one seed, and its share of the gap to the teacher."""
    if alone is None:
        return
    own, base = ({run.seed: run.evaluations[-1]["AP"] for run in each.runs} for each in (row, alone))
    pairs = [(base[seed], own[seed]) for seed in own if seed in base and None not in (own[seed], base[seed])]
    if not pairs:
        return
    row.gain, row.interval = paired_interval([after - before for before, after in pairs])
    gap = None if row.teacher is None else row.teacher - mean(before for before, _ in pairs)
    row.gap_closed = row.gain / gap if gap is not None and gap > 0 else None


def paired_interval(differences: Sequence[float]) -> tuple[float, float | None]:
    """Mean of paired differences, and half the width of its confidence interval by Student's t; None for only one."""
    n = len(differences)
    if n < 2:
        return mean(differences), None
    return mean(differences), t_quantile(n - 1) * stdev(differences) / math.sqrt(n)


@cache
def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The standard errors to either side that contain `confidence` of Student's t distribution.

    With t = sqrt(freedom) * tan(a), the density is proportional to cos(a) ** (freedom - 1), summed in fine steps.
    """
    edges = np.linspace(0, np.pi / 2, 1_000_001)
    share = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (freedom - 1))
    return float(np.sqrt(freedom) * np.tan(np.interp(confidence, share / share[-1], edges[1:])))


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


def with_deviation(value: float | None, deviation: float | None, signed: bool = False) -> str:
    return points(value, signed) + (f" ± {100 * deviation:.1f}" if deviation is not None else "")


def format_rows(rows: Sequence[Row], markdown: bool = False) -> str:
    """The table for people, AP in points."""
    header = ["run", "methods", "seeds", *AP_FIGURES, "gain", "gap closed", "parameters (M)", "GFLOPs",
              "training images/s"]
    cells = [[row.name, row.methods or "-", ", ".join(str(run.seed) for run in row.runs),
              *(with_deviation(*row.figures[name]) for name in AP_FIGURES),
              with_deviation(row.gain, row.interval, signed=True), percent(row.gap_closed),
              "-" if row.parameters is None else f"{row.parameters / 1e6:.2f}",
              "-" if row.flops is None else f"{row.flops / 1e9:.2f}",
              "-" if row.images_per_second is None else f"{row.images_per_second:.1f}"] for row in rows]
    return (markdown_table if markdown else text_table)(header, cells)


def explain(rows: Sequence[Row]) -> str:
    """The meaning of those columns that the table has."""
    lines = ["AP in points at the last evaluation; ± of AP: standard deviation over the seeds."]
    if any(row.gain is not None for row in rows):
        lines.append(f"gain: over the student alone, by pairs of one seed; ±: its {100 * CONFIDENCE:.0f}% confidence "
                     "interval (Student's t).")
    single = [row.name for row in rows if row.gain is not None and row.interval is None]
    if single:
        lines.append(f"CAUTION: only one pair of runs is behind the gain of {listed(single, ', ')}. Another seed alone "
                     "often changes AP by a point or more: train more seeds (scripts/sweep.py --seeds) before you "
                     "trust the gain and the gap closed.")
    return "\n".join(lines)


def rows_to_csv(rows: Sequence[Row]) -> str:
    """The table for programs: AP as fractions, deviations in their own columns, and unknown values empty."""
    header = ["run", "methods", "seeds", *(name for figure in AP_FIGURES for name in (figure, f"{figure}_deviation")),
              "gain", "gain_interval", "teacher_AP", "gap_closed", "parameters", "flops", "images_per_second"]
    cells = [[row.name, row.methods, " ".join(str(run.seed) for run in row.runs),
              *(value for name in AP_FIGURES for value in row.figures[name]), row.gain, row.interval, row.teacher,
              row.gap_closed, row.parameters, row.flops, row.images_per_second] for row in rows]
    return csv_table(header, [["" if cell is None else str(cell) for cell in row] for row in cells])


def save_rows(rows: Sequence[Row], out: Path) -> None:
    """Write the table: as CSV to a .csv file, as markdown to any other."""
    text = rows_to_csv(rows) if out.suffix == ".csv" else f"{format_rows(rows, markdown=True)}\n\n{explain(rows)}"
    write_text(out, text + "\n")
