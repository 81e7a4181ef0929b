"""Reading, grouping and comparing runs, with folders written by hand."""
import csv
import hashlib
import json
import math

import pytest
from run_folders import TEACHER, run_config, write_run
from runs import ROOT, run_script

from data import DataError
from kd.evaluation.cost import count_flops, count_parameters
from kd.experiments.compare import compare, cost
from kd.experiments.tables import explain
from kd.experiments.verdict import paired_interval, t_quantile
from kd.work_dir.records import group_runs, read_runs, setting, with_figures
from models import build_detector

DIGEST = hashlib.sha256(TEACHER).hexdigest()


def study(folder, alone=(0.3, 0.32), distilled=(0.36, 0.4), teacher=0.5):
    """A teacher, the student alone and the student with CrossKD, over two seeds each."""
    write_run(folder / "teacher", [0.1, 0.2, teacher], run_config(epochs=3), checkpoint=TEACHER)
    path = folder / "teacher" / "last.pth"
    for seed, (before, after) in enumerate(zip(alone, distilled)):
        write_run(folder / f"alone_seed{seed}", [0.1, before], run_config(seed))
        write_run(folder / f"crosskd_seed{seed}", [0.2, after], run_config(seed, methods=("CrossKD",), teacher=path),
                  {str(path): DIGEST})
    return sorted(folder.iterdir())


def rows_of(paths, **known):
    return {row.name: row for row in compare(read_runs(paths)[0], **known)}


def test_means_gain_and_gap(tmp_path):
    rows = rows_of(study(tmp_path))
    assert list(rows) == ["alone", "crosskd", "teacher"]
    alone, crosskd, teacher = rows.values()
    assert alone.figures["AP"] == (pytest.approx(0.31), pytest.approx(math.sqrt(2) * 0.01))
    assert alone.figures["APs"] == (None, None) and teacher.figures["AP"] == (0.5, None)
    assert crosskd.methods == "CrossKD" and [run.seed for run in crosskd.runs] == [0, 1]
    assert crosskd.gain == pytest.approx(0.07) and crosskd.gap_closed == pytest.approx(0.07 / 0.19)
    assert crosskd.interval == pytest.approx(12.706 * 0.01, rel=1e-4)  # gains of 0.06 and 0.08; one degree of freedom
    assert alone.gain is None and teacher.gain is None and crosskd.images_per_second == 20


def test_what_inherits_only_is_not_alone(tmp_path):
    paths = study(tmp_path)
    path = tmp_path / "teacher" / "last.pth"
    for name, methods in (("inherits", ()), ("also_fgd", ("FGD",))):
        cfg = run_config(0)
        cfg["distill"] = {"teacher": {"cfg": "teacher.yaml", "checkpoint": str(path)}, "init_student": True,
                          "methods": [{"type": method} for method in methods]}
        paths.append(write_run(tmp_path / name, [0.2, 0.35], cfg, {str(path): DIGEST}))
    rows = rows_of(paths)
    assert rows["inherits"].methods == "init_student" and rows["also_fgd"].methods == "FGD+init_student"
    assert rows["inherits"].gain == pytest.approx(0.05) and rows["inherits"].verdict.baseline == "alone"


def test_a_gain_is_by_pairs_of_one_seed(tmp_path):
    paths = study(tmp_path)
    rows = rows_of([path for path in paths if path.name != "alone_seed1"])
    crosskd = rows["crosskd"]
    assert crosskd.gain == pytest.approx(0.06) and crosskd.interval is None
    assert crosskd.gap_closed is None  # one AP of the student alone says nothing about its uncertainty
    assert str(crosskd.verdict) == "cannot tell (1 seed: train at least 3)"
    assert "CAUTION: only one pair of runs is behind the gain of crosskd." in explain(list(rows.values()))
    assert "CAUTION" not in explain(list(rows_of(paths).values()))
    rows = rows_of([path for path in paths if not path.name.startswith("alone")])
    assert rows["crosskd"].gain is None and rows["crosskd"].gap_closed is None
    assert str(rows["crosskd"].verdict) == (
        "cannot tell (no run of the student alone with the same settings and seed)")


