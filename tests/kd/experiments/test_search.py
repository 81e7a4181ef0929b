"""Searches: what runs, after a stop or a failure, too, and what is reported; with a replacement for runs, and once
with real ones."""
import json
from pathlib import Path

import pytest
import yaml
from commands import RunHere
from runs import config, model, run_script, write_checkpoint, write_config

from data import generate_scenes
from kd.exceptions import TrainingError, WorkDirError
from kd.experiments import search as searching
from kd.experiments import sweep
from kd.experiments.outcome import check_failed, finish
from kd.experiments.search import open_search
from kd.experiments.space import check_search
from models import ConfigError

SPACE = {"optimizer.lr": {"log": [0.001, 0.1]}, "distill.methods": {"choice": [
    [{"type": "FGD", "weight": {"gradient_share": {"log": [0.01, 1]}}}],
    [{"type": "CrossKD", "reused_teacher_head_idx": {"choice": [0, 1]}}], [{"type": "PKD", "loss_weight": 6}]]}}
FILE = {"budget": {"runs": 10}, "shortest": 3, "seeds": [5, 6], "space": SPACE}


class Killed(BaseException):
    """In place of the end of the process."""


class FakeRun:
    """A run that has ended at once. The AP depends on the settings, and a little on length and seed."""

    calls, fails, dies_at = [], "", None

    def __init__(self, job, slot, at_once, device):
        if len(self.calls) == self.dies_at:
            raise Killed
        self.calls.append(job)
        self.returncode = 1 if self.fails and self.fails in job.name else 0
        job.work_dir.mkdir(parents=True, exist_ok=True)
        (job.work_dir / "output.txt").write_text("error: as was asked")
        if self.returncode:
            return
        cfg = json.loads(json.dumps(job.config))
        seed = cfg["train"]["seed"] = job.seed or 0
        cfg["model"]["head"]["num_classes"] = 6
        epochs = cfg["train"]["epochs"]
        methods = (cfg.get("distill") or {"methods": []})["methods"]
        ap = 0.2 + 0.001 * epochs + 0.01 * (seed % 5) + (0.1 * len(methods)) + 0.05 * ("CrossKD" in str(methods))
        ap -= abs(cfg["optimizer"]["lr"] - 0.01)
        (job.work_dir / "run.json").write_text(json.dumps({"config": cfg}))
        (job.work_dir / "metrics.jsonl").write_text(json.dumps({"epoch": epochs - 1, "step": epochs, "AP": ap}) + "\n")
        (job.work_dir / "last.pth").write_text(str(ap))

    def poll(self):
        return self.returncode

    def kill(self):
        pass


@pytest.fixture
def study(tmp_path, monkeypatch):
    scenes = generate_scenes(tmp_path / "scenes", train=4, val=2, size=(64, 64))
    cfg = config(scenes, 9, {"teacher": {"model": model(), "checkpoint": None}, "methods": [{"type": "FGD"}]})
    write_config(tmp_path / "base.yaml", cfg)
    write_config(tmp_path / "space.yaml", FILE | {"test": {
        "images": str(scenes / "train"), "annotations": str(scenes / "annotations" / "train.json")}})
    for name, value in (("calls", []), ("fails", ""), ("dies_at", None)):
        monkeypatch.setattr(FakeRun, name, value)
    evaluated = []
    monkeypatch.setattr(sweep, "start", FakeRun)
    monkeypatch.setattr(searching, "evaluate_checkpoint", lambda cfg, path, device: evaluated.append(path) or {
        "AP": float(Path(path).read_text()) - 0.1, "annotations": cfg.data.val.annotations})
    return tmp_path, evaluated


def run(study, *overrides, at_once=1, folder="work"):
    """The search, what it printed, and what it returned."""
    said = []
    search = open_search(study / "base.yaml", study / "space.yaml", overrides, study / folder, at_once, "cpu",
                         say=said.append)
    return search, said, finish(search)


def names(runs):
    return [job.name for job in runs]


