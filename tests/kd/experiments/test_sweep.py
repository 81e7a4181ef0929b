"""Sweeps: what runs, in which order, and after a stop; with a replacement for train.py, and once with train.py."""
import copy
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from runs import config, run_script, write_config

from data import DataError, generate_scenes
from kd.exceptions import Stopped, TrainingError, WorkDirError
from kd.experiments import sweep
from kd.experiments.sweep import check_plan, plan, run_jobs
from kd.work_dir.checkpoint import save_checkpoint
from kd.work_dir.lock import open_work_dir
from models import ConfigError

# Writes the files that train.py writes; files beside it make it fail, or wait for another run or a signal.
STAND_IN = """
import json, os, pathlib, signal, sys, time
words, here = sys.argv[1:], pathlib.Path(__file__).parent
work_dir = pathlib.Path(words[words.index("--work-dir") + 1])
cfg = json.loads((here / "configs.json").read_text())[str(work_dir)]
with open(here / "calls.jsonl", "a") as file:
    gpu, threads = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"]
    file.write(json.dumps({"run": str(work_dir.relative_to(here)), "words": words, "threads": threads, "gpu": gpu,
                           "mkl": os.environ["MKL_NUM_THREADS"]}) + "\\n")
if (here / "fail").exists() and work_dir.match((here / "fail").read_text()):
    sys.exit("error: as was asked")
if (here / "meet").exists():
    begun = time.time()
    while len((here / "calls.jsonl").read_text().splitlines()) < 2:
        time.sleep(0.01)
        if time.time() - begun > 20:
            sys.exit("error: alone")
if (here / "wait").exists():
    signal.signal(signal.SIGTERM, lambda *_: ((here / "asked").write_text("x"), os._exit(143)))
    (here / "ready").write_text("x")
    time.sleep(20)
(work_dir / "run.json").write_text(json.dumps({"config": cfg}))
epochs = cfg["train"]["epochs"]
(work_dir / "metrics.jsonl").write_text(json.dumps({"epoch": epochs - 1, "step": 3 * epochs, "AP": 0.25}) + "\\n")
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Configurations of a teacher, a student and a distilled student, and the stand-in."""
    (tmp_path / "train.py").write_text(STAND_IN)
    monkeypatch.setattr(sweep, "TRAIN", tmp_path / "train.py")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    teacher = write_config(tmp_path / "teacher.yaml", config(Path("scenes"), 5))
    write_config(tmp_path / "student.yaml", config(Path("scenes"), 2))
    write_config(tmp_path / "fgd.yaml", config(Path("scenes"), 2, {
        "teacher": {"cfg": str(teacher), "checkpoint": "runs/nowhere/last.pth"}, "methods": [{"type": "FGD"}]}))
    return tmp_path


def plan_all(study, *overrides, seeds=(0, 1), teacher=True):
    jobs = plan([study / "student.yaml", study / "fgd.yaml"], seeds, study / "work", overrides,
                study / "teacher.yaml" if teacher else None)
    recorded = {str(job.work_dir): copy.deepcopy(dict(job.config)) for job in jobs}
    for job in jobs:
        recorded[str(job.work_dir)]["train"]["seed"] = job.seed or 0
        recorded[str(job.work_dir)]["model"]["head"]["num_classes"] = 6  # as train.py takes it from the annotations
    (study / "configs.json").write_text(json.dumps(recorded))
    return jobs


def calls(study):
    file = study / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run(jobs, at_once=1):
    said = []
    run_jobs(jobs, at_once, "cpu", said.append)
    return said


def test_plan(study):
    jobs = plan_all(study, "data.workers=1", "train.epochs=3", "distill.methods.0.temp=0.7")
    assert [str(job.work_dir.relative_to(study / "work")) for job in jobs] == [
        "teacher", "student/seed0", "student/seed1", "fgd/seed0", "fgd/seed1"]
    teacher, student, *_, fgd = jobs
    assert teacher.overrides == ["data.workers=1"] and teacher.config["train"]["epochs"] == 5
    assert student.overrides == ["data.workers=1", "train.epochs=3"] and student.waits is None
    assert fgd.config["distill"]["methods"][0]["temp"] == 0.7 and fgd.waits is teacher
    assert fgd.config["distill"]["teacher"]["checkpoint"] == str(study / "work" / "teacher" / "last.pth")
    assert fgd.command("cpu")[-1] == "train.seed=1" and "--resume" not in fgd.command("cpu")


