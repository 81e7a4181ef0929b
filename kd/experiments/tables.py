"""The table of runs as text, markdown and CSV, and the meaning of its columns."""
import math
from collections.abc import Sequence
from pathlib import Path

from data.errors import listed
from data.output import write_text
from data.tables import csv_table, markdown_table, percent, points, rounded, text_table

from ..evaluation.coco import AP_FIGURES
from .compare import Row
from .verdict import CANNOT_TELL, CONFIDENCE, DOES_NOT_PAY, MANY, PAYS


def with_deviation(value: float | None, deviation: float | None, signed: bool = False) -> str:
    return points(value, signed) + (f" ± {100 * deviation:.1f}" if deviation is not None else "")


def gap_text(share: float | None) -> str:
    """A share of the gap to the teacher, for example 37%; with more than 100% the student is above the teacher."""
    above = share is not None and rounded(100 * share) > 100
    return percent(share) + (" (above the teacher)" if above else "")


def hours_text(row: Row) -> str:
    if row.seconds is None:
        return "-"
    hours = row.seconds / 3600
    return (f"{hours:.1f}" if hours >= 10 else f"{hours:.3f}") + (" est." if row.estimated else "")


def number(value: float | None, unit: float, form: str = ".2f") -> str:
    return "-" if value is None else f"{value / unit:{form}}"


def format_rows(rows: Sequence[Row], markdown: bool = False) -> str:
    """The table for people, AP in points."""
    return (markdown_table if markdown else text_table)(*cells_of(rows))