@pytest.mark.parametrize("case, expected", [("folder", 0.5), ("file gone", 0.5), ("another file", None),
                                            ("moved among the runs", 0.5), ("best", 0.6), ("no run of ours", None),
                                            ("other images", None)])
def test_where_the_teachers_ap_comes_from(tmp_path, case, expected):
    paths = study(tmp_path)
    teacher = tmp_path / "teacher"
    kept = [path for path in paths if path.name != "teacher"]
    if case == "file gone":
        (teacher / "last.pth").unlink()
    elif case == "another file":
        (teacher / "last.pth").write_bytes(b"trained again")
    elif case == "moved among the runs":
        kept.append(teacher.rename(tmp_path / "elsewhere"))
    elif case == "best":
        (teacher / "last.pth").rename(teacher / "best.pth")
        text = (teacher / "metrics.jsonl").read_text().replace('"AP": 0.2', '"AP": 0.6')
        (teacher / "metrics.jsonl").write_text(text)
        for seed in (0, 1):
            file = tmp_path / f"crosskd_seed{seed}" / "run.json"
            file.write_text(file.read_text().replace("last.pth", "best.pth"))
    elif case == "no run of ours":
        (teacher / "metrics.jsonl").unlink()
    elif case == "other images":
        content = json.loads((teacher / "run.json").read_text())
        content["config"]["data"]["val"]["first"] = 5
        (teacher / "run.json").write_text(json.dumps(content))
    assert rows_of(kept)["crosskd"].teacher == expected
    assert rows_of(kept, known_teacher=0.45)["crosskd"].teacher == (expected or 0.45)


def test_what_makes_runs_one_setting(tmp_path):
    configs = {"a_seed0": run_config(0), "a_seed1": run_config(1, log_every=5, keep=3, check_images=0),
               "b": run_config(0, epochs=1), "c": run_config(0, ema=0.9), "d": run_config(0, methods=("FGD",)),
               "again": run_config(0), "stopped": run_config(2, epochs=9)}
    for name, cfg in configs.items():
        write_run(tmp_path / name, [0.1] * min(2, cfg["train"]["epochs"]), cfg)
    groups = group_runs(read_runs([tmp_path / name for name in configs])[0])
    assert {name: [run.name for run in runs] for name, runs in groups.items()} == {
        "a": ["a_seed0", "a_seed1"], "b": ["b"], "c": ["c"], "d": ["d"], "again": ["again"],
        "stopped (2 of 9 epochs)": ["stopped"]}


def test_runs_from_one_file_are_one_setting(tmp_path):
    """Also if it lay in other places; two files under one name are two settings."""
    for seed, (name, digest) in enumerate([("a.pth", "1"), ("b.pth", "1"), ("a.pth", "2")]):
        folder = write_run(tmp_path / f"run{seed}", [0.1, 0.2], run_config(seed, init=name))
        content = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(content | {"init": {name: digest}}))
    groups = group_runs(read_runs(sorted(tmp_path.iterdir()))[0])
    assert [[run.name for run in runs] for runs in groups.values()] == [["run0", "run1"], ["run2"]]


def test_a_list_of_one_data_set_is_the_same_setting_as_no_list():
    alone, listed, other = (run_config(0) for _ in range(3))
    alone["data"]["train"] = {"images": "a"}
    listed["data"]["train"], other["data"]["train"] = [{"images": "a"}], [{"images": "a"}, {"images": "b"}]
    assert setting(alone) == setting(listed) != setting(other)
    for lr in (0.01, {"per_image": 0.01}):
        other["optimizer"] = {"lr": lr}
        assert f'"lr": {json.dumps(lr)}' in setting(other)


