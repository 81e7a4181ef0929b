"""Weights & Biases and MLflow: what a run sends them, runs that go on without them, and runs that are resumed."""
import errno
import importlib
import json
import logging
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from runs import config, run_script, write_config

from data import generate_scenes
from data.extras import MissingExtra, check_installed
from kd.config import parse_config
from kd.config.loggers import PACKAGES
from kd.engine.loggers import LOGGERS, Loggers, open_loggers, without_secrets
from kd.engine.loggers.base import Logger, figures, keep_id, known_id
from kd.engine.loggers.to_mlflow import allowed, flat
from kd.exceptions import Stopped
from kd.processes import distributed
from models import ConfigError

ORIGIN = {"config": {"train": {"epochs": 2}, "data": {"scale": [64, 64]}}, "command": ["train.py", "--cfg", "a b"],
          "commit": "abc", "date": "2026-01-01T00:00:00+00:00"}
STEP = {"epoch": 0, "step": 3, "loss": 1.5, "share/FGD0": 0.25, "loss_fgd": None}
EVALUATION = {"epoch": 0, "step": 4, "AP": 0.5, "AP75": None, "per_class": {"ring": 0.75}, "out_of_patience": True}
NUMBERS = {"train/loss": 1.5, "share/FGD0": 0.25}, {"val/AP": 0.5, "val_class/ring": 0.75, "val/out_of_patience": 1}


class Log(logging.Logger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__("test")
        self.lines = []

    def handle(self, record):
        self.lines.append(record.getMessage())


def of_run(work_dir, step=0, *loggers):
    work_dir.mkdir(exist_ok=True)
    cfg = parse_config(config(work_dir) | {"train": {"loggers": list(loggers)}})
    return SimpleNamespace(work_dir=work_dir, step=step, cfg=cfg, val_loader=None, device=None)


@pytest.fixture
def tracked(tmp_path, monkeypatch):
    """A client of a new MLflow store."""
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    pytest.importorskip("sqlalchemy", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'store.db'}")
    monkeypatch.chdir(tmp_path)
    return mlflow.MlflowClient()


@pytest.fixture
def offline(monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield wandb
    wandb.teardown()


def test_the_numbers_of_records():
    assert (figures(STEP), figures(EVALUATION)) == NUMBERS


def test_mlflow(tmp_path, tracked):
    log = Log()
    with open_loggers(of_run(tmp_path / "run", 0, "mlflow"), ORIGIN, log) as loggers:
        loggers.show(STEP)
        loggers.show(EVALUATION)
    run = tracked.get_run(known_id(tmp_path / "run", "mlflow"))
    assert run.data.metrics == pytest.approx(NUMBERS[0] | NUMBERS[1] | {"epoch": 0})
    assert run.data.params == {"train.epochs": "2", "data.scale.0": "64", "data.scale.1": "64"}
    assert (run.info.status, run.info.run_name) == ("FINISHED", str(tmp_path / "run"))
    assert run.data.tags["command"] == "train.py --cfg 'a b'" and run.data.tags["commit"] == "abc"

    changed = ORIGIN | {"config": {"train": {"epochs": 3, "seed": 1}}}
    with pytest.raises(Stopped), open_loggers(of_run(tmp_path / "run", 4, "mlflow"), changed, log) as loggers:
        loggers.show(STEP | {"step": 5})
        raise Stopped(15, "stopped")
    run, = tracked.search_runs([run.info.experiment_id])  # the same one
    assert [each.step for each in tracked.get_metric_history(run.info.run_id, "train/loss")] == [3, 5]
    assert (run.data.params["train.epochs"], run.data.tags["train.epochs"], run.data.params["train.seed"],
            run.info.status) == ("2", "3", "1", "KILLED")
    keep_id(tmp_path / "run", "mlflow", "0" * 32)  # not in this store
    with open_loggers(of_run(tmp_path / "run", 4, "mlflow"), ORIGIN, log):
        pass
    assert len(tracked.search_runs([run.info.experiment_id])) == 2 and log.lines == []


def test_wandb(tmp_path, offline):
    log = Log()
    for step in (0, 3):
        with open_loggers(of_run(tmp_path / "run", step, "wandb"), ORIGIN, log) as loggers:
            run = loggers.active["wandb"].open
            assert run.id == known_id(tmp_path / "run", "wandb") and run.name == str(tmp_path / "run")[-128:]
            assert run.config["train"] == {"epochs": 2} and run.config["run"]["command"] == ORIGIN["command"]
            loggers.show(STEP | {"step": step + 1})
            loggers.show(EVALUATION)
            summary = dict(run.summary)
        assert NUMBERS[0].items() <= summary.items() and summary["val/AP"] == 0.5 and summary["step"] == 4
    folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    # offline-run-TIME-ID, and a number behind it for a second folder in the same second.
    assert {folder.name.split("-")[3] for folder in folders} == {run.id} and log.lines == []


@pytest.mark.parametrize("action", ["start", "show", "pictures", "end"])
def test_one_that_fails_is_switched_off_with_one_warning(action):
    class Fails(Logger):
        calls = []

        def __getattribute__(self, name):
            if name == action:
                Fails.calls.append(name)
                raise OSError(errno.ENOSPC, "no room\nat all")
            return super().__getattribute__(name)

    class Counts(Logger):
        seen = []

        def show(self, record):
            Counts.seen.append(record)
    log = Log()
    with Loggers({"wandb": Fails(), "mlflow": Counts()}, log) as loggers:
        for _ in range(2):
            loggers.show(STEP)
            loggers.pictures(1, {})
    assert Fails.calls == [action] and len(Counts.seen) == 2 and list(loggers.active) == ["mlflow"]
    line, = log.lines
    assert line.startswith("wandb failed and is switched off, the run goes on without it: [Errno 28] no room at all")


def test_a_run_whose_loggers_fail_ends_as_without_them(tmp_path, monkeypatch, capsys):
    scenes = generate_scenes(tmp_path / "scenes", train=4, val=2, size=(64, 64))
    path = write_config(tmp_path / "cfg.yaml", config(scenes, 1) | {"eval": {"every": 1}})
    for name in ("wandb", "mlflow"):  # packages that cannot do anything
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    pytest.importorskip("tensorboard", reason="needs the extra viz")
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(writer, "add_scalar", full)
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", tmp_path / "run", "--device", "cpu",
                      "train.loggers=[wandb, mlflow, tensorboard]") == 0
    log = (tmp_path / "run" / "train.log").read_text()
    for name in LOGGERS:
        assert log.count(f"{name} failed and is switched off") == 1, log
    assert "tensorboard cannot be written (disk full)" in log and (tmp_path / "run" / "best.pth").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_only_the_first_process_logs(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert open_loggers(of_run(tmp_path / "run", 0, *LOGGERS), {}, Log()).active == {}


def test_missing_packages_are_one_line(tmp_path, monkeypatch, capsys):
    scenes = generate_scenes(tmp_path / "scenes", train=2, val=1, size=(64, 64))
    path = write_config(tmp_path / "cfg.yaml", config(scenes, 1))
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", tmp_path / "run",
                          f"train.loggers=[{name}]") == 2
        assert capsys.readouterr().err.strip() == (
            f"error: train.loggers needs {name}, which is not installed: pip install 'densekd[{name}]', or pip install "
            f"{name}")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_the_name_of_a_package_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtra, match="a key needs no_such_package, which is not installed"):
        check_installed("no_such_package", "extra", "a key")
    check_installed("pytest", "test", "a key")


