"""Verdicts, at equal epochs and at equal time, against cases that are computed by hand."""
import json

import pytest
from run_folders import run_config, write_run

from data.tables import percent
from kd.evaluation.cost import count_flops
from kd.experiments.compare import compare
from kd.experiments.tables import explain, format_rows, gap_text, rows_to_csv
from kd.experiments.verdict import judge, seeds_needed
from kd.work_dir.records import read_runs
from models import build_detector


@pytest.mark.parametrize("differences, gain, half, verdict", [
    # t is 12.706 for two seeds and 4.30265 for three. The deviations are 0.01, 0.01, 0.011547, 0.0141421 and 0.02.
    ([0.02, 0.03, 0.04], 0.03, 0.024841, "pays"),
    ([-0.02, -0.03, -0.04], -0.03, 0.024841, "does not pay"),
    ([0.01, -0.01, 0.01], 0.003333, 0.028684, "cannot tell (more than 30 seeds)"),  # t / sqrt(n) < 0.29 is far away
    ([0.06, 0.08], 0.07, 0.127062, "cannot tell (about 1 more seed)"),  # three: 4.30265 * 0.0141421 / 1.73205 = 0.0351
    # 0.01 > t * 0.02 / sqrt(n): 0.5142 * 0.02 for 17 seeds (t = 2.1199), 0.4973 * 0.02 for 18 (t = 2.1098)
    ([0.03, 0.01, -0.01], 0.01, 0.049683, "cannot tell (about 15 more seeds)"),
    ([-0.03, -0.01, 0.01], -0.01, 0.049683, "cannot tell (about 15 more seeds)"),
    ([0.0, 0.0], 0.0, 0.0, "does not pay"),
    ([0.01, -0.01], 0.0, 0.127062, "cannot tell (more than 30 seeds)"),
    ([0.3], 0.3, None, "cannot tell (1 seed: train at least 3)")])
def test_verdicts(differences, gain, half, verdict):
    found = judge(differences, "alone")
    assert found.gain == pytest.approx(gain, abs=1e-6) and found.baseline == "alone"
    assert found.interval == (None if half is None else pytest.approx(half, rel=1e-4))
    assert str(found) == verdict and found.pairs == len(differences)


def test_seeds_needed_are_more_than_there_are():
    assert seeds_needed(0.01, 0.02, 3) == 18 and seeds_needed(0.01, 0.02, 20) == 21
    assert seeds_needed(0.01, 0.028, 3) is None  # 31 seeds: 2.0423 * 0.028 / 5.568 = 0.0103


def study(folder, lengths=(2, 3, 4, 5), seconds=170, **machine):
    """CrossKD in 2 epochs and 170 s, and the student alone, which takes 50 s for each epoch."""
    aps = {2: (0.30, 0.32), 3: (0.35, 0.37), 4: (0.40, 0.41), 5: (0.50, 0.51)}
    for seed in (0, 1):
        for length in lengths:
            cfg = run_config(seed, epochs=length)
            cfg["schedule"] = {"milestones": [length - 1], "warmup_steps": length}
            write_run(folder / f"alone{length}_seed{seed}", [0.1] * (length - 1) + [aps[length][seed]], cfg,
                      seconds=50 * length, peak=2 ** 30)
        cfg = run_config(seed, methods=("CrossKD",), teacher="teacher.pth")
        cfg["schedule"] = {"milestones": [1], "warmup_steps": 2}
        write_run(folder / f"crosskd_seed{seed}", [0.2, 0.36 + 0.03 * seed], cfg, seconds=seconds,
                  peak=(3 + seed) * 2 ** 29, machine=machine)
    rows = compare(read_runs(sorted(folder.iterdir()))[0], 0.5)
    return next(row for row in rows if row.methods), rows


