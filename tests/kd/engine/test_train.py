"""The training loop: accumulation, the average of the weights, mixed precision, kills, full disks."""
import json
import random
import re
import resource
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from processes import context
from runs import config, config_with, model, script, write_checkpoint, write_config

from data import generate_scenes
from kd.config import parse_config
from kd.engine import train as engine
from kd.engine.replay import replay, save_replay
from kd.engine.run import build_run, describe_run, restore_run, save_run
from kd.evaluation.coco import FIGURES
from kd.evaluation.evaluate import evaluate_checkpoint
from kd.exceptions import Stopped, TrainingError
from kd.processes import distributed
from kd.work_dir import log
from kd.work_dir.checkpoint import read_checkpoint, read_plain
from kd.work_dir.records import read_run
from models import ConfigError, Detector
from models.weights import CheckpointError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp("scenes"), train=14, val=4, size=(64, 64))


def assert_same(first, second, place=""):
    """Assert that two nested states are equal bit for bit, apart from the time and memory that they took."""
    assert type(first) is type(second), place
    if isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key in first.keys() - {"seconds", "peak_memory"}:
            assert_same(first[key], second[key], f"{place}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), place
        for i, pair in enumerate(zip(first, second)):
            assert_same(*pair, f"{place}.{i}")
    else:
        assert torch.equal(first, second) if torch.is_tensor(first) else first == second, place


def steps_in(work_dir):
    """The steps and the evaluated epochs in metrics.jsonl, without a last line that is still being written."""
    lines = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().split("\n")[:-1]]
    return [line["step"] for line in lines if "loss" in line], [line["epoch"] for line in lines if "AP" in line]


def test_accumulated_gradients_are_the_mean_of_the_batches(scenes, tmp_path):
    cfg = config_with(config(scenes), train={"accumulate": 2, "grad_clip": None}, optimizer={"lr": 0.0})
    run = build_run(parse_config(cfg), tmp_path, CPU)
    groups = list(engine.in_runs(run.train_loader, 2))
    assert [len(group) for group in groups] == [2, 2] == [2] * run.steps_per_epoch
    groups[1] = groups[1][:1]  # like the last group of an epoch
    run.model.train()

    def gradients(batch):
        images, targets = engine.to_device(*batch, run.student, CPU)
        run.optimizer.zero_grad()
        sum(run.model(images, targets).values()).backward()
        return {name: p.grad.clone() for name, p in run.model.named_parameters()}

    for group in groups:
        alone = [gradients(batch) for batch in group]
        losses, _ = engine.train_step(run, run.model, group)
        for name, p in run.model.named_parameters():
            torch.testing.assert_close(p.grad, sum(own[name] for own in alone) / len(group), rtol=1e-5, atol=1e-7)
        assert losses["loss"].isfinite()


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


def test_a_step_in_fp16_measures(scenes, tmp_path):
    """At the loss scale's start, and at one at which every weighted gradient would overflow."""
    distill = {"teacher": {"model": model(), "checkpoint": None},
               "methods": [{"type": "FGD", "weight": {"gradient_share": 0.3}}]}
    weights = []
    for amp, scale in (("none", None), ("fp16", None), ("fp16", 2.0 ** 40)):
        run = build_run(parse_config(config_with(config(scenes, 1, distill), train={"amp": amp})), tmp_path, CPU)
        run.model.train()
        if scale is not None:
            run.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        batch = next(iter(run.train_loader))
        losses, _ = engine.train_step(run, run.model, [batch])
        weights.append(float(losses["weight/FGD0"]))
    assert min(weights) > 0 and weights[1:] == pytest.approx(weights[:1] * 2, rel=0.03)


