"""TensorBoard: what a run writes for it, and runs without it."""
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image
from runs import config, model, run_script, write_config

from data import generate_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp("scenes"), train=8, val=3, size=(64, 64))


def write(tmp_path, scenes, **distill):
    return write_config(tmp_path / "cfg.yaml", config(scenes, 2, distill or None) | {"eval": {"every": 1}})


def events(run):
    pytest.importorskip("tensorboard", reason="needs the extra viz")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(run / "tensorboard"), {"images": 0, "scalars": 0})
    return found.Reload()


def test_what_is_written(scenes, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="needs the extra viz")
    path = write(tmp_path, scenes, teacher={"model": model(), "checkpoint": None}, methods=[{"type": "FGD"}])
    arguments = ["--cfg", path, "--work-dir", tmp_path / "run", "--device", "cpu", "train.check_images=0",
                 "train.tensorboard=true", "train.vis_period=3"]
    assert run_script(monkeypatch, "train.py", *arguments) == 0
    found, lines = events(tmp_path / "run"), [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    steps = [line for line in lines if "loss" in line]
    for name in ("loss", "loss_cls", "loss_fgd", "lr", "positives_per_image"):
        written = found.Scalars(f"train/{name}")
        assert [event.step for event in written] == [1, 2, 3, 4], name
        assert [event.value for event in written] == pytest.approx([line[name] for line in steps], rel=1e-6), name
    assert steps[0]["positives_per_image"] > 1
    assert {"share/FGD0", "val_class/ring"} <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Scalars("val/AP")] == [2, 4]
    image, = found.Images("detections")  # of steps 3 and 6 there is only one
    picture = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert image.step == 3 and picture.shape[1] > 2 * 480 and picture.std() > 10
    assert run_script(monkeypatch, "train.py", *arguments, "--resume", "train.epochs=3") == 0
    assert [event.step for event in events(tmp_path / "run").Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_nothing_is_written_by_default(scenes, tmp_path, monkeypatch):
    assert run_script(monkeypatch, "train.py", "--cfg", write(tmp_path, scenes), "--work-dir", tmp_path / "run",
                      "--device", "cpu", "train.epochs=1", "train.vis_period=1") == 0
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_without_tensorboard(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run_script(monkeypatch, "train.py", "--cfg", write(tmp_path, scenes), "--work-dir", tmp_path / "run",
                      "train.tensorboard=true") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error == ["error: train.tensorboard needs tensorboard, which is not installed: pip install 'densekd[viz]', "
                     "or pip install tensorboard"]
    assert not (tmp_path / "run").exists()