def test_equal_epochs_and_equal_time(tmp_path):
    row, rows = study(tmp_path)
    # in two epochs 0.06 and 0.07: 0.065 ± 12.706 * 0.005. In 200 s (170 s or more) -0.04 and -0.02: -0.03 ± 0.127
    assert row.verdict.baseline == "alone2" and str(row.verdict) == "pays"
    assert row.interval == pytest.approx(0.063531, rel=1e-4) and row.gain == pytest.approx(0.065)
    assert row.equal_time.baseline == "alone4" and row.equal_time.gain == pytest.approx(-0.03)
    assert str(row.equal_time) == "cannot tell (about 2 more seeds)"  # 4: 3.18245 * 0.0141421 / 2 = 0.0225
    assert row.relative_cost == pytest.approx(1.7) and row.longer == pytest.approx(200 / 170)
    assert (row.seconds, row.estimated, row.peak_memory) == (170, False, 2 ** 31)
    # the teacher has 0.5, the student alone 0.31 ± 0.127: 0.065 / 0.19
    assert row.gap_closed == pytest.approx(0.065 / 0.19)
    assert ("- crosskd over alone4, which took 1.18 times as long: -3.0 ± 12.7: cannot tell (about 2 more seeds)."
            in explain(rows))
    line = next(line for line in format_rows(rows, markdown=True).splitlines() if "CrossKD" in line)
    assert "| pays | cannot tell (about 2 more seeds) | 34% | 0.047 | 1.70 | 2.00 |" in line
    header, *lines = rows_to_csv(rows).splitlines()
    cells = dict(zip(header.split(","), next(line for line in lines if "CrossKD" in line).split(",")))
    assert (cells["verdict"], cells["equal_time_verdict"], cells["equal_time_baseline"]) == (
        "pays", "cannot tell", "alone4")
    assert float(cells["training_hours"]) == pytest.approx(170 / 3600) and cells["hours_estimated"] == "false"
    assert float(cells["relative_cost"]) == pytest.approx(1.7) and cells["peak_memory_bytes"] == str(2 ** 31)


def test_what_to_train_for_equal_time(tmp_path):
    row, rows = study(tmp_path, lengths=(2, 3))
    assert row.equal_time is None and row.epochs_to_equal == pytest.approx(3.4)
    assert "train the student alone with train.epochs=4 or a little more" in explain(rows)


def test_no_more_time_than_alone(tmp_path):
    """With stored teachers say: then the student alone in as many epochs is what it is compared with."""
    row, _ = study(tmp_path, seconds=100)
    assert row.equal_time.baseline == "alone2" and row.longer == 1 and str(row.equal_time) == "pays"


def test_times_of_different_machines_are_not_compared(tmp_path):
    row, rows = study(tmp_path, device="another")
    assert row.verdict.baseline == "alone2" and row.equal_time is None and row.relative_cost is None
    assert "- crosskd: its time cannot be compared" in explain(rows)
    assert study(tmp_path / "same", processes=1)[0].relative_cost == pytest.approx(1.7)


def test_a_time_that_was_not_recorded_is_estimated(tmp_path):
    """Six steps of a batch, at a median of 20 images per second."""
    cfg = run_config()
    cfg["data"]["batch_size"], cfg["train"]["accumulate"] = 10, 2
    run, = read_runs([write_run(tmp_path / "run", [0.1, 0.2], cfg)])[0]
    assert run.estimated_seconds == 6 * 20 / 20
    row, = compare([run])
    assert (row.seconds, row.estimated) == (6, True) and " 0.002 est. " in format_rows([row])
    run, = read_runs([write_run(tmp_path / "two", [0.1, 0.2], cfg, machine={"processes": 2})])[0]
    assert run.estimated_seconds == 12


def test_operations_of_a_step(tmp_path):
    cfg = run_config(methods=("FGD",))
    cfg["data"] |= {"batch_size": 4, "scale": [90, 64]}
    larger = json.loads(json.dumps(cfg["model"]))
    larger["head"]["stacked_convs"] = 3
    flops = [count_flops(build_detector(model), (64, 96)) for model in (cfg["model"], larger)]
    del larger["head"]["num_classes"]  # that of the student
    for name, models, expected in (("known", [larger], 4 * (3 * flops[0] + flops[1])), ("factory", [None], None)):
        row, = compare(read_runs([write_run(tmp_path / name, [0.1, 0.2], cfg, teacher_models=models)])[0])
        assert row.step_flops == expected and row.flops == flops[0]


def test_a_gap_that_is_not_sure_is_not_shown(tmp_path):
    """The student alone has 0.31 ± 0.127, so a teacher with 0.43 may not be ahead, and one with 0.44 is."""
    study(tmp_path)
    runs = read_runs(sorted(tmp_path.iterdir()))[0]
    shares = [next(row.gap_closed for row in compare(runs, teacher) if row.methods) for teacher in (0.43, 0.44)]
    assert shares == [None, pytest.approx(0.065 / 0.13)]


@pytest.mark.parametrize("share, text", [(None, "-"), (0.372, "37%"), (1.0, "100%"), (1.004, "100%"),
                                         (1.17, "117% (above the teacher)"), (-0.1, "-10%")])
def test_more_than_the_gap_is_said_in_words(share, text):
    assert gap_text(share) == text and text.startswith(percent(share))
