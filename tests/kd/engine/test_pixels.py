"""Whether pixel statistics and channel order are those that a detector was trained with."""
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ROOT, config, model, run_script, write_checkpoint, write_config

from data import generate_scenes
from kd.config import load_config, parse_config
from kd.engine.check import pixels
from kd.engine.check.pixels import FEW, IMAGES, others, recorded, section, try_others
from kd.engine.check.quality import Quality, compared, measure
from kd.engine.start import first_of_val
from kd.inference.detectors import load_with_data
from models import build_detector
from models.preprocess import Preprocess

SHARED = ROOT.parent / "shared"
GOLDEN = SHARED / "golden" / "checkpoints" / "mmdet3_gfl_r18w32_bccd.pth"
IMAGENET = section(Preprocess())
BGR = {"mean": IMAGENET["mean"][::-1], "std": IMAGENET["std"][::-1], "channel_order": "bgr"}
CAFFE = {"mean": IMAGENET["mean"][::-1], "std": [1, 1, 1], "channel_order": "bgr"}


class Images:
    """Stands for a data set."""

    def __init__(self, count: int):
        self.image_ids = list(range(min(count, IMAGES)))


class Pretended:
    """A detector whose APs of single images are given by its pixel statistics."""

    def __init__(self, now: dict, right: dict, loss: float, generator: np.random.Generator, images: int = IMAGES):
        self.preprocess, self.right, self.loss, self.count = Preprocess(**now), right, loss, images
        self.base = generator.uniform(0.1, 0.9, images)
        self.generator = generator

    def measure(self, images: Images) -> Quality:
        """With any but the right setting, images lose `loss` on average, but some of them gain."""
        own = self.base.copy()
        if section(self.preprocess) != self.right:
            own -= self.generator.normal(self.loss, 0.1, len(own))
        count = min(len(images.image_ids), self.count)
        return Quality(count, 0.05, None, {}, 0, None, {}, {}, dict(enumerate(own[:count])))

    def trial(self):
        return try_others(self, self.measure(Images(IMAGES)), Images, self.measure)


def test_the_settings_that_are_tried():
    assert BGR in others(IMAGENET) and CAFFE in others(IMAGENET) and IMAGENET in others(BGR)
    for now in (IMAGENET, BGR, CAFFE):
        found = others(now)
        assert now not in found and len(found) >= 9 and all(found.count(each) == 1 for each in found)
        assert all(section(Preprocess(**each)) == each for each in found)
    assert [127.5] * 3 in [each["mean"] for each in others(IMAGENET)]


@pytest.mark.parametrize("loss", [0.0, 0.02, 0.2])
def test_the_right_setting_is_not_questioned(loss):
    """Not even where the others are as good: the best of ten chances is not better."""
    found = [Pretended(IMAGENET, IMAGENET, loss, np.random.default_rng(seed)).trial() for seed in range(200)]
    assert sum(trial.better is not None for trial in found) <= 2
    assert {trial.images for trial in found} == {IMAGES - FEW}


@pytest.mark.parametrize("loss", [0.1, 0.3])
def test_a_wrong_setting_is_found(loss):
    found = [Pretended(BGR, IMAGENET, loss, np.random.default_rng(seed)).trial() for seed in range(50)]
    assert sum(trial.better == IMAGENET for trial in found) >= 48
    assert all(abs(trial.gain - loss) < 0.1 and 0 < trial.error < 0.05 for trial in found if trial.better)


def test_a_gain_that_nobody_would_notice_is_no_mistake():
    """Clear, but of less than a twentieth."""
    pretended = Pretended(BGR, IMAGENET, 0.01, np.random.default_rng(0))
    pretended.generator = type("Same", (), {"normal": lambda self, mean, spread, count: np.full(count, mean)})()
    trial = pretended.trial()
    assert trial.better is None


def test_with_few_images_nothing_is_said():
    trial = Pretended(BGR, IMAGENET, 0.5, np.random.default_rng(0), images=19).trial()
    assert trial.better is None and trial.untested and not trial.tried


