"""The scripts in several processes: with torchrun, also when it restarts them, and with its environment alone."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import ROOT, assert_they_end, config, config_with, model, start_processes, write_checkpoint, write_config

from data import generate_scenes
from kd.processes.distributed import fresh_store


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A data set whose number of images no number of processes divides."""
    return generate_scenes(tmp_path_factory.mktemp("scenes"), train=13, val=7, size=(64, 64))


def test_the_figures_are_the_same_to_the_byte_on_any_number_of_processes(scenes, tmp_path):
    cfg = config_with(config(scenes), model={"test": {"score_thr": 0.0}}, eval={"batch_size": 2})
    checkpoint = write_checkpoint(tmp_path / "weights.pth", cfg)
    path, written = write_config(tmp_path / "cfg.yaml", cfg), {}
    for world in (1, 2, 3):
        out, curves = tmp_path / f"{world}.json", tmp_path / f"{world}.curves.json"
        processes = start_processes(world, tmp_path / "log", "eval.py", "--cfg", path, "--checkpoint", checkpoint,
                                    "--device", "cpu", "--out", out, "--curves", curves)
        assert_they_end(processes, 0, tmp_path / "log")
        written[world] = out.read_bytes(), curves.read_bytes()
    assert written[1] == written[2] == written[3]
    assert json.loads(written[1][0])["AR100"] > 0  # there is something to differ in


def workers_of(launcher: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the processes are found in Linux's /proc")
def test_torchrun_goes_on_after_a_process_is_killed(scenes, tmp_path):
    """The weights are the same, bit for bit, as those of an undisturbed run."""
    distill = {"teacher": {"model": model(), "checkpoint": None},
               "methods": [{"type": "CrossKD", "reused_teacher_head_idx": 1, "sync_stats": True}, {"type": "MGD"}]}
    cfg = config_with(config(scenes, 3, distill), data={"batch_size": 2}, optimizer={"momentum": 0.9},
                      eval={"every": 0}, train={"ema": 0.5, "checkpoint_every": 1, "check_images": 0})
    path, whole, parts = write_config(tmp_path / "cfg.yaml", cfg), tmp_path / "whole", tmp_path / "parts"
    processes = start_processes(2, tmp_path / "log", "train.py", "--cfg", path, "--device", "cpu", "--work-dir", whole)
    assert_they_end(processes, 0, tmp_path / "log")
    assert sorted(file.name for file in whole.iterdir()) == [
        "best.pth", "last.pth", "metrics.jsonl", "precision_recall.json", "run.json", "run.lock", "train.log"]
    assert (tmp_path / "log").read_text().count("step 12/12") == 1  # only the first process prints
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                "--max-restarts", "1", "--monitor-interval", "0.1"]
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen([*torchrun, ROOT / "scripts/train.py", "--cfg", path, "--device", "cpu",
                                     "--work-dir", parts], stdout=log, stderr=log)
    try:
        while not (parts / "metrics.jsonl").exists() or '"step": 5,' not in (parts / "metrics.jsonl").read_text():
            assert launcher.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.005)
        os.kill(workers_of(launcher)[-1], signal.SIGKILL)
        assert launcher.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    finally:
        launcher.terminate()
    assert "exitcode: -9" in (tmp_path / "log").read_text()
    assert re.search(r"resumed at step \d+", (parts / "train.log").read_text())
    states = [torch.load(folder / "last.pth", weights_only=True) for folder in (whole, parts)]
    for part in ("model", "training", "methods"):
        assert states[0][part].keys() == states[1][part].keys()
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name
    lines = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))


def test_a_signal_to_one_process_stops_all_after_saving(scenes, tmp_path):
    cfg = config_with(config(scenes, 1000), data={"batch_size": 2}, eval={"every": 0})
    path, work_dir, log = write_config(tmp_path / "cfg.yaml", cfg), tmp_path / "run", tmp_path / "log"
    processes = start_processes(2, log, "train.py", "--cfg", path, "--device", "cpu", "--work-dir", work_dir)
    while not (work_dir / "metrics.jsonl").exists() or '"step": 5,' not in (work_dir / "metrics.jsonl").read_text():
        assert all(process.is_alive() for process in processes), log.read_text()
        time.sleep(0.005)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert_they_end(processes, 128 + signal.SIGTERM, log)
    (last, *_) = re.findall(r"stopped at step (\d+) after saving", log.read_text())
    assert torch.load(work_dir / "last.pth", weights_only=True)["step"] == int(last)


def test_the_store_of_a_restart():
    """Only torchrun's own store is replaced, and only if all processes know the number of restarts."""
    alone = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert fresh_store(alone) == fresh_store(alone | {"TORCHELASTIC_USE_AGENT_STORE": "False"}) == {}
    assert fresh_store(alone | {"WORLD_SIZE": "4", "TORCHELASTIC_USE_AGENT_STORE": "True"}) == {}
