"""Runs that go on: after a break within an epoch, a kill or a full disk, and from damaged checkpoints."""
import json
import random
import re
import resource
import shutil
import signal
import time

import pytest
import torch
from processes import context
from runs import (
    assert_same,
    config,
    config_with,
    in_file,
    model,
    script,
    steps_in,
    write_config,
)

from data import generate_scenes
from kd.config import parse_config
from kd.engine import train as engine
from kd.engine.run import build_run, describe_run, restore_run, save_run
from kd.work_dir.checkpoint import read_checkpoint
from kd.work_dir.records import read_run
from models.weights import CheckpointError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp("scenes"), train=14, val=4, size=(64, 64))


def test_a_run_that_breaks_off_within_an_epoch_goes_on_exactly(scenes, tmp_path, monkeypatch):
    """Resume with accumulation (the last group of an epoch is shorter), momentum, a weight average, masks, and weights
    that are measured at some of the steps."""
    distill = {"teacher": {"model": model(), "checkpoint": None}, "methods": [
        {"type": "MGD", "weight": {"gradient_share": 0.3, "gradient_share_every": 3}},
        {"type": "FGD", "weight": {"gradient_share": 1}, "every": 2}]}
    cfg = config_with(config(scenes, 3, distill), data={"batch_size": 2}, optimizer={"momentum": 0.9},
                      train={"accumulate": 3, "ema": 0.5, "checkpoint_every": 1, "check_images": 0})
    engine.train(cfg, tmp_path / "whole", CPU)
    taken, original = [], engine.train_step

    def stop_in_time(run, model, batches):
        taken.append(len(batches))
        if len(taken) == 6:
            raise KeyboardInterrupt
        return original(run, model, batches)

    monkeypatch.setattr(engine, "train_step", stop_in_time)
    with pytest.raises(KeyboardInterrupt):
        engine.train(cfg, tmp_path / "parts", CPU)
    broken_off = read_checkpoint(tmp_path / "parts" / "last.pth")
    assert taken == [3, 3, 1, 3, 3, 1] and broken_off["step"] == 5
    monkeypatch.undo()
    engine.train(cfg, tmp_path / "parts", CPU, tmp_path / "parts" / "last.pth")
    whole, parts = (read_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "parts"))
    assert_same(whole, parts)
    assert 0 < broken_off["seconds"] < parts["seconds"]
    assert whole["gradient_shares"]["times"].tolist() == [7, 5] and (whole["gradient_shares"]["counts"] > 0).all()
    assert steps_in(tmp_path / "whole") == steps_in(tmp_path / "parts") == (list(range(1, 10)), [0, 1, 2])
    weights = [[line for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
               for name in ("whole", "parts")]
    weights = [[(json.loads(line)["weight/MGD0"], json.loads(line).get("weight/FGD1")) for line in lines]
               for lines in weights]
    assert weights[0] == weights[1] and [fgd is None for _, fgd in weights[0]] == [False, True] * 4 + [False]
    log = (tmp_path / "parts" / "train.log").read_text()
    assert log.count("MGD0: its weight is") == 2 and "for a gradient_share of 0.3" in log  # of both starts


def test_the_time_of_training_goes_on_with_a_run(scenes, tmp_path):
    """A checkpoint of an earlier version has no time: then the run does not make one up."""
    run = build_run(parse_config(config(scenes)), tmp_path, CPU)
    run.spend(2.5)
    run.peak = 10 ** 15  # of the part before
    save_run(run, "last.pth")
    state = read_checkpoint(tmp_path / "last.pth")
    for seconds, expected in ((2.5, {"training_seconds": 4.0}), (None, {})):
        run = build_run(parse_config(config(scenes)), tmp_path, CPU)
        restore_run(run, state | {"seconds": seconds}, tmp_path / "last.pth")
        run.spend(1.5)
        assert run.costs() == expected | {"peak_memory_bytes": 10 ** 15}


def test_a_share_may_be_set_when_a_run_goes_on(scenes, tmp_path):
    """The weight was a number before: it is measured from then on, in the first step, too."""
    def cfg(weight, epochs):
        distill = {"teacher": {"model": model(), "checkpoint": None}, "methods": [{"type": "FGD", "weight": weight}]}
        return config_with(config(scenes, epochs, distill), train={"check_images": 0})

    engine.train(cfg(2.0, 1), tmp_path, CPU)
    assert read_checkpoint(tmp_path / "last.pth")["gradient_shares"] == {}
    engine.train(cfg({"gradient_share": 0.5}, 2), tmp_path, CPU, tmp_path / "last.pth")
    log = (tmp_path / "train.log").read_text()
    assert 'distill.methods.0.weight was 2.0 and is {"gradient_share": 0.5' in log
    state = read_checkpoint(tmp_path / "last.pth")["gradient_shares"]
    assert (state["times"].tolist(), state["last"].tolist()) == ([4], [7])  # each of the second epoch's steps


def test_a_run_goes_on_in_fp16(scenes, tmp_path):
    """A run can also change to it, although its checkpoint has no loss scale."""
    for epochs, amp, resume_from in ((1, "none", None), (2, "fp16", tmp_path / "last.pth")):
        engine.train(config_with(config(scenes, epochs), train={"amp": amp}), tmp_path, CPU, resume_from)
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"loss"' in line][-1]
    assert last["step"] == 8 and last["loss_scale"] == 65536


@pytest.fixture(scope="module")
def done(scenes, tmp_path_factory):
    """The checkpoint of a finished run."""
    path = tmp_path_factory.mktemp("done")
    engine.train(config(scenes, 1), path, CPU)
    return path / "last.pth"


@pytest.mark.parametrize("entries, part", [
    ({"step": -1}, "is damaged: step: must be at least 0, not -1"), ({"step": "a"}, "step: must be an integer"),
    ({"steps_per_epoch": None}, "steps_per_epoch: must be an integer, not null"),
    ({"best": float("nan")}, "best: must be a finite number"), ({"classes": [1]}, "classes.0: must be text"),
    ({"model": {"a": 1}}, "model: must hold names and tensors"), ({"model": {}}, "is of another model"),
    ({"training": {1: torch.zeros(1)}}, "training: must hold names and tensors"),
    ({"config": {"data": 3}}, "is damaged: its config cannot be read"),
    ({"optimizer": []}, "optimizer: must be a mapping"), ({"scaler": torch.zeros(1)}, "must be a mapping, not Tensor"),
    ({"optimizer": {}}, "is of another model or configuration: 'param_groups'")], ids=str)
def test_a_checkpoint_with_wrong_entries_is_named(scenes, done, tmp_path, entries, part):
    path = in_file(shutil.copy(done, tmp_path / "wrong.pth"), **entries)
    with pytest.raises(CheckpointError) as caught:
        engine.train(config(scenes, 2), tmp_path, CPU, path)
    assert str(caught.value).startswith(f"checkpoint {path} ") and part in str(caught.value)


def test_a_buffer_of_another_shape_is_refused(scenes, done, tmp_path):
    optimizer = torch.load(done, weights_only=True)["optimizer"]
    optimizer["state"][0]["momentum_buffer"] = torch.zeros(3, 3)
    path = in_file(shutil.copy(done, tmp_path / "wrong.pth"), optimizer=optimizer)
    with pytest.raises(CheckpointError, match="a buffer of its optimiser has another shape than .*weight"):
        engine.train(config(scenes, 2), tmp_path, CPU, path)


def train_in_a_process(log, *arguments):
    process = context.Process(target=script, args=(log, "train.py", *arguments))
    process.start()
    return process


def wait_for_moment(process, work_dir, kind, step, delays):
    """Wait until a checkpoint is written after `step`, or some time after that step, or after the start."""
    if kind == "start":
        return process.join(delays.uniform(0, 1))
    while process.is_alive() and (not (work_dir / "metrics.jsonl").exists() or step not in steps_in(work_dir)[0]):
        time.sleep(0.001)
    if kind == "step":
        process.join(delays.uniform(0, 0.3))
    while kind == "write" and process.is_alive() and not (work_dir / "last.pth.tmp").exists():
        pass


@pytest.mark.parametrize("kills, epochs", [(2, 3), pytest.param(10, 15, marks=pytest.mark.soak)])
def test_a_killed_run_ends_with_the_same_weights(scenes, tmp_path, kills, epochs):
    """SIGKILL at any point, then resume: with momentum, an average, random masks, augmentation and workers."""
    distill = {"teacher": {"model": model(), "checkpoint": None}, "methods": [{"type": "MGD"}, {"type": "FGD"}]}
    cfg = config_with(config(scenes, epochs, distill), optimizer={"momentum": 0.9}, eval={"every": 2},
                      data={"batch_size": 2, "workers": 2, "train_augment": "strong"},
                      train={"accumulate": 2, "ema": 0.9, "checkpoint_every": 1, "keep": 2, "check_images": 0})
    whole, parts, log, path = (tmp_path / name for name in ("whole", "parts", "log", "cfg.yaml"))
    arguments = ["--cfg", write_config(path, cfg), "--device", "cpu", "--work-dir"]
    process = train_in_a_process(log, *arguments, whole)
    process.join()
    delays = random.Random(0)
    for kill in range(kills):
        process = train_in_a_process(log, *arguments, parts, *(["--resume"] if any(parts.glob("last*.pth")) else []))
        kind = ("write", "step", "start")[kill % 3]
        wait_for_moment(process, parts, kind, 4 + kill * (4 * epochs - 6) // kills, delays)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()
    process = train_in_a_process(log, *arguments, parts, "--resume")
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert_same(read_checkpoint(whole / "last.pth"), read_checkpoint(parts / "last.pth"))
    evaluated = sorted({*range(1, epochs, 2), epochs - 1})
    assert steps_in(whole) == steps_in(parts) == (list(range(1, 4 * epochs + 1)), evaluated)


def test_a_run_on_several_data_sets_with_repeats_goes_on_exactly(scenes, tmp_path, monkeypatch):
    """Broken off within an epoch. The second data set has another order of classes, and data.val lacks some."""
    cfg = config(scenes, 3)
    files = {}
    for split in ("train", "val"):
        content = json.loads((scenes / "annotations" / f"{split}.json").read_text())
        content["categories"].reverse()
        for number, category in enumerate(content["categories"], start=1):
            category["id"], old = number, category["id"]
            for annotation in content["annotations"]:
                if annotation["category_id"] == old and "new" not in annotation:
                    annotation |= {"category_id": number, "new": True}
        if split == "val":
            used = {annotation["category_id"] for annotation in content["annotations"]}
            content["categories"] = [category for category in content["categories"] if category["id"] in used]
            assert 1 <= len(used) < 6
        files[split] = cfg["data"][split] | {"annotations": str(tmp_path / f"{split}.json")}
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    train = [cfg["data"]["train"] | {"repeat": 2, "first": 5}, files["train"]]
    distill = {"teacher": {"model": model(), "checkpoint": None}, "methods": [{"type": "FGD"}]}
    cfg = config_with(cfg | {"distill": distill}, data={"train": train, "val": files["val"], "repeat_factor": 0.7},
                      train={"checkpoint_every": 1, "tensorboard": False})
    run = build_run(parse_config(cfg), tmp_path, CPU)
    shown = run.train_loader.batch_sampler.shown
    assert len(run.train_loader.dataset) == 19 and shown > 24 and run.steps_per_epoch == -(-shown // 4)
    lines = describe_run(run).splitlines()
    assert lines[0].startswith("19 training images, 6 classes, ")
    assert f"from {train[0]['annotations']}: 5 images" in lines
    assert f"from {tmp_path / 'train.json'}: 14 images" in lines
    assert f"images shown in an epoch, with repeats: {shown}" in lines
    figures = engine.train(cfg, tmp_path / "whole", CPU)
    log_of_whole = (tmp_path / "whole" / "train.log").read_text()
    assert re.search(r"\n  teacher 0: \d", log_of_whole)  # not "none, it has 6 classes and the data 3"
    plain = engine.train(config_with(cfg, data={"val": config(scenes)["data"]["val"]}), tmp_path / "plain", CPU)
    assert figures == plain  # the same images, with all classes in the order of the first data set
    original = engine.train_step

    def stop_in_time(run, *arguments):
        if run.step == run.steps_per_epoch + 2:
            raise KeyboardInterrupt
        return original(run, *arguments)

    monkeypatch.setattr(engine, "train_step", stop_in_time)
    with pytest.raises(KeyboardInterrupt):
        engine.train(cfg, tmp_path / "parts", CPU)
    monkeypatch.undo()
    engine.train(cfg, tmp_path / "parts", CPU, tmp_path / "parts" / "last.pth")
    assert_same(read_checkpoint(tmp_path / "whole" / "last.pth"), read_checkpoint(tmp_path / "parts" / "last.pth"))
    recorded = read_run(tmp_path / "whole", tmp_path / "whole" / "metrics.jsonl")
    assert recorded.config["data"]["train"] == train


def limited(bytes_, *arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))
    script(*arguments)


def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint_before(scenes, tmp_path):
    cfg = config_with(config(scenes, 1), train={"keep": 3})
    arguments = ["train.py", "--cfg", write_config(tmp_path / "cfg.yaml", cfg), "--device", "cpu", "--work-dir",
                 tmp_path / "run"]
    engine.train(cfg, tmp_path / "run", CPU)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pth*")}
    process = context.Process(target=limited, args=(
        100_000, tmp_path / "log", *arguments, "--resume", "train.epochs=2"))
    process.start()
    process.join(60)
    assert process.exitcode == 1
    *_, error = (tmp_path / "log").read_text().strip().splitlines()
    assert error.startswith(f"error: {tmp_path / 'run' / 'last.pth'} cannot be written (")
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pth*")} == before
