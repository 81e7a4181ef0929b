"""Where the figures come from: the command, commit, machine and date of every run."""
import shlex
from collections.abc import Sequence
from pathlib import Path

from data.errors import counted, one_line

from ...work_dir.records import RunRecord, read_json
from ..compare import Row
from .html import Html, breakable, in_code, join, tag

UNKNOWN = "not known"
ORDER = ("command", "commit", "date", "machine", "versions", "teacher", "start", "records")


def origin_part(rows: Sequence[Row]) -> Html:
    """Commands and commits, by setting."""
    return join(*(tag("details", tag("summary", breakable(row.name), f": {counted(len(row.runs), 'run')}"),
                      setting_origin(row.runs)) for row in rows))


def setting_origin(runs: Sequence[RunRecord]) -> Html:
    """The command of each run, and what else is known: once where it is the same for all."""
    entries: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        content = origin_of(run)
        said = [("command", command_of(content)), ("commit", commit_of(content)),
                ("date", text_of(content.get("date"))), ("machine", machine_of(content)),
                ("versions", versions_of(content)), ("records", str(run.path))]
        said += [(name, f"{path}, SHA-256 {digest[:16]}...") for name, files in
                 (("teacher", run.teachers), ("start", run.init)) for path, digest in files.items()]
        for entry in said:
            entries.setdefault(entry, []).append(f"seed {run.seed}")
    ordered = sorted(entries.items(), key=lambda item: ORDER.index(item[0][0]))
    return tag("dl", *(join(tag("dt", name), tag("dd", in_code(text) if name == "command" else text,
                                                 "" if len(seeds) == len(runs) else f" ({', '.join(seeds)})"))
                       for (name, text), seeds in ordered))


def origin_of(run: RunRecord) -> dict:
    """What run.json says; empty for a metrics file alone."""
    path = run.path / "run.json"
    return read_json(path, "is the run still being started?") if path.is_file() else {}


def text_of(value: object) -> str:
    return UNKNOWN if value in (None, "", [], {}) else one_line(value, 2000)


def command_of(content: dict) -> str:
    words = content.get("command")
    if not isinstance(words, list) or not words:
        return UNKNOWN
    script = Path(str(words[0]))  # earlier versions recorded whole paths, which are those of one machine
    first = f"scripts/{script.name}" if script.parent.name == "scripts" else str(script)
    return f"python {shlex.join([first, *map(str, words[1:])])}"


def commit_of(content: dict) -> str:
    """The commit; a plus says that files had changed since."""
    commit = content.get("commit")
    if not isinstance(commit, str):
        return UNKNOWN
    return f"{commit.rstrip('+')}, with changes that were not committed" if commit.endswith("+") else commit


def machine_of(content: dict) -> str:
    machine = content.get("machine")
    if not isinstance(machine, dict):
        return UNKNOWN
    parts = [text_of(machine.get("system")), text_of(machine.get("device"))]
    for name, one in (("threads", "thread"), ("processes", "process")):
        if isinstance(machine.get(name), int):
            parts.append(counted(machine[name], one))
    return ", ".join(parts)


def versions_of(content: dict) -> str:
    versions = content.get("versions")
    return ", ".join(f"{name} {value}" for name, value in versions.items()) if isinstance(versions, dict) else UNKNOWN


def summary(rows: Sequence[Row]) -> Html:
    """What the page is about: numbers of runs, data, dates and commits."""
    runs = [run for row in rows for run in row.runs]
    contents = [origin_of(run) for run in runs]
    sets = dict.fromkeys(validation_of(run) for run in runs)
    dates = sorted(str(date)[:10] for content in contents if (date := content.get("date")))
    commits = dict.fromkeys(commit[:7] for content in contents if isinstance(commit := content.get("commit"), str))
    when = UNKNOWN if not dates else dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    entries = {"runs": f"{counted(len(runs), 'run')} of {counted(len(rows), 'setting')}",
               "evaluated on": ", ".join(sets), "trained": when, "commits": ", ".join(commits) or UNKNOWN}
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", breakable(value))) for name, value in entries.items()),
               class_="summary")


def validation_of(run: RunRecord) -> str:
    val = ((run.config or {}).get("data") or {}).get("val")
    return text_of(val.get("annotations")) if isinstance(val, dict) else UNKNOWN