def test_from_the_plan_to_the_verdict(study):
    study, evaluated = study
    search, said, text = run(study)
    plan = said[0].splitlines()
    assert plan[1:3] == ["rung 1: 6 runs of 3 epochs", "rung 2: 2 runs of 9 epochs"]
    assert plan[3].endswith("6 runs of 9 epochs: the winner, alone, base; with the seeds 5, 6")
    assert plan[4] == "expected cost: as much as 10.0 runs of full length"
    assert len(FakeRun.calls) == 6 + 2 + 6 and {job.seed for job in FakeRun.calls[:8]} == {0}
    assert names(FakeRun.calls[-6:]) == [f"{name}, seed {seed}" for name in ("winner", "alone", "base")
                                         for seed in (5, 6)]
    winner, alone, base = FakeRun.calls[-6::2]
    assert winner.config["distill"]["methods"][0]["type"] == "CrossKD" and winner.config.train.epochs == 9
    assert alone.config.distill is None and alone.config["optimizer"] == winner.config["optimizer"]
    assert dict(base.config) == dict(search.base.config)
    assert len(evaluated) == 6 and not list((study / "work").glob("c*/*/last.pth"))
    assert ("- over alone (the winner's settings without distillation): +15.0 ± 0.0 AP on test, 2 fresh seeds: pays"
            in text)
    assert (study / "work" / "search.md").read_text().startswith("winner: distill.methods=[{")


def test_the_winner_is_a_configuration(study):
    study, _ = study
    run(study)
    from kd.config import load_config

    winner = next(job for job in FakeRun.calls if job.name == "winner, seed 5")
    assert dict(load_config(study / "work" / "winner.yaml")) == json.loads(json.dumps(winner.config))


def test_short_runs_have_short_schedules(study):
    study, _ = study
    run(study)
    short = FakeRun.calls[3].config
    assert (short.train.epochs, short.schedule.warmup_steps, short.train.check_images) == (3, 1, 0)
    assert short.schedule.milestones == [0.3333]
    assert FakeRun.calls[0].config.train.check_images == 100  # the base configuration shows what the teacher can


@pytest.mark.parametrize("dies_at", [5, 6, 12])
def test_a_killed_search_goes_on_to_the_same_end(study, monkeypatch, dies_at):
    study, evaluated = study
    monkeypatch.setattr(FakeRun, "dies_at", dies_at)
    with pytest.raises(Killed):
        run(study)
    monkeypatch.setattr(FakeRun, "dies_at", None)
    _, _, text = run(study)
    there = names(FakeRun.calls)
    assert len(there) == len(set(there)) == 14 and len(evaluated) == 6
    if dies_at == 5:  # as if it had never been stopped, and whatever the number of runs at once
        FakeRun.calls.clear()
        assert run(study, at_once=2, folder="other")[2] == text and set(names(FakeRun.calls)) == set(there)


def test_the_test_images_are_evaluated_once(study, monkeypatch):
    study, evaluated = study
    before = run(study)[2]
    _, said, text = run(study)
    assert text == before and len(evaluated) == 6 and len(FakeRun.calls) == 14
    assert said[-1] == "6 of 6 runs are finished already"


def test_a_failed_run_cannot_win_and_is_reported(study, monkeypatch):
    study, _ = study
    monkeypatch.setattr(FakeRun, "fails", "c004")
    search, _, text = run(study)
    assert "failed  " in text
    with pytest.raises(TrainingError, match=r"1 run of the search failed \(c004\), which could not win"):
        check_failed(search)
    monkeypatch.setattr(FakeRun, "fails", "")
    assert run(study)[2] == text and len(FakeRun.calls) == 14  # what is decided stays


def test_nothing_is_decided_if_too_many_runs_fail(study, monkeypatch):
    study, _ = study
    monkeypatch.setattr(FakeRun, "fails", "c0")
    with pytest.raises(TrainingError, match="6 of 6 runs failed"):
        run(study)
    monkeypatch.setattr(FakeRun, "fails", "")
    run(study)
    assert len(FakeRun.calls) == 6 + 14


def test_a_failed_run_at_the_end(study, monkeypatch):
    study, evaluated = study
    monkeypatch.setattr(FakeRun, "fails", "alone, seed 6")
    with pytest.raises(TrainingError, match=r"1 of 6 runs failed \(alone, seed 6\)"):
        run(study)
    assert not evaluated
    monkeypatch.setattr(FakeRun, "fails", "")
    run(study)
    assert len(FakeRun.calls) == 15 and len(evaluated) == 6