def cells_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of that table."""
    header = ["run", "methods", "seeds", *AP_FIGURES, "gain", "verdict", "at equal time", "gap closed", "hours", "cost",
              "peak GiB", "parameters (M)", "GFLOPs", "GFLOPs of a step", "training images/s"]
    cells = [[row.name, row.methods or "-", ", ".join(str(run.seed) for run in row.runs),
              *(with_deviation(*row.figures[name]) for name in AP_FIGURES),
              with_deviation(row.gain, row.interval, signed=True), str(row.verdict or "-"), str(row.equal_time or "-"),
              gap_text(row.gap_closed), hours_text(row), number(row.relative_cost, 1),
              number(row.peak_memory, 2 ** 30), number(row.parameters, 1e6), number(row.flops, 1e9),
              number(row.step_flops, 1e9, ".1f"), number(row.images_per_second, 1, ".1f")] for row in rows]
    return header, cells


def explain(rows: Sequence[Row]) -> str:
    """The meaning of those columns that the table has."""
    lines = ["AP in points at the last evaluation; ± of AP: standard deviation over the seeds."]
    if any(row.gain is not None for row in rows):
        lines.append(f"gain: over the student alone, by pairs of one seed; ±: its {100 * CONFIDENCE:.0f}% confidence "
                     "interval (Student's t).")
    if any(row.verdict for row in rows):
        lines.append(f'verdict, after the same number of epochs: "{PAYS}" if the whole interval of the gain is above '
                     f'0, "{DOES_NOT_PAY}" if no part of it is, otherwise "{CANNOT_TELL}". The number of seeds is the '
                     "one at which the interval would no longer contain 0, if mean and spread of the gain stay as "
                     f"they are. It is a rough number, and at most {MANY}.")
    single = [row.name for row in rows if row.gain is not None and row.interval is None]
    if single:
        lines.append(f"CAUTION: only one pair of runs is behind the gain of {listed(single, ', ')}. Another seed alone "
                     "often changes AP by a point or more: train more seeds (scripts/sweep.py --seeds) before you "
                     "trust the gain.")
    return "\n".join(lines + explain_time(rows) + explain_costs(rows))


def explain_time(rows: Sequence[Row]) -> list[str]:
    """What each setting is compared with at equal time, or what to train for it."""
    lines = []
    if any(row.equal_time for row in rows):
        lines.append("at equal time: the verdict over the shortest run of the student alone that took at least as much "
                     "time to train. If it took much longer, it has an advantage. The time to train the teacher is "
                     "not counted.")
    for row in rows:
        if row.equal_time:
            gain = with_deviation(row.equal_time.gain, row.equal_time.interval, signed=True)
            lines.append(f"- {row.name} over {row.equal_time.baseline}, which took {row.longer:.2f} times as long: "
                         f"{gain}: {row.equal_time}.")
        elif row.epochs_to_equal is not None:
            lines.append(f"- {row.name}: in the given runs, no student alone was trained for as much time. Longer "
                         "training alone may give the same gain: train the student alone with train.epochs="
                         f"{next_epochs(row)} or a little more (and later milestones), with the same seeds, and give "
                         "these runs, too.")
        elif row.gain is not None and row.seconds is not None:
            lines.append(f"- {row.name}: its time cannot be compared with that of the student alone, because a time is "
                         "not known or the machines differ.")
    return lines


def next_epochs(row: Row) -> int:
    """The number of epochs for which to train the student alone, so that it takes as much time as this setting."""
    return math.ceil(row.epochs_to_equal - 1e-6)


def explain_costs(rows: Sequence[Row]) -> list[str]:
    lines = []
    if any(row.gap_closed is not None for row in rows):
        lines.append("gap closed: the gain as a share of what the teacher has more than the student alone. It is shown "
                     "only if that is more than the interval of the AP of the student alone, so it needs two seeds.")
    if any(row.seconds is not None for row in rows):
        lines.append("hours: of training, without evaluations, mean over the seeds; est.: not recorded, and estimated "
                     "from the images per second.")
    if any(row.relative_cost is not None for row in rows):
        lines.append("cost: hours as a multiple of those of the student alone with the same seeds. Other programs on "
                     "the machine change it.")
    if any(row.peak_memory is not None for row in rows):
        lines.append("peak GiB: of the GPU on CUDA, otherwise of the process; of the first process only.")
    if any(row.flops is not None for row in rows):
        lines.append("GFLOPs: of one image of data.scale. GFLOPs of a step: roughly, of all its images: three times "
                     "the student's, and once the teacher's.")
    return lines


def rows_to_csv(rows: Sequence[Row]) -> str:
    """The table for programs: AP as fractions, deviations in their own columns, and unknown values empty."""
    header = ["run", "methods", "seeds", *(name for figure in AP_FIGURES for name in (figure, f"{figure}_deviation")),
              "gain", "gain_interval", "verdict", "verdict_reason", "seeds_needed", "equal_time_baseline",
              "equal_time_gain", "equal_time_gain_interval", "equal_time_verdict", "equal_time_verdict_reason",
              "teacher_AP", "gap_closed", "training_hours", "hours_estimated", "relative_cost", "peak_memory_bytes",
              "parameters", "flops", "step_flops", "images_per_second"]
    cells = []
    for row in rows:
        told, timed = row.verdict, row.equal_time
        cells.append([
            row.name, row.methods, " ".join(str(run.seed) for run in row.runs),
            *(value for name in AP_FIGURES for value in row.figures[name]), row.gain, row.interval,
            *((told.verdict, told.reason, told.seeds) if told else (None,) * 3),
            *((timed.baseline, timed.gain, timed.interval, timed.verdict, timed.reason) if timed else (None,) * 5),
            row.teacher, row.gap_closed, None if row.seconds is None else row.seconds / 3600,
            None if row.seconds is None else str(row.estimated).lower(), row.relative_cost, row.peak_memory,
            row.parameters, row.flops, row.step_flops, row.images_per_second])
    return csv_table(header, [["" if cell is None else str(cell) for cell in row] for row in cells])


def save_rows(rows: Sequence[Row], out: Path) -> None:
    """Write the table: as CSV to a .csv file, as markdown to any other."""
    text = rows_to_csv(rows) if out.suffix == ".csv" else f"{format_rows(rows, markdown=True)}\n\n{explain(rows)}"
    write_text(out, text + "\n")
