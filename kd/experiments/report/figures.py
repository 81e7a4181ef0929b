"""Parts of the page that come from the records of runs: tables of figures and costs, and curves."""
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.errors import counted

from ...work_dir.records import RunRecord
from ..compare import Row
from ..plot import MOST_CLASSES, Curve, ap_curve, at_common_places, precision_of
from ..tables import cells_of, explain
from .answer import best_first, distilled_first
from .charts import Axis, Line, axis, chart, letters, line
from .html import Html, breakable, bullets, join, left_out, table, tag

MOST_PANELS = 12   # of one kind; the tables have every setting
MOST_POINTS = 60   # of a line: more would only make the file larger
FIGURES = ("run", "AP", "gain", "gap closed", "AP50", "AP75", "APs", "APm", "APl", "seeds")
COSTS = ("hours", "cost", "peak GiB", "GFLOPs of a step", "training images/s", "parameters (M)", "GFLOPs")


def figures_part(rows: Sequence[Row]) -> Html:
    """COCO's figures of each setting, and what the columns mean."""
    lines = [text for text in explain(rows).splitlines() if not text.startswith("- ")]
    return join(table("AP in points", *columns_of(rows, FIGURES)),
                tag("details", tag("summary", "What the columns of the tables mean"), bullets(lines)))