def test_another_search_in_the_work_dir_is_refused(study):
    study, _ = study
    run(study)
    with pytest.raises(WorkDirError, match=r"another search \(optimizer.lr was 0.01 and is 0.02\)"):
        run(study, "optimizer.lr=0.02")
    run(study, "data.workers=1", "train.log_every=7")  # which change nothing
    file = yaml.safe_load((study / "space.yaml").read_text())
    write_config(study / "space.yaml", file | {"seeds": [5, 7], "space": SPACE | {"optimizer.lr": {"choice": [1, 2]}}})
    with pytest.raises(WorkDirError) as caught:
        run(study)
    assert "seeds was [5, 6] and is [5, 7]" in str(caught.value)
    assert 'space.optimizer.lr was {"log": [0.001, 0.1]} and is {"choice": [1, 2]}' in str(caught.value)
    (study / "work" / "search.json").write_text('{"about": 3}')
    with pytest.raises(WorkDirError, match="search.json is not that of a search"):
        run(study)
    assert len(FakeRun.calls) == 14


def test_a_budget_in_hours(study, monkeypatch):
    study, _ = study
    monkeypatch.setattr(searching, "seconds_of_run", lambda job: 300.0)  # of three epochs
    file = yaml.safe_load((study / "space.yaml").read_text())
    write_config(study / "space.yaml", file | {"budget": {"hours": 2.5}})
    _, said, _ = run(study)
    assert said[0] == "a short run of the base configuration shows how long runs take"
    plan = next(line for line in said if "expected cost" in line)
    assert "rung 1: 6 runs of 3 epochs" in plan and "about 2.5 hours" in plan  # 10 runs of 900 seconds
    assert names(FakeRun.calls).count("c000, 3 epochs") == 1


def test_a_budget_that_is_too_small(study):
    study, _ = study
    file = yaml.safe_load((study / "space.yaml").read_text())
    write_config(study / "space.yaml", file | {"budget": {"runs": 7}})
    with pytest.raises(ConfigError, match=r"budget: pays for 7 runs of 9 epochs. The end takes 6 \(2 seeds; the "
                                          r"winner, alone, base\), and it leaves 1 runs of full length"):
        run(study)
    assert not FakeRun.calls


def test_what_cannot_be_built_is_refused_before_any_run(study):
    study, _ = study
    methods = {"choice": [[{"type": "CrossKD", "reused_teacher_head_idx": {"choice": [0, 7]}}]]}
    write_config(study / "space.yaml", FILE | {"space": {"distill.methods": methods}})
    with pytest.raises(ConfigError, match=r"reused_teacher_head_idx: must be from 0 to 1.* not 7 \(.*space.yaml, with "
                                          r'distill.methods=\[{"reused_teacher_head_idx": 7'):
        run(study)
    assert not FakeRun.calls and not (study / "work").exists()


def test_the_teacher_is_trained_first(study):
    study, _ = study
    cfg = yaml.safe_load((study / "base.yaml").read_text())
    teacher = write_config(study / "teacher.yaml", {key: value for key, value in cfg.items() if key != "distill"})
    cfg["distill"]["teacher"] = {"cfg": str(teacher), "checkpoint": "runs/none/last.pth"}
    write_config(study / "base.yaml", cfg)
    check_search(study / "base.yaml", study / "space.yaml", [], teacher)
    finish(open_search(study / "base.yaml", study / "space.yaml", [], study / "work", 1, "cpu", teacher, lambda _: 0))
    assert names(FakeRun.calls)[:2] == ["teacher", "c000, 3 epochs"] and len(FakeRun.calls) == 15
    checkpoint = str(study / "work" / "teacher" / "last.pth")
    assert all(job.config["distill"]["teacher"]["checkpoint"] == checkpoint for job in FakeRun.calls
               if job.config.distill) and Path(checkpoint).is_file()


