"""The tables in RESULTS.md and docs/results/ agree with the records in results/."""
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from runs import ROOT

from kd.experiments.compare import Row, compare, over_seeds
from kd.experiments.tables import gap_text, with_deviation
from kd.work_dir.records import read_runs, with_figures

PAGES = [ROOT / "RESULTS.md", *sorted((ROOT / "docs" / "results").glob("*.md"))]
RECORD = re.compile(r"\[[^]]+\]\((?:\.\./\.\./)?(results/[^)]+)\)")


def tables() -> Iterator[list[list[str]]]:
    """The cells of every table on every page, with its header first."""
    for block in re.findall(r"(?:^\|.*\|\n)+", "\n\n".join(page.read_text(encoding="utf-8") for page in PAGES), re.M):
        header, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        yield [header, *rows]


def with_records() -> list:
    """(record, figures by column, AP in the row named teacher) for every row that links to its record."""
    found = []
    for header, *rows in tables():
        teacher = next((row for row in rows if row[0].strip("[").startswith("teacher")), None)
        known = None if teacher is None else float(dict(zip(header, teacher))["AP"].split()[0])
        for row in rows:
            record = RECORD.fullmatch(row[0])
            if record:
                cells = dict(zip(header[1:], row[1:]))
                found.append(pytest.param(record[1], cells, known, id=record[1].removeprefix("results/")))
    return found


@cache
def rows_of(folder: Path, teacher: float | None, part: str) -> list[Row]:
    """The table that compare.py makes for a folder; `part` names the figures of another evaluation, if there is one."""
    paths = sorted({metrics.parent for metrics in folder.rglob("metrics.jsonl")} | set(folder.glob("*.jsonl")))
    runs = read_runs(paths)[0]
    return compare(with_figures(runs, f"{part}.json")[0] if part else runs, None if teacher is None else teacher / 100)


@pytest.mark.parametrize(("record", "cells", "teacher"), with_records())
def test_a_row(record, cells, teacher):
    """A column "AP on test" has the figures of test.json in the work dirs, other columns those of training."""
    place = ROOT / record
    for column, shown in cells.items():
        if not shown:
            continue
        figure, _, part = column.partition(" on ")
        row = next(row for row in rows_of(place.parent, teacher, part)
                   if any(run.path == place or place in run.path.parents for run in row.runs))
        classes = {name for run in row.runs for name in run.evaluations[-1].get("per_class", {})}
        if figure in row.figures:
            assert shown == with_deviation(*row.figures[figure]), column
        elif figure in classes:
            values = [run.evaluations[-1]["per_class"][figure] for run in row.runs]
            assert shown == with_deviation(*over_seeds(values)), column
        elif figure == "gain":
            assert shown == with_deviation(row.gain, row.interval, signed=True), column
        elif figure == "of the gap closed":
            assert shown == gap_text(row.gap_closed)
        elif figure == "seeds":
            assert shown == ", ".join(str(run.seed) for run in row.runs)
        elif figure == "epochs":
            assert shown == str(row.runs[0].epochs)


def test_every_record_is_linked_to():
    records = {record_of(metrics).relative_to(ROOT).as_posix() for metrics in (ROOT / "results").rglob("*.jsonl")}
    linked = {record for page in PAGES for record in RECORD.findall(page.read_text(encoding="utf-8"))}
    assert records and not sorted(records - linked)


def record_of(metrics: Path) -> Path:
    """The target of a row's link: the folder of a run or of its seeds, or one file, for several seeds the first."""
    if metrics.name != "metrics.jsonl":
        return metrics.with_name(re.sub(r"_seed\d+$", "", metrics.stem) + ".jsonl")
    return metrics.parent.parent if re.fullmatch(r"seed\d+", metrics.parent.name) else metrics.parent
