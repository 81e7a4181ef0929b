"""Compares two reports of the benchmark, row by row."""
import json
import math
import statistics
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from data.errors import differences, listed
from data.output import reason_of
from data.tables import text_table

from ..exceptions import UsageError

STEP = "training step: "
RATIO = "ratio: "
KINDS = {"steps": "a report on training steps", "where": "a report of --where", "exported": "a report of --exported"}
SAME = ("commit", "date", "warning")  # of the machine: they may differ
Rounds = dict[str, list[float]]


def read_report(path: Path) -> dict:
    """Read a file that `benchmark.py --out` wrote.

    Raises:
        UsageError: it cannot be read, or it is another file.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({reason_of(error)}): give a file of benchmark.py --out") from None
    except (ValueError, RecursionError):  # UnicodeError is a ValueError
        raise UsageError(f"{path} is not a JSON file: give one that benchmark.py --out wrote") from None
    if not isinstance(report, dict) or not isinstance(report.get("machine"), dict) or not rounds_of(report):
        raise UsageError(f"{path} holds no times of benchmark.py: give a file that benchmark.py --out wrote")
    return report


def check_kinds(args: Namespace, old: Mapping | None, new: Mapping | None) -> None:
    """Raise UsageError, before anything is measured, if the old report is of another kind than the new one."""
    if old is None:
        return
    kind = kind_of(new) if new is not None else "exported" if args.exported else "where" if args.where else "steps"
    if kind_of(old) != kind:
        raise UsageError(f"{args.against} is {KINDS[kind_of(old)]}, and the other one is {KINDS[kind]}: give reports "
                         "of one kind")


def kind_of(report: Mapping) -> str:
    """What a report is about. Earlier versions wrote no `kind`."""
    kind = report.get("kind")
    return kind if kind in KINDS else "exported" if "rows" in report else "steps"


def rounds_of(report: Mapping) -> Rounds:
    """Milliseconds of all rounds by row; empty if the file is damaged. Earlier versions wrote those of steps only."""
    found = report.get("rounds_ms")
    if found is None and isinstance(report.get("steps_ms"), dict):
        found = {STEP + name: values for name, values in report["steps_ms"].items()}
    good = isinstance(found, dict) and all(isinstance(values, list) and values and all(map(is_time, values))
                                           for values in found.values())
    return dict(found) if good else {}


def is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def quartiles(values: list[float]) -> tuple[float, float]:
    """The limits of the middle half of the values."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def shown(values: list[float]) -> str:
    """The median, and the limits of the middle half."""
    median, limits = statistics.median(values), quartiles(values)
    digits = 1 if median >= 10 else 2 if median >= 1 else 3
    return f"{median:.{digits}f} ({limits[0]:.{digits}f} to {limits[1]:.{digits}f})"


def with_ratios(rounds: Rounds, yardstick: str | None) -> Rounds:
    """The rounds, with those of each training step divided by the yardstick's in the same round.

    Both have met the same disturbances, so ratios vary less than times.
    """
    base = rounds.get(STEP + str(yardstick))
    ratios = {RATIO + name.removeprefix(STEP): [own / other for own, other in zip(values, base)]
              for name, values in rounds.items()
              if base and name.startswith(STEP) and name != STEP + yardstick and len(values) == len(base)}
    return ratios | rounds


def verdict(old: list[float], new: list[float]) -> str:
    """faster or slower, if the middle halves of the rounds do not overlap."""
    (low, high), (new_low, new_high) = quartiles(old), quartiles(new)
    return "faster" if new_high < low else "slower" if new_low > high else "no difference"


def compare(old: Mapping, new: Mapping, path: Path) -> str:
    """A table with a verdict for each row that both reports have, and lines about what differs between them.

    Args:
        path: of the old report, for messages.
    """
    new = json.loads(json.dumps(new))  # tuples are lists in a file
    before, after = (with_ratios(rounds_of(report), (report.get("yardstick") or {}).get("name"))
                     for report in (old, new))
    lines = [f"against {path} of {old['machine'].get('date', 'an unknown date')}, commit "
             f"{str(old['machine'].get('commit'))[:9]}; in brackets the middle half of the rounds"]
    for key, what in (("machine", "another machine"), ("workload", "other settings"), ("overrides", "other settings"),
                      ("layouts", "other memory layouts")):
        pair = [report.get(key) for report in (old, new)]
        pair = [{k: v for k, v in each.items() if k not in SAME} if isinstance(each, dict) else each for each in pair]
        if all(each is not None for each in pair) and (found := differences(*pair, key=key)):
            lines.append(f"WARNING: {what}, so verdicts may not be about the code: {listed(found, ', ')}")
    for report, whose in ((old, "the old report"), (new, "this report")):
        warning = (report.get("busy") or {}).get("warning")
        lines += [f"{whose}: {warning}"] if warning else []
    rows = [[name, shown(before[name]), shown(after[name]),
             f"{statistics.median(after[name]) / statistics.median(before[name]) - 1:+.1%}",
             verdict(before[name], after[name])] for name in after if name in before]
    lines += ["", text_table(["row, in ms", "old", "new", "change", "verdict"], rows) if rows else
              "no row is in both reports"]
    for here, there, which in ((before, after, "the old report"), (after, before, "this report")):
        if alone := [name for name in here if name not in there]:
            lines.append(f"only in {which}: {', '.join(alone)}")
    return "\n".join(lines)
