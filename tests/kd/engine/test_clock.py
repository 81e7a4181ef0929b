"""Where the time of a step goes, and what a run says of it."""
import json
import re
import time
from types import SimpleNamespace

import pytest
import torch
from runs import config, model

from data import generate_scenes
from kd.config import parse_config
from kd.engine import clock as clocks
from kd.engine import train as engine
from kd.engine.clock import PartsClock, parts_of
from kd.engine.run import build_run

CPU = torch.device("cpu")
DISTILL = {"teacher": {"model": model(), "checkpoint": None},
           "methods": [{"type": "CrossKD", "reused_teacher_head_idx": 1}, {"type": "FGD", "weight": 0.5}]}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp("scenes"), train=8, val=2, size=(64, 64))


def test_the_clock_adds_up(monkeypatch):
    """Two steps with times that are known; only the first ones are timed if there are too many."""
    now = SimpleNamespace(at=0.0)
    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: now.at))
    clock = PartsClock(CPU)

    def loader():
        for wait in (1.0, 3.0):
            now.at += wait
            yield wait

    for _ in clock.waits(loader()):
        clock.start()
        for part, seconds in (("student", 2), ("teacher", 1), ("student", 3), ("optimizer", 0.5)):
            now.at += seconds
            clock.mark(part)
    found = clock.read()
    assert found == {"seconds/data": 2, "seconds/student": 5, "seconds/teacher": 1, "seconds/optimizer": 0.5}
    assert parts_of(found | {"loss": 3}) == {"data": "24%", "student": "59%", "teacher": "12%", "optimizer": "6%"}
    clock.mark("student")  # outside of a step: nobody asks
    assert clock.read() == {} == parts_of({"loss": 3})
    monkeypatch.setattr(clocks, "MOST", 1)
    for step in range(3):
        clock.start()
        now.at += 1 + step
        clock.mark("student")
    assert clock.read() == {"seconds/student": 1}


def test_a_run_says_where_its_time_goes(scenes, tmp_path, monkeypatch):
    """In metrics.jsonl, in the log, and on the progress bar."""
    shown = []
    monkeypatch.setattr(engine.tqdm, "set_postfix", lambda bar, values: shown.append(values))
    engine.train(config(scenes, 1, DISTILL), tmp_path, CPU)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    for line in steps:
        parts = [line[f"seconds/{part}"] for part in clocks.PARTS]
        assert min(parts) > 0 and sum(parts) <= line["seconds/step"] and line["seconds/left"] >= 0
        assert sum(parts) > 0.5 * line["seconds/step"]
    assert not any(key.startswith("seconds/") for line in lines if "AP" in line for key in line)
    log = (tmp_path / "train.log").read_text()
    found = re.findall(r" share/CrossKD0 \S+ share/FGD1 .*, time: data (\d+)% student (\d+)% teacher (\d+)% methods "
                       r"(\d+)% backward (\d+)% optimizer (\d+)%, \d:\d\d:\d\d left\n", log)
    assert len(found) == len(steps) == 2 and all(95 < sum(map(int, line)) < 105 for line in found)
    assert len(shown) == 2 and list(shown[0]) == ["loss", "run_left", "CrossKD0", "FGD1", *clocks.PARTS]
    assert shown[0]["FGD1"].endswith("%")


def test_a_plain_run_has_no_teacher(scenes, tmp_path):
    engine.train(config(scenes, 1), tmp_path, CPU)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert {key for key in line if key.startswith("seconds/")} == {
        f"seconds/{part}" for part in ("step", "left", "data", "student", "backward", "optimizer")}


def test_a_slow_teacher_is_seen(scenes, tmp_path, monkeypatch):
    run = build_run(parse_config(config(scenes, 1, DISTILL)), tmp_path, CPU)
    run.model.train()
    monkeypatch.setattr(run.distiller, "answers", lambda *args, real=run.distiller.answers: (time.sleep(0.3),
                                                                                            real(*args))[1])
    engine.train_step(run, run.model, [next(iter(run.train_loader))])
    found = run.clock.read()
    assert found["seconds/teacher"] > 0.3 and found["seconds/methods"] < 0.3


def test_on_a_gpu_the_time_is_that_between_events(monkeypatch):
    """With events that tell the number of their record; the device is waited for in `read` alone."""
    made, waited = [], []

    class Event:
        def __init__(self):
            made.append(self)
            self.at = 1000.0 * len(made)

        def elapsed_time(self, later):
            return later.at - self.at

        def synchronize(self):
            waited.append(self)

    monkeypatch.setattr(clocks, "recorded_event", Event)
    clock = PartsClock(torch.device("cuda"))
    for _ in clock.waits(range(2)):
        clock.start()
        for part in ("student", "teacher", "student"):
            clock.mark(part)
    assert not waited
    found = clock.read()
    assert len(made) == 8 and len(waited) == 2 and 0 < found.pop("seconds/data") < 1
    assert found == {"seconds/student": 2, "seconds/teacher": 1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_clock_does_not_wait_on_a_gpu():
    clock, x = PartsClock(torch.device("cuda")), torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        before = time.perf_counter()
        clock.start()
        for part, times in (("student", 1), ("teacher", 40)):
            for _ in range(times):
                x = x @ x * 1e-4
            clock.mark(part)
        launched = time.perf_counter() - before
    finally:
        torch.cuda.set_sync_debug_mode("default")
    x.sum().item()
    found = clock.read()
    assert found["seconds/teacher"] > 10 * found["seconds/student"] > 0
    assert sum(found.values()) > launched