def test_a_replay_has_the_weight_of_its_step(scenes, tmp_path):
    distill = {"teacher": {"model": model(), "checkpoint": str(write_checkpoint(
        tmp_path / "teacher.pth", {"model": model()}))}, "methods": [{"type": "FGD", "weight": {"gradient_share": 2}}]}
    run = build_run(parse_config(config(scenes, 1, distill)), tmp_path, CPU)
    run.model.train()
    batches = list(run.train_loader)
    engine.train_step(run, run.model, batches[:1])
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    losses, _ = engine.train_step(run, run.model, batches[1:2])
    run.model.load_state_dict(weights)  # a broken step changes none, but its measurement is done
    save_replay(run, tmp_path / "replay.pth", 1, batches[1:2])
    assert f" loss_fgd {losses['loss_fgd'].item():.4g}\n" in replay(tmp_path / "replay.pth", CPU)


def test_the_average_of_the_weights_is_what_is_evaluated(scenes, tmp_path, monkeypatch):
    cfg = config_with(config(scenes), train={"ema": 0.75})
    seen, original = [], engine.train_step

    def remember(run, *arguments):
        result = original(run, *arguments)
        seen.append({name: value.clone() for name, value in run.student.state_dict().items()})
        return result

    monkeypatch.setattr(engine, "train_step", remember)
    figures = engine.train(cfg, tmp_path, CPU)
    state = read_checkpoint(tmp_path / "last.pth")
    average, *others = seen
    for weights in others:
        average = {name: 0.75 * value + 0.25 * weights[name] for name, value in average.items()}
    for name, value in seen[-1].items():
        assert torch.equal(state["training"][name], value)
        if value.is_floating_point():
            torch.testing.assert_close(state["model"][name], average[name], rtol=1e-5, atol=1e-7)
    assert not torch.equal(state["model"]["bbox_head.gfl_cls.weight"], state["training"]["bbox_head.gfl_cls.weight"])
    assert evaluate_checkpoint(parse_config(cfg), str(tmp_path / "last.pth"), CPU) == figures


@pytest.mark.parametrize("amp, factor", [("fp16", 1e6), ("bf16", 1e6), ("bf16", 1e38)])
def test_inputs_that_overflow(scenes, tmp_path, monkeypatch, amp, factor):
    """fp16 skips and counts the steps; a value that is too large also for bf16 stops the run and saves the step."""
    distill = {"teacher": {"model": model(), "checkpoint": None},
               "methods": [{"type": "CrossKD", "reused_teacher_head_idx": 1}]}
    cfg = config_with(config(scenes, distill=distill), data={"scale": [128, 128]},
                      train={"amp": amp, "check_images": 0})
    original, steps = engine.to_device, []

    def scaled(images, targets, *where):
        images, targets = original(images, targets, *where)
        steps.append(len(steps))
        return images * (factor if steps[-1] in (3, 4) else 1), targets

    monkeypatch.setattr(engine, "to_device", scaled)
    if factor == 1e38:
        with pytest.raises(TrainingError, match=r"(is nan|is inf|not finite).* at step 4, images .*--replay"):
            engine.train(cfg, tmp_path, CPU)
        assert read_plain(tmp_path / "replay.pth", "densekd-replay", "file", "a replay file")["step"] == 3
        return
    engine.train(cfg, tmp_path, CPU)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(8)) and len(lines) == 8
    if amp == "fp16":
        assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 2, 2, 2, 2]
        assert lines[3]["loss"] is None and lines[-1]["loss_scale"] == lines[0]["loss_scale"] / 4
    assert lines[-1]["loss"] > 0
    assert all(value.isfinite().all() for value in read_checkpoint(tmp_path / "last.pth")["model"].values())


def test_a_replay_draws_what_its_process_drew(scenes, tmp_path, monkeypatch):
    """MGD's masks differ from process to process."""
    teacher = {"model": model(), "checkpoint": str(write_checkpoint(tmp_path / "teacher.pth", {"model": model()}))}
    cfg = config(scenes, distill={"teacher": teacher, "methods": [{"type": "MGD", "alpha_mgd": 1.0}]})
    run = build_run(parse_config(cfg), tmp_path, CPU)
    run.model.train()
    batch = next(iter(run.train_loader))
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    save_replay(run, tmp_path / "replay1.pth", run.step, [batch])
    losses, _ = engine.train_step(run, run.model, [batch])
    monkeypatch.undo()
    assert f" loss_mgd {losses['loss_mgd'].item():.4g}\n" in replay(tmp_path / "replay1.pth", CPU)


