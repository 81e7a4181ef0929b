"""`load_detector`: a checkpoint of a run, called on photographs of every kind."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from runs import config, write_checkpoint, write_config

from data import DataError, generate_scenes
from data.images import read_image
from kd import load_detector
from kd.config import parse_config
from kd.evaluation.evaluate import detect_views
from kd.exceptions import UsageError
from kd.inference.detectors import load_named, load_with_data
from models.weights import CheckpointError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Scenes, a configuration and a checkpoint as a run writes it."""
    folder = tmp_path_factory.mktemp("run")
    cfg = config(generate_scenes(folder / "scenes", train=1, val=3, size=(64, 96)))
    path = write_checkpoint(folder / "best.pth", cfg)
    torch.save(torch.load(path, weights_only=True) | {"config": cfg, "step": 1}, path)
    return folder, cfg, path


def test_detections_are_those_of_evaluation(run):
    folder, cfg, path = run
    detect = load_detector(path, device="cpu", score_thr=0.05)
    detector, dataset = load_with_data(parse_config(cfg), path, CPU)
    files = [dataset.image_folder / name for name in dataset.file_names]
    expected = [torch.from_numpy(rows) for _, rows in detect_views(detector, parse_config(cfg), dataset, CPU)]
    for found, rows in zip(detect(files), expected, strict=True):
        assert len(found["boxes"]) == len(rows) > 3
        torch.testing.assert_close(found["boxes"].double(), torch.cat([rows[:, :2], rows[:, :2] + rows[:, 2:4]], 1),
                                   rtol=0, atol=1e-3)
        assert found["names"] == [dataset.classes[int(label)] for label in rows[:, 5]] and detect.classes
        assert (found["scores"][:-1] >= found["scores"][1:]).all()
    few = load_detector(path, device="cpu", score_thr=float(expected[0][2, 4]) + 1e-6)(files[0])
    assert 0 < len(few["boxes"]) <= 2


def test_thresholds_from_a_file(run, tmp_path):
    folder, _, path = run
    file = folder / "scenes" / "val" / "000000.jpg"
    everything = load_detector(path, device="cpu", score_thr=0)
    found = everything(file)
    label = int(found["labels"][1])
    thresholds = tmp_path / "thresholds.json"
    scores = {name: {"score": float(found["scores"][1]) if k == label else None}
              for k, name in enumerate(everything.classes)}
    thresholds.write_text(json.dumps({"classes": scores}))
    kept = load_detector(path, device="cpu", thresholds=thresholds)(file)
    assert kept["labels"].tolist() == [k for k in found["labels"][:2].tolist() if k == label]
    thresholds.write_text(json.dumps({"classes": {"ball": {"score": 0.5}}}))
    with pytest.raises(DataError, match=r"is for 1 class \(ball\), and the detector has 6 classes"):
        load_detector(path, device="cpu", thresholds=thresholds)


def test_photographs_of_every_kind(run, tmp_path):
    folder, _, path = run
    detect = load_detector(path, device="cpu", score_thr=0.05)
    file = folder / "scenes" / "val" / "000000.jpg"
    tensor = read_image(file)
    array = tensor.permute(1, 2, 0).numpy()
    kinds = [str(file), file, tensor, array, Image.fromarray(array)]
    for found in detect(kinds):
        assert all(torch.equal(found[key], detect(file)[key]) for key in ("boxes", "scores", "labels"))
    for wrong in (array.astype(np.float32), array[..., 0], tensor[:1]):
        with pytest.raises(ValueError, match="a photograph must be uint8"):
            detect(wrong)
    with pytest.raises(ValueError, match="a photograph must be uint8, .* not torch.uint8 .*3, 0, 96"):
        detect(array[:0])
    for wrong in (None, file.read_bytes(), {"photo": file}):
        with pytest.raises(ValueError, match=f"must be a path, .* not {type(wrong).__name__}"):
            detect(wrong)


def test_arguments(run):
    folder, cfg, path = run
    with pytest.raises(UsageError, match="device 'gpu' cannot be used here: "):
        load_detector(path, device="gpu")
    for wrong in (2.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="score_thr must be from 0 to 1, not"):
            load_detector(path, score_thr=wrong)
    assert load_detector(path, cfg, device=CPU).cfg == parse_config(cfg)


def test_a_checkpoint_without_a_configuration_needs_one(run, tmp_path):
    folder, cfg, path = run
    bare = write_checkpoint(tmp_path / "bare.pth", cfg)
    with pytest.raises(CheckpointError, match="holds no configuration: give cfg"):
        load_detector(bare)
    found = load_detector(bare, write_config(tmp_path / "cfg.yaml", cfg), "cpu", 0.05)(folder / "scenes/val/000000.jpg")
    assert len(found["boxes"])


def test_other_names_than_the_checkpoints_are_said(run, caplog):
    """In another order they would label all boxes wrongly."""
    folder, cfg, path = run
    own = load_named(parse_config(cfg), path, CPU)[1].names
    caplog.clear()
    names = [own[1], own[0], *own[2:]]
    assert load_named(parse_config(cfg), path, CPU, names=names)[1].names == names
    assert f"--classes gives other names than {path}: disc is called ring, ring is called disc" in caplog.text
    caplog.clear()
    load_named(parse_config(cfg), path, CPU, names=own)
    assert "--classes" not in caplog.text
