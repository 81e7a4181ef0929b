"""Comparison of two reports of the benchmark, and its warnings on a busy machine."""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import run_script

from kd.benchmark import busy
from kd.benchmark.against import compare, quartiles, rounds_of, verdict
from kd.benchmark.busy import BusyWatch

YARD = "training step: yard"
MACHINE = {"cpu": "A", "threads": 2, "torch": "2.0", "commit": "1" * 40, "date": "2026-01-01"}


def report(rounds, **more):
    return {"kind": "steps", "machine": MACHINE, "workload": {"size": [64, 64]}, "yardstick": {"name": "yard"},
            "rounds_ms": rounds} | more


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def row(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(name)).removeprefix(name).split()


@pytest.mark.parametrize(("old", "new", "found"), [
    ([10, 11, 12], [7, 8, 9], "faster"), ([7, 8, 9], [10, 11, 12], "slower"), ([10, 11, 12], [11, 12, 13],
                                                                               "no difference"),
    ([10], [9], "faster"), ([10], [10], "no difference"),
    ([10, 10, 10, 10, 99], [9, 9, 9, 9, 98], "faster")])  # one bad round does not hide a difference
def test_verdicts_need_rounds_that_do_not_overlap(old, new, found):
    assert verdict(old, new) == found


def test_quartiles_are_the_middle_half():
    assert quartiles([5, 1, 2, 4, 3]) == (2, 4) and quartiles([7]) == (7, 7)


def test_rows_are_compared_and_missing_ones_named():
    old = report({YARD: [100, 102], "training step: a": [200, 204], "inference: a": [50, 50], "part: gone": [1, 1]})
    # The whole machine is slower by a half, and a is faster in units of the yardstick.
    new = report({YARD: [150, 153], "training step: a": [240, 244.8], "inference: a": [50, 50], "part: new": [1, 1]})
    text = compare(old, new, Path("old.json"))
    assert row(text, "ratio: a")[-1] == "faster" and row(text, "ratio: a")[-2] == "-20.0%"
    assert row(text, "training step: a")[-1] == "slower" and row(text, "inference: a")[-2:] == ["no", "difference"]
    assert row(text, "training step: a")[:4] == ["202.0", "(201.0", "to", "203.0)"]
    assert "only in the old report: part: gone" in text and "only in this report: part: new" in text
    assert "WARNING" not in text and "commit 111111111;" in text


def test_other_machines_and_settings_are_named():
    rounds = {YARD: [1, 2]}
    new = report(rounds, machine=MACHINE | {"cpu": "B", "commit": "2" * 40, "date": "2026-02-02"},
                 workload={"size": (64, 96)}, busy={"warning": "WARNING: other processes used 1.0 of 2 CPUs"})
    text = compare(report(rounds, layouts={}), new, Path("old.json"))
    assert 'WARNING: another machine, so verdicts may not be about the code: machine.cpu was "A" and is "B"' in text
    assert "WARNING: other settings, so verdicts may not be about the code: workload.size was [64, 64]" in text
    assert "this report: WARNING: other processes" in text and "commit was" not in text
    # Tuples are what lists in the file were.
    assert "settings" not in compare(report(rounds), report(rounds, workload={"size": (64, 64)}), Path("old.json"))


def test_reports_of_earlier_versions_have_steps():
    assert rounds_of({"steps_ms": {"yard": [1.5]}}) == {YARD: [1.5]}


@pytest.mark.parametrize(("content", "message"), [
    ("no JSON", "is not a JSON file"), ("[" * 100000, "is not a JSON file"), ([1], "holds no times"),
    ({"machine": {}}, "holds no times"), (report({}), "holds no times"), (report({YARD: []}), "holds no times"),
    (report({YARD: [1, "x"]}), "holds no times"), (report({YARD: [float("nan")]}), "holds no times"),
    (report({YARD: 3}), "holds no times"), ("\udcff", "is not a JSON file"),
    (report({YARD: [1]}, kind="exported"), "is a report of --exported, and the other one is a report on training")])
