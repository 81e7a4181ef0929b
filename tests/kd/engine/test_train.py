"""The training loop: accumulation, the average of the weights, mixed precision, replays, patience."""
import json
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from runs import (
    assert_same,
    config,
    config_with,
    in_file,
    model,
    steps_in,
    write_checkpoint,
)

from data import generate_scenes
from kd.config import parse_config
from kd.engine import train as engine
from kd.engine.replay import replay, save_replay
from kd.engine.run import build_run, describe_run
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
    assert log.in_hours(clock.left(step=90, evaluation=3)) == "2:30:00"
    clock.tick("evaluation")
    assert log.in_hours(clock.left(step=90, evaluation=9)) == "2:45:00" and clock.left(step=0) == 0
    monkeypatch.undo()
    cfg = config_with(config(scenes), train={"accumulate": 2}, optimizer={"lr": {"per_image": 0.01}},
                      schedule={"type": "cosine", "warmup_steps": 0})
    engine.train(cfg, tmp_path, CPU)
    lines = (tmp_path / "train.log").read_text()
    assert "learning rate 0.08, with 8 images per step: 1 process x 4 per batch x 2 batches\n" in lines
    assert len(re.findall(r" step \d/4 .* loss .*, \d:\d\d:\d\d left\n", lines)) == 4
    rates = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert rates == pytest.approx([0.08, 0.08 * 0.8535534, 0.04, 0.08 * 0.1464466])