def test_configurations_of_one_name_have_folders_of_their_own(study):
    (study / "other").mkdir()
    write_config(study / "other" / "student.yaml", config(Path("scenes"), 2))
    jobs = plan([study / "student.yaml", study / "other" / "student.yaml"], [0], study / "work")
    assert [job.work_dir.parent.name for job in jobs] == [f"{study.name}_student", "other_student"]


def test_bad_plans(study):
    with pytest.raises(ConfigError, match="nowhere/last.pth does not exist .*fgd.yaml.: train it first"):
        plan_all(study, teacher=False)
    with pytest.raises(ConfigError, match="no configuration has this file as its distill.teacher.cfg"):
        plan([study / "student.yaml"], [0], study / "work", teacher=study / "teacher.yaml")
    with pytest.raises(ConfigError, match="data.val: missing"):
        plan([study / "student.yaml"], [0], study / "work", ["data.val=null"])
    with pytest.raises(ConfigError, match="nowhere/last.pth does not exist"):
        check_plan([study / "fgd.yaml"], [], None)
    with pytest.raises(DataError, match="annotation file"):  # and nothing about the teacher, which is trained first
        check_plan([study / "fgd.yaml"], [], study / "teacher.yaml")


def test_every_run_once_and_the_teacher_first(study):
    said = run(plan_all(study))
    assert [call["run"] for call in calls(study)] == [
        "work/teacher", "work/student/seed0", "work/student/seed1", "work/fgd/seed0", "work/fgd/seed1"]
    assert "student seed 1: AP 25.0 after" in " ".join(said)
    assert calls(study)[0]["threads"] == str(len(os.sched_getaffinity(0)))
    assert run(plan_all(study)) == ["5 of 5 runs are finished already"] and len(calls(study)) == 5
    plan_all(study, seeds=(0, 1, 2))
    run(plan_all(study, seeds=(0, 1, 2)))
    assert [call["run"] for call in calls(study)[5:]] == ["work/student/seed2", "work/fgd/seed2"]


def test_a_run_that_was_stopped_is_resumed(study):
    jobs = plan_all(study)
    folder = study / "work" / "student" / "seed1"
    folder.mkdir(parents=True)
    save_checkpoint(folder / "last.pth", {"step": 3})
    run(jobs)
    assert [call["run"] for call in calls(study) if "--resume" in call["words"]] == ["work/student/seed1"]


