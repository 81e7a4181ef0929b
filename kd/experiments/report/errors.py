"""Which kinds of error a setting makes, before and after distillation, as TIDE counts them."""
from collections.abc import Sequence

from data.tables import points

from ...evaluation.tide import ERRORS
from ..compare import Row, over_seeds
from ..tables import with_deviation
from .charts import Mark, axis, ruler, strip
from .checkpoints import Evidence, errors_of
from .figures import MOST_PANELS, panels_of, rest_of
from .html import Html, breakable, join, left_out, table, tag

MEANINGS = {"classification": "right place, wrong class", "localisation": "right class, box not good enough (IoU "
            "0.1 to 0.5)", "both": "wrong class and box", "duplicate": "a second box for an object that is found",
            "background": "a box where nothing is", "missed": "an object without a box"}


def errors_part(rows: Sequence[Row], evidence: Evidence, advice: Html) -> Html:
    """A table of what each kind of error costs, and a chart for each distilled setting beside its student alone."""
    if not evidence.errors:
        return left_out("errors by kind. They need the checkpoints of the runs. ", advice)
    known = [row for row in rows if any(run.path in evidence.errors for run in row.runs)]
    cells = [[row.name, *(with_deviation(*values_of(row, evidence, name)) for name in ("AP50", *ERRORS))]
             for row in known]
    for one in {id(one): one for one in evidence.teachers.values()}.values():
        own = errors_of(one.analysis)
        cells.append([one.name, *(points(own[kind]) for kind in ("AP50", *ERRORS))])
    meaning = tag("ul", *(tag("li", tag("strong", kind), f": {text}") for kind, text in MEANINGS.items()))
    together = tag("p", "The costs do not add up to what is missing to 100: one error can hide another.",
                   class_="about")
    return join(table("AP50, and what it would gain without the errors of one kind, in points",
                      ["run", "AP50", *ERRORS], cells),
                tag("details", tag("summary", "What the kinds of error are"), meaning, together),
                charts(rows, evidence))


def values_of(row: Row, evidence: Evidence, name: str) -> tuple[float | None, float | None]:
    return over_seeds([evidence.errors[run.path][name] for run in row.runs if run.path in evidence.errors])


def charts(rows: Sequence[Row], evidence: Evidence) -> Html | None:
    """For each distilled setting, the cost of each kind of error before (hollow) and after (full)."""
    pairs = [(row, base) for row, base in panels_of(rows) if base and all(
        any(run.path in evidence.errors for run in each.runs) for each in (row, base))]
    if not pairs:
        return None
    costs = {row.name: [[100 * (values_of(each, evidence, kind)[0] or 0) for each in (base, row)] for kind in ERRORS]
             for row, base in pairs}
    scale, drawn = axis("", [value for own in costs.values() for pair in own for value in pair], 0), []
    for row, base in pairs[:MOST_PANELS]:
        lines = []
        for kind, (before, after) in zip(ERRORS, costs[row.name]):
            text = f"{kind}: {before:.1f} points for {base.name}, {after:.1f} for {row.name}"
            marks = [Mark(before, kind="hollow"), Mark(after)]
            lines.append(tag("li", tag("span", kind), strip(marks, scale, text, zero=None, joined=True),
                             tag("span", f"{before:.1f} → {after:.1f}", class_="number")))
        lines.append(tag("li", tag("span"), ruler(scale), tag("span"), class_="key"))
        drawn.append(tag("figure", tag("h3", breakable(row.name)), tag("ul", *lines, class_="kinds")))
    return join(tag("p", "Points of AP50 that each kind of error costs: ○ the student alone, ● distilled. Further left "
                         "is better.", class_="about"), tag("div", *drawn, class_="panels"), rest_of(pairs))
