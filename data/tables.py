"""Tables for people and for spreadsheets."""
import csv
import io
from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def text_table(header: Sequence[str], rows: Rows) -> str:
    """Aligned columns for a terminal: words to the left, figures to the right."""
    columns = [[str.rjust if right else str.ljust, max(map(len, cells))]
               for right, *cells in zip(figures(rows, len(header)), header, *rows)]
    return "\n".join("  ".join(align(cell, width) for cell, (align, width) in zip(row, columns)).rstrip()
                     for row in (header, *rows))


def markdown_table(header: Sequence[str], rows: Rows) -> str:
    rule = ["---:" if right else "---" for right in figures(rows, len(header))]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
                     for row in (header, rule, *rows))


def csv_table(header: Sequence[str], rows: Rows) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().rstrip("\n")


def figures(rows: Rows, columns: int) -> list[bool]:
    """Which columns hold figures, or dashes where there are none."""
    return [all(row[i][:1] in "+-0123456789" for row in rows) for i in range(columns)]


def points(value: float | None, signed: bool = False) -> str:
    """A fraction in points, as AP is shown; a dash for None."""
    return "-" if value is None else f"{rounded(100 * value, 1):{'+' if signed else ''}.1f}"


def percent(share: float | None) -> str:
    """A fraction in whole percent; a dash for None."""
    return "-" if share is None else f"{rounded(100 * share):.0f}%"


def rounded(value: float, digits: int = 0) -> float:
    """The rounded value, without a minus sign if it is zero."""
    return round(value, digits) + 0.0
