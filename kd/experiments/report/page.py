"""Puts the parts together: one HTML file that needs nothing else, no network and no script."""
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from string import Template

import torch

from data import DataError
from data.output import write_text

from ...work_dir.provenance import commit
from ...work_dir.records import RunRecord
from ..compare import Row, compare
from ..plot import read_curves
from .answer import answer, best_first, distilled_first
from .checkpoints import Evidence, measure, stored_errors
from .errors import errors_part
from .figures import costs_part, curves_part, figures_part, precision_part
from .gains import gains_part
from .html import Html, bullets, in_code, join, left_out, tag
from .origin import origin_part, summary
from .pictures import pictures_part

HERE = Path(__file__).parent


@dataclass
class Analyze:
    """What `--analyze` asks for."""

    device: torch.device
    score_thr: float = 0.3  # lowest score of a box that counts and is drawn
    pictures: int = 4       # how many images are shown


def write_report(runs: Sequence[RunRecord], out: Path, command: str, title: str | None = None,
                 teacher_ap: float | None = None, analyze: Analyze | None = None) -> list[str]:
    """Write the page about runs.

    Args:
        command: the command that makes it, which it shows.
        title: its heading; by default a question or a plain word.
        teacher_ap: the AP of teachers for which no run has it.
        analyze: also evaluates the runs' checkpoints.
    Returns:
        A line for everything that the checkpoints do not tell.
    Raises:
        DataError: no run has been evaluated, a file of a run that cannot be read, or no checkpoint to analyze.
    """
    rows = compare(runs, teacher_ap)
    if not rows:
        raise DataError(f"no run among {', '.join(str(run.path) for run in runs)} has been evaluated yet: there is "
                        "nothing to report")
    if analyze:
        evidence = measure(rows, analyze.device, analyze.score_thr)
    else:
        evidence = stored_evidence(rows)
    curves = {run.path: read_curves(file) for row in rows for run in row.runs if run.path.is_dir()
              and (file := run.path / "precision_recall.json").is_file()}
    curves = {path: one.curves for path, one in evidence.measured.items()} | curves
    write_text(out, page(rows, evidence, curves, command, title, analyze))
    return evidence.notes


def stored_evidence(rows: Sequence[Row]) -> Evidence:
    """What analyze.py has left in the work dirs."""
    found = Evidence()
    for run in (run for row in rows for run in row.runs):
        try:
            errors = stored_errors(run)
        except DataError as error:
            found.notes.append(f"{error}.")
            continue
        if errors is not None:
            found.errors[run.path] = errors
    return found


def page(rows: Sequence[Row], evidence: Evidence, curves: dict[Path, dict], command: str, title: str | None,
         analyze: Analyze | None) -> str:
    """The whole page as text."""
    distilled, rows = any(row.verdict for row in rows), [*distilled_first(rows), *best_first(rows)]
    title = title or ("Does distillation pay?" if distilled else "Trained detectors" if len(rows) > 1 else
                      "A trained detector")
    advice = join("The same command with ", in_code("--analyze"), " computes them, if the work dirs still hold ",
                  in_code("last.pth"), ".") if analyze is None else join("No checkpoint could be evaluated.")
    score_thr, count = (analyze.score_thr, analyze.pictures) if analyze else (0.3, 0)
    parts = {
        "title": title, "summary": summary(rows), "answer": answer(rows), "figures": figures_part(rows),
        "curves": curves_part(rows), "gains": gains_part(rows), "errors": errors_part(rows, evidence, advice),
        "precision": precision_part(rows, curves, advice),
        "pictures": pictures_part(rows, evidence, count, score_thr, advice), "costs": costs_part(rows),
        "origin": origin_part(rows), "notes": notes_part(evidence.notes), "command": command,
        "written": f"{datetime.now(timezone.utc):%Y-%m-%d}, commit {commit() or 'not known'}"}
    style = Html((HERE / "style.css").read_text(encoding="utf-8"))
    template = Template((HERE / "template.html").read_text(encoding="utf-8"))
    return template.substitute({name: join(part) for name, part in parts.items()}, style=style)


def notes_part(notes: Sequence[str]) -> Html:
    """What could not be had from the work dirs."""
    return join(left_out("what follows."), bullets(notes)) if notes else tag("p", "")