def test_figures_from_a_file_in_each_work_dir(tmp_path, monkeypatch, capsys):
    """As eval.py --out writes them, for example on the test part. A teacher's AP on other images is not taken."""
    paths = study(tmp_path)
    for path, ap in zip(paths, (0.2, 0.22, 0.3, 0.3)):  # not the teacher
        (path / "test.json").write_text(json.dumps({"AP": ap, "AP50": 2 * ap, "per_class": {}}))
    runs, notes = with_figures(read_runs(paths)[0], "test.json")
    assert len(notes) == 1 and "teacher is left out: there is no test.json in it; eval.py --out writes it" in notes[0]
    alone, crosskd = compare(runs)
    assert alone.figures["AP50"][0] == pytest.approx(0.42) and crosskd.gain == pytest.approx(0.09)
    assert crosskd.verdict.baseline == "alone" and crosskd.gap_closed is None
    (paths[-1] / "test.json").write_text('{"AP": 0.4}')
    assert {row.name: row for row in compare(with_figures(read_runs(paths)[0], "test.json")[0])
            }["crosskd"].gap_closed == pytest.approx(0.09 / 0.19)
    assert run_script(monkeypatch, "compare.py", *paths, "--figures", "test.json") == 0
    assert "+9.0" in capsys.readouterr().out


def test_figures_from_a_file_that_has_none(tmp_path, monkeypatch, capsys):
    paths = study(tmp_path)
    assert run_script(monkeypatch, "compare.py", *paths, "--figures", "test.json") == 2
    assert "no run has a test.json: " in capsys.readouterr().err
    for text in ('{"classes": 3}', '{"AP": "high"}', "[]", "AP 0.3"):
        (paths[0] / "test.json").write_text(text)
        assert run_script(monkeypatch, "compare.py", *paths, "--figures", "test.json") == 2
        assert f"write it with eval.py --out {paths[0] / 'test.json'}" in capsys.readouterr().err


def test_names_of_runs_in_folders_of_a_seed_each(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "crosskd" / f"seed{seed}", [0.1, 0.2], run_config(seed))
    runs, _ = read_runs([tmp_path / "crosskd" / f"seed{seed}" for seed in (0, 1)])
    assert list(group_runs(runs)) == ["crosskd"]


def test_metrics_without_a_run(tmp_path):
    for name in ("student", "student_seed1"):
        folder = write_run(tmp_path / name, [0.1, 0.2], None)
        (folder / "metrics.jsonl").rename(tmp_path / f"{name}.jsonl")
    runs, notes = read_runs(sorted(tmp_path.iterdir()))
    assert {name: [run.seed for run in members] for name, members in group_runs(runs).items()} == {"student": [0, 1]}
    assert len(notes) == 2 and all("left out" in note for note in notes)  # the folders
    row, = compare(runs)
    assert row.figures["AP"] == (0.2, 0.0) and row.parameters is None


@pytest.mark.parametrize("change, part", [
    ({"config": None}, "run.json has no configuration that can be read (config: must be a mapping, not null"),
    ({"config": {"model": 3}}, "(model: must be a mapping of keys to values, not an integer (3))"),
    ({"teachers": [1]}, "run.json: teachers must be SHA-256 by path, not [1]"),
    ({"teachers": {"a": 1}}, "run.json: teachers must be SHA-256 by path, not {'a': 1}")])
def test_records_with_wrong_values_are_named(tmp_path, change, part):
    run = write_run(tmp_path / "run", [0.1], run_config())
    file = run / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError) as caught:
        read_runs([run])
    assert part in str(caught.value)
    for text, reason in [(b"[]", "must hold a mapping, not \\[\\]"), (b"\xff", "can't decode"), (b"{", "Expecting")]:
        file.write_bytes(text)
        with pytest.raises(DataError, match=rf"run\.json cannot be read \(.*{reason}"):
            read_runs([run])