@pytest.mark.parametrize("clip", [None, 35])
def test_a_gradient_that_is_not_finite_touches_neither_weights_nor_checkpoint(scenes, tmp_path, monkeypatch, clip):
    """The gradient breaks at the last step of an epoch, although the loss is finite."""
    original, steps = engine.to_device, []

    def spoil(images, targets, student, device):
        if len(steps) == 3:
            student.bbox_head.gfl_reg.bias.register_hook(lambda grad: grad * float("nan"))
        steps.append(len(steps))
        return original(images, targets, student, device)

    monkeypatch.setattr(engine, "to_device", spoil)
    with pytest.raises(TrainingError, match="the gradient, or a loss of another process, is not finite at step 4"):
        engine.train(config_with(config(scenes), train={"grad_clip": clip, "checkpoint_every": 1}), tmp_path, CPU)
    state = read_checkpoint(tmp_path / "last.pth")
    assert state["step"] == 3 and all(value.isfinite().all() for value in state["model"].values())


def test_a_run_goes_on_in_fp16(scenes, tmp_path):
    """A run can also change to it, although its checkpoint has no loss scale."""
    for epochs, amp, resume_from in ((1, "none", None), (2, "fp16", tmp_path / "last.pth")):
        engine.train(config_with(config(scenes, epochs), train={"amp": amp}), tmp_path, CPU, resume_from)
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"loss"' in line][-1]
    assert last["step"] == 8 and last["loss_scale"] == 65536


def in_file(path, **entries):
    torch.save(torch.load(path, weights_only=True) | entries, path)
    return path


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


def test_a_replay_file_with_wrong_entries_is_named(scenes, tmp_path):
    run = build_run(parse_config(config(scenes)), tmp_path, CPU)
    images, targets = next(iter(run.train_loader))
    save_replay(run, tmp_path / "good.pth", run.step, [(images, targets)])
    assert "gradients that are not finite: none" in replay(tmp_path / "good.pth", CPU)
    for entries, part in [({"config": 3}, "config: must be a mapping"), ({"rank": -1}, "rank: must be at least 0"),
                          ({"model": {}}, "Missing key"), ({"model": {"a": 1}}, "model: must hold names and tensors"),
                          ({"batches": [3]}, "batches must be images with as many targets"),
                          ({"batches": [(images, targets[1:])]}, "batches must be"),
                          ({"batches": [(images, [{}] * len(targets))]}, "batches must be")]:
        path = in_file(shutil.copy(tmp_path / "good.pth", tmp_path / "bad.pth"), **entries)
        with pytest.raises(CheckpointError) as caught:
            replay(path, CPU)
        assert str(caught.value).startswith(f"file {path} is damaged: ") and part in str(caught.value)


def test_a_class_without_boxes_is_named(scenes, tmp_path):
    """Some tools export a root category above the classes."""
    cfg = config(scenes)
    for split in ("train", "val"):
        content = json.loads((scenes / "annotations" / f"{split}.json").read_text())
        content["categories"].insert(0, {"id": 0, "name": "shapes"})
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
        cfg = config_with(cfg, data={split: cfg["data"][split] | {"annotations": str(tmp_path / f"{split}.json")}})
    line = "classes without a box in the training data, which are not learned: "
    assert f"{line}shapes" in describe_run(build_run(parse_config(cfg), tmp_path, CPU)).splitlines()
    assert line not in describe_run(build_run(parse_config(config(scenes)), tmp_path, CPU))


