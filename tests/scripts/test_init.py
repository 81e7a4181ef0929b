"""train.py from a whole detector: `train.init`."""
import json

import pytest
import torch
from runs import config, config_with, model, run_script, write_checkpoint, write_config

from data import generate_scenes
from models.checkpoints import sources
from models.checkpoints.sources import file_hash

CLASSES = ["star", "owl", "ring", "Disc"]  # the scenes have disc, ring, square, triangle, cross, star


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with scenes, a configuration that learns next to nothing in its step, and a checkpoint of ours."""
    folder = tmp_path_factory.mktemp("init")
    cfg = config_with(config(generate_scenes(folder / "scenes", train=4, val=2, size=(64, 64)), epochs=1),
                      optimizer={"lr": 1e-9, "momentum": 0.0}, schedule={"warmup_steps": 0})
    write_config(folder / "cfg.yaml", cfg)
    write_checkpoint(folder / "start.pth", cfg, CLASSES)
    return folder, cfg


def train(monkeypatch, place, out, *arguments):
    return run_script(monkeypatch, "train.py", "--cfg", place[0] / "cfg.yaml", "--work-dir", out, "--device", "cpu",
                      *arguments)


def state(path):
    return torch.load(path, weights_only=True)


def check_start(out, start):
    """The weights after the step are those of the checkpoint, with the rows of the classes in their new places."""
    now, before = state(out / "last.pth")["model"], state(start)["model"]
    for name in ("backbone.layer4.1.conv2.weight", "neck.fpn_convs.4.conv.weight", "bbox_head.gfl_reg.bias"):
        torch.testing.assert_close(now[name], before[name], rtol=0, atol=1e-6)
    weight, bias = (now[f"bbox_head.gfl_cls.{name}"] for name in ("weight", "bias"))
    theirs = [before[f"bbox_head.gfl_cls.{name}"] for name in ("weight", "bias")]
    for k, number in {0: 3, 1: 2, 5: 0}.items():  # disc, ring, star
        torch.testing.assert_close((weight[k], bias[k]), (theirs[0][number], theirs[1][number]), rtol=0, atol=1e-6)
    assert torch.allclose(bias[[2, 3, 4]], torch.tensor(-4.595), atol=1e-3)


def test_a_run_from_a_detector_and_its_resumption(place, tmp_path, monkeypatch, capsys):
    """Without ImageNet weights, and resumed without the file that it started from."""
    monkeypatch.setattr(sources, "_download", lambda url: pytest.fail(f"{url} is not needed"))
    start, out = tmp_path / "start.pth", tmp_path / "run"
    start.write_bytes((place[0] / "start.pth").read_bytes())
    extra = [f"train.init={start}", "model.backbone.weights=torchvision://resnet18"]
    assert train(monkeypatch, place, out, *extra) == 0
    check_start(out, start)
    log, record = (out / "train.log").read_text(), {str(start): file_hash(start)}
    assert f"starts from densekd checkpoint {start}\n  tensors taken: backbone 100 of 100, neck 16 of 16, bbox_" in log
    assert "the checkpoint's names: 3 (disc from Disc, ring, star); new classes: 3 (square, triangle, cross)" in log
    assert json.loads((out / "run.json").read_text())["init"] == record

    before = state(out / "last.pth")["model"]
    start.unlink()
    capsys.readouterr()
    assert train(monkeypatch, place, out, *extra, "--resume", "train.epochs=2") == 0
    log = (out / "train.log").read_text().split("done, the last")[1]
    assert "resumed at step 1; train.init is not loaded again" in log and "starts from" not in log
    for name, value in state(out / "last.pth")["model"].items():
        if name.endswith("weight"):
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)
    assert json.loads((out / "run.json").read_text())["init"] == record


def test_the_check_shows_the_start(place, monkeypatch, tmp_path, capsys):
    assert train(monkeypatch, place, tmp_path / "run", "--check", f"train.init={place[0] / 'start.pth'}",
                 "train.init_classes=[a, b, c, cross]") == 0
    printed = capsys.readouterr().out
    assert "found among the names in train.init_classes: 1 (cross); new classes: 5 (disc, ring, square, " in printed


def test_a_distilled_student_starts_from_a_student(place, tmp_path, monkeypatch):
    """A sequence of teachers: the run with the second goes on from what the first taught."""
    folder, cfg = place
    teacher = write_checkpoint(tmp_path / "teacher.pth", config_with(cfg, model=model(16)))
    distill = {"teacher": {"model": model(16), "checkpoint": str(teacher)}, "methods": [{"type": "FitNet"}]}
    path = write_config(tmp_path / "kd.yaml", cfg | {"distill": distill})
    run = ["train.py", "--cfg", path, "--device", "cpu"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_script(monkeypatch, *run, "--work-dir", first, f"train.init={folder / 'start.pth'}") == 0
    check_start(first, folder / "start.pth")
    assert run_script(monkeypatch, *run, "--work-dir", second, f"train.init={first / 'last.pth'}", "train.ema=0.5") == 0
    taught = state(first / "last.pth")["model"]
    for name, value in state(second / "last.pth")["model"].items():
        if name.endswith("weight"):
            torch.testing.assert_close(value, taught[name], rtol=0, atol=1e-6)
    log = (second / "train.log").read_text()
    assert "the checkpoint's names: 6 (disc, ring, square, triangle, cross, star); new classes: none" in log


WIDE = "model.backbone.base_channels=16"


@pytest.mark.parametrize("arguments, message", [
    (["train.init=nowhere.pth"], "train.init: no such checkpoint file: nowhere.pth"),
    (["train.init=zoo:gfl_r101"], "train.init: no published checkpoint is called zoo:gfl_r101; did you mean "
                                  "zoo:gfl_r101_2x?"),
    (["train.init=START", WIDE], "has a backbone of another architecture or width, 100 of 100 tensors have another "
                                 "shape: backbone.conv1.weight is (16, 3, 7, 7) in the model and (8, 3, 7, 7) in the"),
    (["train.init=START", "model.backbone.depth=50"], "another architecture or width"),
    (["train.init=START", "train.init_classes=[a, b]"], "init_classes: has 2 names, and the checkpoint 4 classes: "),
    (["train.init=CFG"], "cannot read checkpoint"),
    (["train.init_classes=[a, b]"], "train.init_classes: names the classes of train.init, which is missing"),
    (["train.init=START", "train.init_classes=[1, 2]"], "train.init_classes.0: must be text, not an integer (1)"),
    (["train.init=START", "distill={teacher: {cfg: CFG, checkpoint: null}, methods: [], init_student: true}"],
     "train.init: and distill.init_student both give the student its first weights: remove one of them")])
def test_bad_input_is_one_line(place, tmp_path, monkeypatch, capsys, arguments, message):
    folder, _ = place
    names = {"START": str(folder / "start.pth"), "CFG": str(folder / "cfg.yaml")}
    for short, name in names.items():
        arguments = [text.replace(short, name) for text in arguments]
    assert train(monkeypatch, place, tmp_path / "run", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0], error
    assert not (tmp_path / "run").exists()