@pytest.mark.parametrize("line", ["3", '{"AP": 0.1}', '{"AP": "x", "epoch": 0, "step": 1}',
                                  '{"AP": NaN, "epoch": 0, "step": 1}', '{"AP": 0.1, "epoch": -1, "step": 1}',
                                  '{"loss": [], "epoch": 0, "step": 1}', '{"loss": true, "epoch": 0, "step": 1}',
                                  '{"AP": 0.1, "per_class": [], "epoch": 0, "step": 1}',
                                  '{"AP": 0.1, "per_class": {"a": "b"}, "epoch": 0, "step": 1}',
                                  '{"loss": 1, "images_per_second": "fast", "epoch": 0, "step": 1}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    metrics = write_run(tmp_path / "run", [0.1], run_config()) / "metrics.jsonl"
    metrics.write_text(f"{metrics.read_text()}{line}\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 5 is not a record of a run: "):
        read_runs([tmp_path / "run"])


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    metrics = write_run(tmp_path / "run", [0.1], run_config()) / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'{"AP": 0.9, "class \xff')
    run, = read_runs([tmp_path / "run"])[0]
    assert [line["AP"] for line in run.evaluations] == [0.1]


def test_nothing_to_compare(tmp_path):
    with pytest.raises(DataError, match="no run among"):
        read_runs([tmp_path])


@pytest.mark.parametrize("freedom, expected", [(1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (30, 2.04227),
                                               (1000, 1.96234)])
def test_t_quantiles_are_those_of_the_tables(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, rel=2e-5)


def test_paired_interval():
    mean, half = paired_interval([0.01, 0.02, 0.03])
    assert mean == pytest.approx(0.02) and half == pytest.approx(4.30265 * 0.01 / math.sqrt(3), rel=1e-4)
    assert paired_interval([0.01]) == (0.01, None)


def test_cost_is_that_of_the_real_detector():
    model = run_config()["model"]
    detector = build_detector(model)
    assert cost(json.dumps(model), (90, 64)) == (count_parameters(detector), count_flops(detector, (64, 96)))


def test_compare_script(tmp_path, monkeypatch, capsys):
    paths = study(tmp_path / "runs")
    (tmp_path / "runs" / "notes").mkdir()
    out = [tmp_path / "deep" / name for name in ("table.md", "table.csv")]
    assert run_script(monkeypatch, "compare.py", *paths, tmp_path / "runs" / "notes", "--out", out[0],
                      "--out", out[1]) == 0
    printed = capsys.readouterr()
    assert "notes is left out" in printed.err
    line = next(line for line in printed.out.splitlines() if line.startswith("crosskd"))
    assert "38.0 ± 2.8" in line and "+7.0 ± 12.7" in line and "37%" in line and "CrossKD   0, 1" in line
    assert "| crosskd | CrossKD | 0, 1 | 38.0 ± 2.8 |" in out[0].read_text()
    table = {row["run"]: row for row in csv.DictReader(out[1].open())}
    assert float(table["crosskd"]["gap_closed"]) == pytest.approx(0.07 / 0.19) and table["alone"]["gain"] == ""
    assert "cannot tell (about 1 more seed)" in line and table["crosskd"]["seeds_needed"] == "3"
    assert (table["crosskd"]["verdict"], table["crosskd"]["verdict_reason"]) == ("cannot tell", "about 1 more seed")
    assert table["alone"]["verdict"] == "" and table["crosskd"]["hours_estimated"] == "true"


def test_compare_refuses_a_folder_without_runs(tmp_path, monkeypatch, capsys):
    assert run_script(monkeypatch, "compare.py", tmp_path) == 2
    assert "give work dirs of train.py" in capsys.readouterr().err


def test_the_records_of_results_can_be_read():
    runs, notes = read_runs(sorted((ROOT / "results").rglob("*.jsonl")))
    assert runs and not notes and all(run.evaluations for run in runs)