def columns_of(rows: Sequence[Row], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Some columns of compare.py's table: header and cells, without those that are empty everywhere."""
    header, cells = cells_of(rows)
    kept = [header.index(name) for name in names]
    kept = [i for i in kept if i == 0 or any(row[i] != "-" for row in cells)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in cells]


def costs_part(rows: Sequence[Row]) -> Html:
    """What each setting costs, and AP over hours."""
    header, cells = columns_of(rows, ("run", *COSTS))
    shown = [[f"{letter(i)} {row.name}", str(row.runs[0].done), *own[1:]]
             for i, (row, own) in enumerate(zip(rows, cells))]
    missing = [row.name for row in rows if row.seconds is None]
    note = left_out(f"the hours of {counted(len(missing), 'setting')}, because the records have neither the time nor "
                    "the images per second.") if missing else None
    memory = None if any(row.peak_memory is not None for row in rows) else left_out(
        "peak memory, which these runs have not recorded.")
    unknown = sum(row.step_flops is None for row in rows)
    steps = left_out(f"the operations of a step of {counted(unknown, 'setting')}, because the records do not say what "
                     "the teacher is built from.") if unknown else None
    return join(table("What training costs, mean over the seeds", [header[0], "epochs", *header[1:]], shown),
                note, memory, steps, ap_over_hours(rows))


def letter(index: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    return ("" if index < 26 else letter(index // 26 - 1)) + chr(65 + index % 26)


def ap_over_hours(rows: Sequence[Row]) -> Html | None:
    """A letter for each setting: what it reaches, and how long its training took."""
    marks = [(letter(i), "own" if row.verdict else "base", (row.seconds / 3600, 100 * row.figures["AP"][0]))
             for i, row in enumerate(rows) if row.seconds is not None and row.figures["AP"][0] is not None]
    if len(marks) < 2:
        return None
    x = axis("hours of training, mean over the seeds", [place[0] for _, _, place in marks], 0)
    y = axis("AP, points", [place[1] for _, _, place in marks])
    text = ". ".join(f"{row.name}: {100 * row.figures['AP'][0]:.1f} points after {row.seconds / 3600:.3g} hours"
                     for row in rows if row.seconds is not None and row.figures["AP"][0] is not None)
    drawn = chart("ap-hours", "AP over hours of training", text, x, y, letters(marks, x, y))
    kinds = "Circles: distilled; squares: without a teacher. " if any(row.verdict for row in rows) else ""
    return tag("figure", tag("h3", "AP over hours"), drawn, tag(
        "figcaption", f"Letters are those of the table. {kinds}Higher and further left is better. The training of "
        "teachers is not counted."), class_="one")


def curves_part(rows: Sequence[Row]) -> Html:
    """AP over epochs: a panel for each distilled setting with its student alone, then those that are in no panel."""
    panels = panels_of(rows)
    if all(len(run.evaluations) < 2 for row in rows for run in row.runs):
        return left_out("curves. Each run was evaluated once, at its end. With ", tag("code", "eval.every=1"),
                        " train.py evaluates after each epoch.")
    drawn = []
    tops = [100 * line["AP"] for row in rows for run in row.runs for line in run.evaluations if line["AP"] is not None]
    tops += [100 * row.teacher for row in rows if row.teacher is not None]
    if not tops:
        return left_out("curves: no AP is known.")
    y = axis("AP, points", tops, 0)
    for number, (row, base) in enumerate(panels[:MOST_PANELS]):
        lines = [mean_line(each.name, kind, [ap_curve(run, "AP") for run in each.runs])
                 for each, kind in ((base, "base"), (row, "own" if row.verdict else "base")) if each]
        lines = [one for one in lines if one is not None]
        if not lines:
            continue
        x = axis("epoch", [a for one in lines for a, _ in one.points], 0)
        if row.teacher is not None:
            level = 100 * row.teacher
            lines.append(Line("the teacher", "teacher", [(0, level), (x.high, level)], dashed=True))
        drawn.append(panel(f"ap-{number}", row.name, f"AP of {row.name} over epochs", lines, x, y))
    key = legend([*kinds_in(panels), *([("teacher", "the teacher's AP")] if any(row.teacher is not None for row in rows)
                                       else [])])
    return join(key, tag("div", *drawn, class_="panels"),
                tag("p", "Lines: mean over the seeds. Bands: from the lowest to the highest.", class_="about"),
                rest_of(panels))


def panels_of(rows: Sequence[Row]) -> list[tuple[Row, Row | None]]:
    """Each distilled setting with its student alone, the largest gain first; then those that stand in no pair."""
    by_name = {row.name: row for row in rows}
    pairs = [(row, by_name.get(row.verdict.baseline)) for row in distilled_first(rows)]
    used = {base.name for _, base in pairs[:MOST_PANELS] if base}
    return pairs + [(row, None) for row in best_first(rows) if row.name not in used]


def kinds_in(panels: Sequence[tuple[Row, Row | None]]) -> list[tuple[str, str]]:
    """What the legend says of the lines in these panels."""
    distilled = any(row.verdict for row, _ in panels)
    plain = any(base or not row.verdict for row, base in panels)
    return [("own", "distilled")] * distilled + [("base", "the student alone, or a run without a teacher" if distilled
                                                 else "without a teacher")] * plain


def rest_of(panels: Sequence) -> Html | None:
    rest = len(panels) - MOST_PANELS
    return left_out(f"{counted(rest, 'panel')} of further settings. Give fewer runs to see them.") if rest > 0 else None


def panel(name: str, title: str, text: str, lines: Sequence[Line], x: Axis, y: Axis) -> Html:
    """A chart with its heading; its text says where each line ends."""
    ends = ", ".join(f"{one.name} {one.points[-1][1]:.3g}" for one in lines)
    lines_drawn = [line(one, x, y) for one in lines]
    drawn = chart(name, text, f"{x.label} {lines[0].points[-1][0]:g}: {ends}", x, y, *lines_drawn)
    return tag("figure", tag("h3", breakable(title)), drawn)


def legend(entries: Sequence[tuple[str, str]], dashes: str | None = None) -> Html:
    """Which line is what. `dashes`: what a dashed line is, for lines that are either."""
    items = []
    for kind, text in entries:
        x = Axis("", 0, 1, [])
        sample = line(Line(text, kind, [(0, 0), (0.13, 0)], dashed=kind == "teacher"), x, x)
        items.append(tag("li", tag("svg", sample, viewBox="30 186 60 12", class_="sample", aria_hidden="true"), text))
    if dashes:
        x = Axis("", 0, 1, [])
        sample = line(Line("", "teacher", [(0, 0), (0.13, 0)], dashed=True), x, x)
        items.append(tag("li", tag("svg", sample, viewBox="30 186 60 12", class_="sample", aria_hidden="true"), dashes))
    return tag("ul", *items, class_="legend")


def mean_line(name: str, kind: str, curves: Sequence[Curve], dashed: bool = False) -> Line | None:
    """The mean of the seeds' curves, in a band from the lowest to the highest; None if they have no common point."""
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return None
    x, values = at_common_places(curves)
    if not len(x):
        return None
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).round().astype(int))
    x, values = x[kept], values[:, kept]
    several = len(curves) > 1
    return Line(name, kind, list(zip(x.tolist(), values.mean(0).tolist())), values.min(0).tolist() if several else (),
                values.max(0).tolist() if several else (), dashed)


def precision_part(rows: Sequence[Row], curves: Mapping[Path, dict], advice: Html) -> Html:
    """Precision over recall: the mean of the classes for each setting, and class by class for the best.

    Args:
        curves: results of `precision_recall`, by the path of the run.
        advice: how to get them.
    """
    panels = [(row, base) for row, base in panels_of(rows) if any(run.path in curves for run in row.runs)]
    if not panels:
        return left_out("precision over recall. None of the runs holds a ", tag("code", "precision_recall.json"), ". ",
                        advice)
    drawn = []
    for number, (row, base) in enumerate(panels[:MOST_PANELS]):
        names = classes_in(row.runs, curves)
        drawn.append(precision_panel(f"pr-{number}", row.name, row, base, curves, names))
    row, base = panels[0]
    names = classes_in(row.runs, curves)
    of_classes = [] if len(names) < 2 else [
        precision_panel(f"pr-class-{number}", name, row, base, curves, [name], "h4")
        for number, name in enumerate(names[:MOST_CLASSES])]
    heading = None
    if of_classes:
        which = "" if len(names) <= MOST_CLASSES else f", the first {MOST_CLASSES} of {len(names)} classes"
        heading = tag("h3", "By class: ", breakable(row.name), which)
    key = legend(kinds_in(panels), "at IoU 0.75; solid: at IoU 0.5")
    return join(key, tag("div", *filter(None, drawn), class_="panels"), rest_of(panels), heading,
                tag("div", *filter(None, of_classes), class_="panels") if of_classes else None)


def classes_in(runs: Sequence[RunRecord], curves: Mapping[Path, dict]) -> list[str]:
    """The classes with objects in the runs' curves."""
    return list(dict.fromkeys(name for run in runs for name in curves.get(run.path, {"precision": {}})["precision"]
                              if precision_of(curves[run.path], [name], "0.50") is not None))


def precision_panel(name: str, title: str, row: Row, base: Row | None, curves: Mapping[Path, dict],
                    classes: Sequence[str], level: str = "h3") -> Html | None:
    """Precision over recall of some classes, at both IoU thresholds, of a setting and its student alone."""
    lines = []
    for each, kind in ((base, "base"), (row, "own" if row.verdict else "base")):
        for iou in ("0.50", "0.75"):
            found = [(np.array(curves[run.path]["recall"]), precision)
                     for run in (each.runs if each else []) if run.path in curves
                     and (precision := precision_of(curves[run.path], classes, iou)) is not None]
            lines.append(mean_line(f"{each.name} at IoU {iou}", kind, found, iou == "0.75") if found else None)
    lines = [one for one in lines if one is not None]
    if not lines:
        return None
    share = Axis("recall", 0, 1, [0, 0.25, 0.5, 0.75, 1])
    means = [(one, float(np.mean([b for _, b in one.points]))) for one in lines]
    text = "Mean precision: " + ", ".join(f"{one.name} {mean:.2f}" for one, mean in means)
    drawn = chart(name, f"Precision over recall: {title}", text, share, Axis("precision", 0, 1, share.ticks),
                  *(line(one, share, Axis("precision", 0, 1, share.ticks)) for one in lines))
    return tag("figure", tag(level, breakable(title)), drawn)
