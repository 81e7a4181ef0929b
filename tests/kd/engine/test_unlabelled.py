"""Runs with unlabelled images: resumed, in several processes, with accumulation and mixed precision; what they say."""
import json
import shutil

import pytest
import torch
from processes import together
from runs import assert_same, config, config_with, model, run_script, write_checkpoint, write_config

from data import generate_scenes
from kd.config import parse_config
from kd.engine import train as engine
from kd.engine.replay import replay, save_replay
from kd.engine.run import build_run, describe_run
from kd.processes import distributed
from kd.work_dir.checkpoint import read_checkpoint
from models.weights import CheckpointError

CPU = torch.device("cpu")
MIMIC, FGD, LD = {"type": "Mimic"}, {"type": "FGD"}, {"type": "LD"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Fourteen labelled images, and seven without labels in `more`."""
    root = generate_scenes(tmp_path_factory.mktemp("scenes"), train=14, val=2, size=(64, 64))
    more = generate_scenes(tmp_path_factory.mktemp("more"), train=7, val=1, size=(64, 48))
    shutil.copytree(more / "train", root / "more" / "deep")
    return root


def mixed(scenes, methods=(MIMIC, FGD), epochs=2, **sections):
    distill = {"teacher": {"model": model(), "checkpoint": None}, "methods": list(methods)}
    data = {"unlabelled": {"images": str(scenes / "more")}, "train_augment": "strong"} | sections.pop("data", {})
    return config_with(config(scenes, epochs, distill), data=data,
                       train={"check_images": 0} | sections.pop("train", {}), **sections)


def test_a_run_that_breaks_off_within_an_epoch_goes_on_exactly(scenes, tmp_path, monkeypatch):
    """With accumulation, whose last group of an epoch is shorter, batch norms that learn, and workers after it."""
    cfg = mixed(scenes, [MIMIC, {"type": "MGD"}, FGD], data={"batch_size": 2, "unlabelled_ratio": 1.5},
                optimizer={"momentum": 0.9}, train={"accumulate": 3, "checkpoint_every": 1})
    cfg["data"]["train"]["first"] = 8
    engine.train(cfg, tmp_path / "whole", CPU)
    taken, original = [], engine.train_step

    def stop_in_time(run, wrapped, batches):
        taken.append([[bool(target.get("unlabelled")) for target in targets] for _, targets in batches])
        if len(taken) == 4:
            raise KeyboardInterrupt
        return original(run, wrapped, batches)

    monkeypatch.setattr(engine, "train_step", stop_in_time)
    with pytest.raises(KeyboardInterrupt):
        engine.train(cfg, tmp_path / "parts", CPU)
    assert taken[0] == [[False] * 2 + [True] * 3] * 3 and list(map(len, taken)) == [3, 1, 3, 1]
    monkeypatch.undo()
    engine.train(config_with(cfg, data={"workers": 1}), tmp_path / "parts", CPU, tmp_path / "parts" / "last.pth")
    whole, parts = (read_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "parts"))
    assert whole["unlabelled"] == 7
    parts["config"]["data"]["workers"] = 0
    assert_same(whole, parts)


def test_two_processes_compute_the_same_as_one(scenes, tmp_path):
    """The batch norms are fixed: each process has its own statistics."""
    cfg = mixed(scenes, [MIMIC, {"type": "FitNet"}, FGD], 1, data={"train_augment": "light"})
    cfg["model"]["backbone"]["norm_eval"] = True
    (losses, gradients), results = first_step(cfg), together(both, 2, tmp_path / "server", cfg, tmp_path / "run")
    for name, value in losses.items():
        torch.testing.assert_close(sum(each[0][name] for each in results) / 2, value, rtol=1e-4, atol=1e-5)
    for name, value in gradients.items():
        torch.testing.assert_close(results[0][1][name], value, rtol=1e-3, atol=1e-5)
    assert [step for _, _, step in results] == [4, 4]


def both(cfg, work_dir):
    """What `first_step` returns, and the steps of a whole run."""
    found = first_step(cfg)
    engine.train(config_with(cfg, data={"batch_size": 2}), work_dir, CPU)
    return *found, read_checkpoint(work_dir / "last.pth")["step"]


def first_step(cfg):
    """Losses and gradients of the first batch, divided between the processes."""
    world = distributed.world_size()
    run = build_run(parse_config(config_with(cfg, data={"batch_size": 4 // world})), None, CPU)
    wrapped = distributed.data_parallel(run.model.train(), CPU)
    images, targets = next(iter(run.train_loader))
    assert [bool(t.get("unlabelled")) for t in targets] == [False] * (4 // world) + [True] * (4 // world)
    losses = wrapped(*engine.to_device(images, targets, run.student, CPU))
    sum(losses.values()).backward()
    return ({name: value.detach() for name, value in losses.items()},
            {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_and_gradient_norms(scenes, tmp_path, amp):
    cfg = mixed(scenes, [MIMIC, {"type": "FitNet"}, LD], 1, data={"scale": [128, 128]},
                train={"amp": amp, "grad_norm_every": 1})
    engine.train(cfg, tmp_path, CPU)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] is not None and line["loss_ld"] is not None for line in lines if "loss" in line)
    norms = [line for line in lines if "grad_norm/student" in line]
    assert norms and all(line["grad_norm/Mimic0"] > 0 for line in norms)


def test_a_step_is_repeated(scenes, tmp_path):
    run = build_run(parse_config(mixed(scenes)), tmp_path, CPU)
    run.model.train()
    batch = next(iter(run.train_loader))
    save_replay(run, tmp_path / "replay.pth", 0, [batch])
    text = replay(tmp_path / "replay.pth", CPU)
    losses, _ = engine.train_step(run, run.model, [batch])
    assert f"loss_cls {losses['loss_cls'].item():.4g}" in text and "deep/00000" in text


def test_the_first_lines_of_the_log(scenes, tmp_path):
    run = build_run(parse_config(mixed(scenes, data={"unlabelled_ratio": 0.5})), tmp_path, CPU)
    assert "\n7 unlabelled images, 2 in a batch with 4 labelled images: for Mimic, not for FGD\n" in describe_run(run)
    assert "WARNING: " not in describe_run(run).replace("WARNING: 8 steps", "")
    leaking = mixed(scenes, [MIMIC], data={"unlabelled": {"images": [str(scenes / "more"), str(scenes / "val")]}})
    text = describe_run(build_run(parse_config(leaking), tmp_path, CPU))
    assert "9 unlabelled images, 4 in a batch with 4 labelled images: for Mimic\n" in text
    assert "WARNING: 2 images of data.unlabelled are also in data.val, so its figures say less: 000000.jpg" in text
    assert "unlabelled" not in describe_run(build_run(parse_config(config(scenes)), tmp_path, CPU))


def test_check_shows_who_sees_what(scenes, tmp_path, monkeypatch, capsys):
    path = write_config(tmp_path / "cfg.yaml", mixed(scenes))
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--check", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "7 unlabelled images, 4 in a batch" in printed and "a step of 8 images takes" in printed
    assert "class scores (8, 86, 6) <- teacher class scores (8, 86, 6)" in printed
    assert "neck output 4 (4, 16, 1, 1) <- teacher neck output 4 (4, 16, 1, 1)" in printed


@pytest.mark.parametrize("change, part", [
    ({"distill": None}, "data.unlabelled: images without labels teach nothing without a teacher: add distill"),
    ({"methods": [FGD, LD, FGD]}, "data.unlabelled: no method here learns from images without labels (FGD, LD need "
                                  "labels): add one of CrossKD, Mimic, "),
    ({"methods": [LD]}, "(LD needs labels)"),
    ({"images": "none"}, "none does not exist")])
def test_what_is_refused(scenes, tmp_path, monkeypatch, capsys, change, part):
    cfg = mixed(scenes)
    if "distill" in change:
        del cfg["distill"]
    if "methods" in change:
        cfg["distill"]["methods"] = change["methods"]
    if "images" in change:
        cfg["data"]["unlabelled"]["images"] = str(scenes / "none")
    path = write_config(tmp_path / "cfg.yaml", cfg)
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", tmp_path / "run", "--device", "cpu") == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and part in error[0] and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="data.unlabelled" if "images" not in change else "none"):
        build_run(parse_config(cfg), tmp_path, CPU)


def test_what_a_resumed_run_says(scenes, tmp_path, caplog):
    folder = shutil.copytree(scenes / "more", tmp_path / "more")
    cfg = mixed(scenes, [MIMIC], 1, data={"unlabelled": {"images": str(folder)}})
    engine.train(cfg, tmp_path / "run", CPU)
    shutil.copy(scenes / "val" / "000000.jpg", folder / "new.jpg")
    with caplog.at_level("INFO", "densekd"):
        engine.train(config_with(cfg, data={"unlabelled_ratio": 0.5}, train={"epochs": 2}), tmp_path / "run", CPU,
                     tmp_path / "run" / "last.pth")
    log = (tmp_path / "run" / "train.log").read_text()
    assert 'since the checkpoint, data.unlabelled.images was "7 images" and is "8 images"' in log
    assert "since the checkpoint, data.unlabelled_ratio was 1.0 and is 0.5" in log
    with pytest.raises(CheckpointError, match="does not fit these settings"):
        engine.train(config_with(cfg, data={"batch_size": 2}), tmp_path / "run", CPU, tmp_path / "run" / "last.pth")


def test_a_distilled_checkpoint_is_evaluated_by_its_own_configuration(scenes, tmp_path, monkeypatch, capsys):
    """It has data.unlabelled and no distill section."""
    engine.train(mixed(scenes, [MIMIC], 1), tmp_path / "run", CPU)
    for script, more in (("eval.py", ()), ("predict.py", ("--input", scenes / "val", "--out", tmp_path / "found"))):
        assert run_script(monkeypatch, script, "--checkpoint", tmp_path / "run" / "last.pth", "--device", "cpu",
                          *more) == 0
    cfg = mixed(scenes)
    path, weights = write_config(tmp_path / "cfg.yaml", cfg), write_checkpoint(tmp_path / "model.pth", cfg)
    assert run_script(monkeypatch, "eval.py", "--cfg", path, "--checkpoint", weights, "--device", "cpu") == 0
    capsys.readouterr()