def test_bad_files_are_refused_before_anything_is_measured(content, message, tmp_path, monkeypatch, capsys):
    if content == "\udcff":
        (tmp_path / "old.json").write_bytes(b"\xff\xfe\x00")
    else:
        write(tmp_path / "old.json", content)
    assert run_script(monkeypatch, "benchmark.py", "--against", tmp_path / "old.json") == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1 and "old.json" in error


def test_a_missing_file(tmp_path, monkeypatch, capsys):
    assert run_script(monkeypatch, "benchmark.py", "--against", tmp_path / "none.json") == 2
    assert "none.json cannot be read (" in capsys.readouterr().err


def test_two_files_are_compared_without_a_measurement(tmp_path, monkeypatch, capsys):
    old, new = (write(tmp_path / f"{name}.json", report({YARD: times})) for name, times in (("o", [3]), ("n", [2])))
    assert run_script(monkeypatch, "benchmark.py", "--against", old, "--report", new) == 0
    assert row(capsys.readouterr().out, YARD)[-1] == "faster"
    for extra, message in (([], "add --against"), (["--against", old, "--where"], "remove --where"),
                           (["--against", old, "train.amp=bf16"], "remove train.amp=bf16")):
        assert run_script(monkeypatch, "benchmark.py", "--report", new, *extra) == 2
        assert message in capsys.readouterr().err


# --- a busy machine ---

def stat(tmp_path, monkeypatch, *states):
    """/proc/stat with these seconds of user, idle and stolen time, one after the other."""
    files = iter([write(tmp_path / f"stat{i}", f"cpu  {user * 100} 0 0 {idle * 100} 0 0 0 {stolen * 100} 0 0\ncpu0 1\n")
                  for i, (user, idle, stolen) in enumerate(states)])

    class Stat:
        def read_text(self, encoding):
            return next(files).read_text()
    monkeypatch.setattr(busy, "STAT", Stat())
    monkeypatch.setattr(busy, "os", SimpleNamespace(cpu_count=lambda: 4, sysconf=lambda name: 100,
                                                    times=lambda: (0, 0, 0, 0, 0)))


@pytest.mark.parametrize(("user", "stolen", "message"), [
    (20, 0, "WARNING: other processes used 2.0 of 4 CPUs: times vary; measure on a quiet machine"),
    (1, 2, "WARNING: other virtual machines took 5% of the CPUs' time"), (1, 0, None)])
def test_other_processes_are_noticed(user, stolen, message, tmp_path, monkeypatch):
    stat(tmp_path, monkeypatch, (100, 0, 0), (100 + user, 0, stolen))
    now = iter([0.0, 10.0])
    monkeypatch.setattr(busy, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    with BusyWatch() as watch:
        pass
    found = watch.record()
    assert found["others"] == pytest.approx(user / 10) and found["stolen"] == pytest.approx(stolen / 10)
    assert (found["warning"] or "").startswith(message or "") and (message is None) == (found["warning"] is None)


def test_own_time_is_not_that_of_others():
    with BusyWatch() as watch:
        sum(range(3_000_000))
    assert watch.others is None or 0 <= watch.others <= watch.cpus


@pytest.mark.parametrize(("load", "warned"), [(3.9, True), (0.4, False), (None, False)])
def test_systems_that_do_not_tell(load, warned, tmp_path, monkeypatch):
    has_load = {} if load is None else {"getloadavg": lambda: (load, 0, 0)}  # Windows has none
    monkeypatch.setattr(busy, "STAT", tmp_path / "none")
    monkeypatch.setattr(busy, "os", SimpleNamespace(cpu_count=lambda: 4, **has_load))
    with BusyWatch() as watch:
        pass
    with watch:
        pass
    assert watch.others is None and (watch.warning() is not None) == warned and json.dumps(watch.record())
