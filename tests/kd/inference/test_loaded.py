"""`load_detector`: a checkpoint of a run, called on photographs of every kind."""
import numpy as np
import pytest
import torch
from PIL import Image
from runs import config, write_checkpoint, write_config

from data import generate_scenes
from data.inputs.images import read_image
from kd import load_detector
from kd.config import parse_config
from kd.evaluation.evaluate import detect_views
from kd.inference.detectors import load_with_data
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


def test_a_checkpoint_without_a_configuration_needs_one(run, tmp_path):
    folder, cfg, path = run
    bare = write_checkpoint(tmp_path / "bare.pth", cfg)
    with pytest.raises(CheckpointError, match="holds no configuration: give cfg"):
        load_detector(bare)
    found = load_detector(bare, write_config(tmp_path / "cfg.yaml", cfg), "cpu", 0.05)(folder / "scenes/val/000000.jpg")
    assert len(found["boxes"])