def test_several_at_once(study):
    (study / "meet").touch()  # the first two wait for each other
    run(plan_all(study), at_once=2)
    assert {call["run"] for call in calls(study)[:2]} == {"work/teacher", "work/student/seed0"}
    assert [call["run"] for call in calls(study)].index("work/fgd/seed0") > 1
    assert calls(study)[0]["threads"] == str(max(1, len(os.sched_getaffinity(0)) // 2))


def test_each_gpu_has_its_run(study, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (study / "meet").touch()
    run_jobs(plan_all(study), 2, "cuda", lambda line: None)
    assert {call["gpu"] for call in calls(study)[:2]} == {"2", "5"}
    assert all((call["threads"], call["mkl"]) == ("3", "3") for call in calls(study))


def test_a_work_dir_in_use_is_waited_for(study):
    jobs, said = plan([study / "student.yaml"], [0, 1], study / "work"), []
    plan_all(study)  # what the stand-in reads
    lock = open_work_dir(jobs[0].work_dir)

    def say(line):
        said.append(line)
        if line.startswith("student seed 1: AP"):
            lock.close()

    run_jobs(jobs, 1, "cpu", say)
    assert [call["run"] for call in calls(study)] == ["work/student/seed1", "work/student/seed0"]
    assert sum("student seed 0: another process is at work in" in line for line in said) == 1


def test_a_run_that_another_process_has_started_meanwhile(study, monkeypatch):
    """It fails because of the lock, and is looked at again when that is free; the other process has finished it."""
    job, = plan([study / "student.yaml"], [0], study / "work")
    plan_all(study)
    taken = []

    class TooLate:
        returncode = 2

        def __init__(self, *arguments):
            taken.append(open_work_dir(job.work_dir))

        def poll(self):
            return 2

    def say(line):
        if "another process" in line:
            subprocess.run([sys.executable, sweep.TRAIN, "--work-dir", job.work_dir], check=True, env=os.environ | {
                "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
            taken[0].close()

    monkeypatch.setattr(sweep, "start", TooLate)
    run_jobs([job], 1, "cpu", say)
    assert len(taken) == 1 and job.finished()


def test_the_others_are_run_though_one_fails(study):
    (study / "fail").write_text("student/seed0")
    with pytest.raises(TrainingError, match=r"1 of 5 runs failed \(student seed 0\)"):
        run(plan_all(study))
    assert len(calls(study)) == 5
    (study / "fail").unlink()
    run(plan_all(study))
    assert [call["run"] for call in calls(study)[5:]] == ["work/student/seed0"]


def test_nothing_is_distilled_from_a_teacher_that_failed(study):
    (study / "fail").write_text("work/teacher")
    said = []
    with pytest.raises(TrainingError, match="3 of 5 runs failed"):
        run_jobs(plan_all(study), 1, "cpu", said.append)
    assert len(calls(study)) == 3 and "teacher: failed with exit code 1: error: as was asked" in said
    assert "fgd seed 0: not run, because its teacher is not trained" in said


def test_another_configuration_in_the_work_dir_is_refused(study):
    run(plan_all(study))
    with pytest.raises(WorkDirError, match="holds a run of another configuration"):
        run(plan_all(study, "train.epochs=4"))
    run(plan_all(study, "train.log_every=7"))  # which changes nothing


def test_a_signal_stops_the_runs_after_they_have_saved(study):
    (study / "wait").touch()
    jobs = plan_all(study)

    def interrupt():
        while not (study / "ready").exists():
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Stopped) as caught:
        run(jobs)
    assert caught.value.signum == signal.SIGINT and (study / "asked").exists() and len(calls(study)) == 1


def test_sweep_script(tmp_path, monkeypatch, capsys):
    """From nothing to the table, with real runs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    scenes = generate_scenes(tmp_path / "scenes", train=4, val=2, size=(64, 64))
    teacher = write_config(tmp_path / "teacher.yaml", config(scenes, 1))
    write_config(tmp_path / "fgd.yaml", config(scenes, 1, {
        "teacher": {"cfg": str(teacher), "checkpoint": "runs/teacher/last.pth"}, "methods": [{"type": "FGD"}]}))
    arguments = ["--cfg", tmp_path / "fgd.yaml", "--teacher", teacher, "--work-dir", tmp_path / "work", "--device",
                 "cpu", "--seeds", 3, "train.check_images=0"]
    assert run_script(monkeypatch, "sweep.py", *arguments) == 0
    printed = capsys.readouterr().out
    assert "[2/2] fgd seed 3: into" in printed and "AP in points" in printed
    assert "| fgd/seed3 | FGD | 3 |" in (tmp_path / "work" / "table.md").read_text()
    recorded = json.loads((tmp_path / "work" / "fgd" / "seed3" / "run.json").read_text())
    assert recorded["config"]["train"]["seed"] == 3
    assert list(recorded["teachers"]) == [str(tmp_path / "work" / "teacher" / "last.pth")]
    assert run_script(monkeypatch, "sweep.py", *arguments) == 0  # if everything is done, only the table
    assert "2 of 2 runs are finished already" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, expected", [
    (["--seeds", "1", "1"], "whole numbers, each once"), (["--seeds", "train.epochs=1"], "whole numbers"),
    (["--seeds", "1", "-2"], "--seeds: must be from 0 to 4294967295, not -2"),
    (["--seeds", "one"], "--seeds: must be an integer, not text ('one')"),
    (["--jobs", "0"], "--jobs: must be from 1 to 1000, not 0")])
def test_bad_arguments(monkeypatch, capsys, arguments, expected):
    assert run_script(monkeypatch, "sweep.py", "--cfg", "configs/bccd/student_gfl_r18w16.yaml", *arguments) == 2
    assert expected in capsys.readouterr().err