def test_a_run_of_few_steps_is_warned_about(scenes, tmp_path):
    """From a thousand steps on, not any more."""
    def warned(epochs):
        cfg = config_with(config(scenes), train={"epochs": epochs})
        text = describe_run(build_run(parse_config(cfg), tmp_path, CPU))
        return [line for line in text.splitlines() if line.startswith("WARNING")]

    per_epoch = build_run(parse_config(config(scenes)), tmp_path, CPU).steps_per_epoch
    last = -(-1000 // per_epoch) - 1
    assert warned(last) == [f"WARNING: {last * per_epoch} steps in total; detectors usually need some thousands: raise "
                            "train.epochs and schedule.milestones"]
    assert warned(last + 1) == []


def test_a_signal_during_evaluation_stops_a_run_at_once(scenes, tmp_path, monkeypatch):
    """In another folder than the one that the run was resumed from, too."""
    cfg = config_with(config(scenes, 2), eval={"batch_size": 1})
    engine.train(cfg, tmp_path / "whole", CPU)
    predicted, predict = [], Detector.predict

    def asked_to_stop(self, images, targets):
        predicted.append(targets[0]["image_id"])
        signal.raise_signal(signal.SIGTERM)
        return predict(self, images, targets)

    resume_from = None
    for name in ("parts", "elsewhere"):
        monkeypatch.setattr(Detector, "predict", asked_to_stop)
        with pytest.raises(Stopped, match="stopped at step 4 after saving .*last.pth") as stopped:
            engine.train(cfg, tmp_path / name, CPU, resume_from)
        assert stopped.value.signum == signal.SIGTERM and len(predicted) == 1
        predicted.clear()
        resume_from = tmp_path / name / "last.pth"
        assert not read_checkpoint(resume_from)["evaluated"]
    monkeypatch.setattr(Detector, "predict", predict)
    engine.train(cfg, tmp_path / "elsewhere", CPU, resume_from)
    assert_same(read_checkpoint(tmp_path / "whole/last.pth"), read_checkpoint(tmp_path / "elsewhere/last.pth"))
    assert steps_in(tmp_path / "elsewhere") == ([5, 6, 7, 8], [0, 1])


def test_the_end_names_only_checkpoints_that_were_written(scenes, tmp_path):
    """A finished run, resumed from another folder, has nothing left to do and writes none."""
    engine.train(config(scenes, 1), tmp_path / "one", CPU)
    engine.train(config(scenes, 1), tmp_path / "two", CPU, tmp_path / "one" / "last.pth")
    ends = [(tmp_path / name / "train.log").read_text().splitlines()[-1] for name in ("one", "two")]
    assert f"done, the last checkpoint is {tmp_path / 'one' / 'last.pth'}" in ends[0]
    assert ends[1].endswith(" done") and not list((tmp_path / "two").glob("*.pth"))


def test_a_batch_norm_with_one_value_is_one_line(scenes, tmp_path):
    """Images of one batch that the last stage sees as one pixel."""
    cfg = config_with(config(scenes), data={"batch_size": 1, "scale": [32, 32]})
    cfg["model"]["backbone"]["norm_eval"] = False
    with pytest.raises(TrainingError, match=r"a batch norm gets a single value per channel, from 1 x 32 x 32 pixels: "):
        engine.train(cfg, tmp_path, CPU)


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


def test_the_last_checkpoints_and_the_best_are_kept(scenes, tmp_path, monkeypatch):
    figures = iter([0.1, 0.3, 0.2, 0.3])
    monkeypatch.setattr(engine, "evaluate", lambda *arguments, **options: {
        "AP": next(figures), "per_class": {"a": 0.0}} | dict.fromkeys(FIGURES[1:], 0.0))
    engine.train(config_with(config(scenes, 4), train={"keep": 3}), tmp_path, CPU)
    kept = {path.name: read_checkpoint(path)["step"] for path in tmp_path.glob("*.pth*")}
    assert kept == {"last.pth": 16, "last.1.pth": 12, "last.2.pth": 8, "best.pth": 8}


def with_figures(monkeypatch, figures):
    """Let evaluations find these AP, one after another, and count those that are left."""
    left = list(figures)
    monkeypatch.setattr(engine, "evaluate", lambda *arguments, **options: {
        "AP": left.pop(0), "per_class": {"a": 0.0}} | dict.fromkeys(FIGURES[1:], 0.0))
    return left


@pytest.mark.parametrize("stop", [None, 1, 2, 3])
def test_training_ends_when_patience_does(scenes, tmp_path, monkeypatch, stop):
    """Also when it is resumed after any of the epochs, and resumed again after its end."""
    figures = [0.1, 0.3, 0.2, 0.3, 0.4]
    left = with_figures(monkeypatch, figures)
    cfg = config_with(config(scenes, 8), train={"patience": 2})
    run = tmp_path / "run"
    if stop is not None:
        monkeypatch.setattr(engine, "train_epoch", stopping(engine.train_epoch, stop))
        with pytest.raises(Stopped):
            engine.train(cfg, run, CPU)
        monkeypatch.undo()
        left = with_figures(monkeypatch, left)
    for resume_from in (run / "last.pth" if stop else None, run / "last.pth"):
        engine.train(cfg, run, CPU, resume_from)
        assert left == [0.4] and steps_in(run) == (list(range(1, 17)), [0, 1, 2, 3])
        assert (run / "train.log").read_text().splitlines()[-2][9:] == (
            "stopped after epoch 4, because 2 evaluations brought no better AP than 30.0 (train.patience)")
    *earlier, last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"AP"' in line]
    assert last["out_of_patience"] is True and not any("out_of_patience" in line for line in earlier)
    assert read_run(run, run / "metrics.jsonl").finished
    engine.train(config_with(cfg, train={"patience": 3, "epochs": 5}), run, CPU, run / "last.pth")  # more patience
    assert left == [] and steps_in(run)[1] == [0, 1, 2, 3, 4]
    assert read_checkpoint(run / "best.pth")["step"] == 20


def stopping(train_epoch, stop):
    """As if a signal came at the start of the epoch with the number `stop`."""
    def wrapper(run, model, epoch, *rest):
        if epoch == stop:
            raise Stopped(15, "")
        return train_epoch(run, model, epoch, *rest)
    return wrapper


@pytest.mark.parametrize("change", [{"eval": {"every": 0}}, {"data": {"val": None}}])
def test_patience_without_evaluations_is_refused(scenes, tmp_path, change):
    cfg = config_with(config(scenes), train={"patience": 1})
    with pytest.raises(ConfigError) as caught:
        engine.train(config_with(cfg, **change), tmp_path, CPU)
    assert str(caught.value) == ("train.patience: counts evaluations during training: give data.val, and eval.every "
                                 "above 0")


def test_the_log_says_the_learning_rate_and_the_time_left(scenes, tmp_path, monkeypatch):
    """A cosine of a rate per image: 0.01 x 4 images x 2 batches, over 2 epochs of 2 steps."""
    now = iter(range(0, 1000, 100))
    monkeypatch.setattr(log, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    clock = log.Clock()
    clock.tick("step")
    assert clock.left(step=90, evaluation=3) == "2:30:00"
    clock.tick("evaluation")
    assert clock.left(step=90, evaluation=9) == "2:45:00" and clock.left(step=0) == "0:00:00"
    monkeypatch.undo()
    cfg = config_with(config(scenes), train={"accumulate": 2}, optimizer={"lr": {"per_image": 0.01}},
                      schedule={"type": "cosine", "warmup_steps": 0})
    engine.train(cfg, tmp_path, CPU)
    lines = (tmp_path / "train.log").read_text()
    assert "learning rate 0.08, with 8 images per step: 1 process x 4 per batch x 2 batches\n" in lines
    assert len(re.findall(r" step \d/4 .* loss .*, \d:\d\d:\d\d left\n", lines)) == 4
    rates = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert rates == pytest.approx([0.08, 0.08 * 0.8535534, 0.04, 0.08 * 0.1464466])


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