def test_the_comparison_goes_image_by_image():
    ours, theirs = {1: 0.5, 2: 0.7, 3: 0.9, 4: 1.0}, {2: 0.6, 3: 0.6, 4: 1.0, 9: 0.0}
    mean, error, count = compared(ours, theirs)
    differences = np.array([0.1, 0.3, 0.0])
    assert count == 3 and mean == pytest.approx(differences.mean())
    assert error == pytest.approx(differences.std(ddof=1) / 3 ** 0.5)
    assert compared(ours, {9: 1.0}) == (0.0, float("inf"), 0)


def test_what_a_checkpoint_says(tmp_path):
    cfg = config(tmp_path)
    detector = build_detector(cfg["model"] | {"head": cfg["model"]["head"] | {"num_classes": 6}})
    path = write_checkpoint(tmp_path / "a.pth", cfg)
    assert recorded(str(path), None, detector) is None  # it has no configuration
    state = torch.load(path, weights_only=True)
    torch.save(state | {"config": cfg | {"model": model() | {"preprocess": {"channel_order": "bgr"}}}}, path)
    assert recorded(str(path), None, detector) == IMAGENET | {"channel_order": "bgr"}
    torch.save(state | {"config": cfg}, path)
    assert recorded(str(path), None, detector) == IMAGENET
    torch.save(state | {"config": {"model": 3}}, path)
    assert recorded(str(path), None, detector) is None
    assert recorded("zoo:gfl_r101_2x", None, detector) == IMAGENET


def test_a_checkpoint_that_was_trained_otherwise_is_a_warning(tmp_path, monkeypatch, capsys):
    """Its configuration tells, so no image is needed."""
    scenes = generate_scenes(tmp_path / "scenes", train=4, val=2, size=(64, 64))
    cfg = config(scenes, 1)
    path = write_checkpoint(tmp_path / "start.pth", cfg)
    state = torch.load(path, weights_only=True)
    torch.save(state | {"config": cfg | {"model": model() | {"preprocess": CAFFE}}}, path)
    teacher = {"teacher": {"model": model(), "checkpoint": str(path)}, "methods": [{"type": "FGD"}]}
    for name, own in (("detector", config(scenes, 1)), ("teacher 0", config(scenes, 1, teacher))):
        if name == "detector":
            own["train"]["init"] = str(path)
        assert run_script(monkeypatch, "train.py", "--cfg", write_config(tmp_path / "cfg.yaml", own), "--check",
                          "--device", "cpu") == 0
        line, = (line for line in capsys.readouterr().out.splitlines() if "was trained with" in line)
        assert line.startswith(f"  WARNING  {name}: its checkpoint was trained with {{mean: [103.53, 116.28, 123.675], "
                               "std: [1, 1, 1], channel_order: bgr}, and ")


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared")
@pytest.mark.parametrize("now, right", [(IMAGENET, True), (BGR, False)])
def test_the_golden_detector_on_blood_cells(monkeypatch, now, right):
    monkeypatch.setenv("DENSEKD_DATA", str(SHARED / "data"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(pixels, "FEW", 6)  # of 30 images
    cfg = load_config(Path("configs/bccd/teacher_gfl_r18w32.yaml"), ["data.workers=0", "data.scale=[200,150]"])
    detector, dataset = load_with_data(cfg, str(GOLDEN), torch.device("cpu"))
    detector.preprocess = Preprocess(**now)
    cfg = parse_config(cfg)

    def look(images):
        return measure(detector, cfg, images, range(3), torch.device("cpu"))

    def first(count):
        return first_of_val(cfg, dataset.classes, min(count, 30))

    quality = look(first(IMAGES))
    trial = try_others(detector, quality, first, look)
    assert (trial.better is None) == right and trial.images == 24, trial
    if not right:
        assert trial.better == IMAGENET and trial.gain > 3 * trial.error > 0
