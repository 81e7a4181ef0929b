"""Where a gain is: by class and by size of object."""
from collections.abc import Sequence
from statistics import mean

from data.errors import counted
from data.tables import points

from ...work_dir.records import RunRecord
from ..compare import Row, over_seeds
from ..tables import with_deviation
from ..verdict import paired_interval
from .answer import best_first, distilled_first
from .charts import bar
from .html import Html, join, left_out, table, tag

SIZES = {"APs": "small objects", "APm": "medium objects", "APl": "large objects"}
MOST = 20  # classes in a table
FEW = 10   # sizes and classes that stand side by side


def gains_part(rows: Sequence[Row]) -> Html:
    """Tables of the gain and of AP, by class and by size."""
    distilled, others = [row for row in distilled_first(rows) if row.gain is not None], best_first(rows)
    by_name = {row.name: row for row in rows}
    pairs = [(row, by_name[row.verdict.baseline]) for row in distilled if row.verdict.baseline in by_name]
    last = [run.evaluations[-1] for row in rows for run in row.runs]
    names = dict.fromkeys(name for line in last for name in line.get("per_class") or ())
    gains = {row.name: {name: gain_of(row, base, name) for name in (*SIZES, *names)} for row, base in pairs}
    shown = [*SIZES, *most_changed(list(names), gains)]
    parts = []
    if gains:
        most = max((abs(own[0]) for of_row in gains.values() for own in of_row.values() if own is not None), default=0)
        cells = {row: {name: cell(own[name], most) for name in shown} for row, own in gains.items()}
        parts.append(in_shorter_way("Gain over the student alone, points of AP", cells, shown))
        parts.append(tag("p", "±: 95% confidence interval, by pairs of one seed. The bar is to the left for a loss.",
                         class_="about"))
    plain = others if gains else [*distilled_first(rows), *others]
    if plain:
        cells = {row.name: {name: with_deviation(*over_seeds([value_of(run, name) for run in row.runs]))
                            for name in shown} for row in plain}
        parts.append(in_shorter_way("AP without a teacher, points" if gains else "AP, points", cells, shown))
    parts.append(tag("p", "COCO's sizes: small objects have less than 32 x 32 pixels of the original image, large ones "
                          "more than 96 x 96.", class_="about"))
    if len(names) > MOST:
        parts.append(left_out(f"{counted(len(names) - MOST, 'class', 'classes')} of {len(names)}, those that change "
                              "least. All are in ", tag("code", "metrics.jsonl"), " of the runs."))
    return join(*parts)


def value_of(run: RunRecord, name: str) -> float | None:
    """AP of a size or a class at the last evaluation."""
    last = run.evaluations[-1]
    return last.get(name) if name in SIZES else (last.get("per_class") or {}).get(name)


def gain_of(row: Row, base: Row, name: str) -> tuple[float, float | None] | None:
    """The gain in AP of a size or a class, mean over the seeds that both have, and its interval; None if not known."""
    own, other = ({run.seed: value_of(run, name) for run in each.runs} for each in (row, base))
    pairs = [own[seed] - other[seed] for seed in own if own[seed] is not None and other.get(seed) is not None]
    return paired_interval(pairs) if pairs else None


def most_changed(names: list[str], gains: dict[str, dict]) -> list[str]:
    """The classes to show, in their order: all, or those with the largest gain or loss."""
    if len(names) <= MOST:
        return names
    size = {name: mean([abs(own[name][0]) for own in gains.values() if own[name] is not None] or [0])
            for name in names}
    kept = set(sorted(names, key=lambda name: -size[name])[:MOST])
    return [name for name in names if name in kept]


def cell(own: tuple[float, float | None] | None, most: float) -> str:
    """A gain as text and as a bar."""
    return points(None) if own is None else join(with_deviation(*own, signed=True), bar(own[0], most))


def in_shorter_way(caption: str, cells: dict[str, dict[str, str]], names: Sequence[str]) -> Html:
    """A table with a row for each setting, or for each class if there are many."""
    titles = [SIZES.get(name, name) for name in names]
    if len(names) <= FEW:
        return table(caption, ["run", *titles], [[row, *own.values()] for row, own in cells.items()], "bars")
    rows = [[title, *(own[name] for own in cells.values())] for name, title in zip(names, titles)]
    return table(caption, ["objects", *cells], rows, "bars")