def test_wrong_settings(tmp_path):
    cfg = config(tmp_path)
    for given, problem in ((["wandb", "wandb"], "train.loggers: has wandb twice: name each once"),
                           (["comet"], "train.loggers.0: must be one of tensorboard, wandb, mlflow, not text"),
                           ("wandb", "train.loggers: must be a list, not text")):
        with pytest.raises(ConfigError) as caught:
            parse_config(cfg | {"train": {"loggers": given}})
        assert str(caught.value).startswith(problem)


def test_tensorboard_in_both_ways():
    assert set(LOGGERS) == set(PACKAGES)
    for train, found in (({"tensorboard": True}, {"tensorboard": "train.tensorboard"}), ({}, {}),
                         ({"loggers": ["wandb"]}, {"wandb": "train.loggers"}),
                         ({"loggers": ["tensorboard"], "tensorboard": True}, {"tensorboard": "train.loggers"})):
        assert parse_config(config(Path(".")) | {"train": train}).train.all_loggers == found


def test_texts_for_mlflow():
    assert allowed("val_class/Löwe (a)") == "val_class/L_f6we _28a_29" and allowed("val_class/..") == "val_class/_"
    assert flat({"a": {"b": [1, {"c": None}], "d": {}}, "e": "x" * 600}) == {
        "a.b.0": "1", "a.b.1.c": "null", "a.d": "{}", "e": "x" * 500}


def test_addresses_are_sent_without_secrets():
    given = json.dumps({"init": "https://me:word@host/a.pth?token=b", "images": "https://host/a b", "cfg": "a@b?c"})
    assert json.loads(without_secrets(given)) == {
        "init": "https://host/a.pth", "images": "https://host/a b", "cfg": "a@b?c"}


def test_the_runs_names_survive_a_broken_file(tmp_path):
    for text in ("", "[]", '{"wandb": 3}'):
        (tmp_path / "loggers.json").write_text(text)
        assert known_id(tmp_path, "wandb") is None
    keep_id(tmp_path, "wandb", "a")
    keep_id(tmp_path, "mlflow", "b")
    assert (known_id(tmp_path, "wandb"), known_id(tmp_path, "mlflow")) == ("a", "b")