def test_a_student_alone_as_base(study):
    """Then `alone` and `base` are the same, and one of them is enough; and if it wins, there is nothing to compare."""
    study, _ = study
    cfg = yaml.safe_load((study / "base.yaml").read_text())
    distill = cfg.pop("distill")
    write_config(study / "base.yaml", cfg)
    write_config(study / "space.yaml", FILE | {"space": {"distill": {"choice": [distill, distill | {
        "methods": [{"type": "PKD"}]}]}}})
    _, said, text = run(study)
    assert "rung 1: 3 runs of 9 epochs" in said[0] and "the winner, base; with" in said[0] and "- over base" in text
    write_config(study / "space.yaml", FILE | {"space": {"optimizer.lr": {"choice": [0.5, 0.6]}}})
    _, _, text = run(study, folder="other")
    assert "the search found nothing better" in text and "data.val has also chosen the winner" in text


def test_optuna(study, monkeypatch):
    """It goes on after a stop, from its database; a failed run is not the winner."""
    optuna = pytest.importorskip("optuna", reason="needs the extra search")
    study, evaluated = study
    file = yaml.safe_load((study / "space.yaml").read_text())
    write_config(study / "space.yaml", file | {"engine": "optuna"})
    monkeypatch.setattr(FakeRun, "dies_at", 4)
    with pytest.raises(Killed):
        run(study, at_once=2)
    monkeypatch.setattr(FakeRun, "dies_at", None)
    monkeypatch.setattr(FakeRun, "fails", Path(FakeRun.calls[3].work_dir).parent.name)
    search, said, text = run(study, at_once=2)
    there, trials = names(FakeRun.calls), optuna.load_study(
        study_name=None, storage=f"sqlite:///{study / 'work' / 'optuna.db'}").trials
    assert len(set(there)) == len(there) and len(evaluated) == 6 and "c000" in text
    states = [trial.state.name for trial in trials]
    assert states.count("COMPLETE") >= 1 and states.count("PRUNED") >= 1
    assert max(trial.value for trial in trials if trial.state.name == "COMPLETE") == max(
        ap for ap in search.state["results"][-1]["AP"].values() if ap is not None)
    calls = len(there)
    assert run(study, at_once=2)[2] == text and len(FakeRun.calls) == calls
    with pytest.raises(TrainingError, match="The end is made where the study was started"):  # another machine
        write_config(study / "space.yaml", file | {
            "engine": "optuna", "storage": f"sqlite:///{study / 'work' / 'optuna.db'}"})
        run(study, folder="elsewhere")


def test_search_script(tmp_path, monkeypatch, capsys):
    """From nothing to the verdict, with real runs in this process."""
    monkeypatch.setattr(sweep, "start", lambda job, slot, at_once, device: RunHere(job.command(device), monkeypatch))
    scenes = generate_scenes(tmp_path / "scenes", train=4, val=2, size=(64, 64))
    write_checkpoint(tmp_path / "teacher.pth", config(scenes))
    write_config(tmp_path / "base.yaml", config(scenes, 1, {
        "teacher": {"model": model(), "checkpoint": str(tmp_path / "teacher.pth")}, "methods": [{"type": "FGD"}]}))
    write_config(tmp_path / "space.yaml", {
        "budget": {"runs": 4}, "seeds": [1], "against": ["alone"], "test": {
            "images": str(scenes / "train"), "annotations": str(scenes / "annotations" / "train.json")},
        "space": {"distill.methods": {"choice": [[{"type": "PKD", "weight": {"gradient_share": 0.1}}]]},
                  "optimizer.lr": {"choice": [0.01, 0.02]}}})
    words = ["--cfg", tmp_path / "base.yaml", "--search", tmp_path / "space.yaml", "--work-dir", tmp_path / "work",
             "--device", "cpu", "train.check_images=0"]
    assert run_script(monkeypatch, "sweep.py", *words) == 0
    printed = capsys.readouterr().out
    assert "rung 1: 2 runs of 1 epoch" in printed and "over alone" in printed and "1 seed: train at least 3" in printed
    figures = json.loads((tmp_path / "work" / "winner" / "seed1" / "test.json").read_text())
    assert figures["annotations"].endswith("train.json") and 0 <= figures["AP"] <= 1
    assert run_script(monkeypatch, "sweep.py", *words) == 0
    again = capsys.readouterr().out
    assert "seed 1: evaluated on" not in again and printed.split("candidate  AP")[1] == again.split("candidate  AP")[1]
