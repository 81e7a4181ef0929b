"""Pictures of what is distilled show what their titles say."""
from dataclasses import replace

import pytest
import torch
from runs import config, model, run_script, write_config
from small_models import VARIANTS, make_batch, small_distiller, teacher_entry

from data import generate_scenes
from data.images import read_image
from kd import build_distiller
from kd.evaluation.heatmaps import COLOURS, bars, colour, overlay
from kd.evaluation.visualize import run_all, views_of
from kd.work_dir.checkpoint import save_checkpoint
from models import build_detector

METHODS = [{"type": "CrossKD", "reused_teacher_head_idx": 1}, {"type": "FGD"}]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp("scenes"), train=2, val=3, size=(64, 96))


def classes(cfg):
    return cfg | {"head": cfg["head"] | {"num_classes": 6}}


def distilled(scenes, tmp_path, width=16):
    """A configuration with a teacher of this tower width, and the student's checkpoint from its run."""
    teacher = model()
    teacher["head"] |= {"feat_channels": width}
    cfg = config(scenes, 1, {"teacher": {"model": teacher, "checkpoint": None}, "methods": METHODS})
    distiller = build_distiller(cfg | {"model": classes(cfg["model"])})
    save_checkpoint(tmp_path / "last.pth", {"model": distiller.student.state_dict(), "step": 3,
                                            "methods": distiller.methods.state_dict()})
    return write_config(tmp_path / "cfg.yaml", cfg)


def size_of(path):
    return tuple(read_image(path).shape[1:])


def panels(width, across):
    """The number of pictures of this width side by side, each with a border of four pixels."""
    return (across - 4) / (width + 4)


def test_pictures_of_data_val(scenes, tmp_path, monkeypatch, capsys):
    path = distilled(scenes, tmp_path)
    assert run_script(monkeypatch, "visualize.py", "--cfg", path, "--checkpoint", tmp_path / "last.pth", "--out",
                      tmp_path / "out", "--count", 2, "--device", "cpu") == 0
    captured = capsys.readouterr()
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"00000{i}_{kind}.png" for i in (0, 1)
                                             for kind in ("attention", "detections", "scores")]
    assert all(str(file) in captured.out for file in files) and not captured.err
    sizes = {file.stem[7:]: size_of(file) for file in files}
    assert panels(480, sizes["detections"][1]) == 4  # truth, teacher, student, across heads
    assert panels(320, sizes["scores"][1]) == 6  # the image and five levels
    assert panels(320, sizes["attention"][1]) == 5
    for file in files:
        assert read_image(file).float().std() > 20


def test_a_picture_of_ones_own_has_no_ground_truth(scenes, tmp_path, monkeypatch):
    path = distilled(scenes, tmp_path)
    own, known = scenes / "train" / "000001.jpg", scenes / "val" / "000002.jpg"
    assert run_script(monkeypatch, "visualize.py", "--cfg", path, "--checkpoint", tmp_path / "last.pth", "--out",
                      tmp_path / "out", "--images", own, known, "--device", "cpu") == 0
    sizes = {file.stem: size_of(file) for file in (tmp_path / "out").iterdir()}
    assert panels(480, sizes["000001_detections"][1]) == 3 and panels(480, sizes["000002_detections"][1]) == 4
    height = 215 + 16  # of a mask with its caption: 43 x 64, which is what fits data.scale, in a width of 320
    assert sizes["000002_attention"][0] - sizes["000001_attention"][0] == height


def test_cross_head_predictions_need_the_trained_adapters(scenes, tmp_path, monkeypatch, capsys):
    path = distilled(scenes, tmp_path, width=24)
    arguments = ["--cfg", path, "--checkpoint", tmp_path / "last.pth", "--out", tmp_path / "out", "--count", 1,
                 "--device", "cpu"]
    assert run_script(monkeypatch, "visualize.py", *arguments) == 0
    assert panels(480, size_of(tmp_path / "out" / "000000_detections.png")[1]) == 4
    state = torch.load(tmp_path / "last.pth", weights_only=True)
    save_checkpoint(tmp_path / "last.pth", {"model": state["model"], "step": 3, "methods": {}})
    capsys.readouterr()
    assert run_script(monkeypatch, "visualize.py", *arguments) == 0
    assert panels(480, size_of(tmp_path / "out" / "000000_detections.png")[1]) == 3
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("no cross-head predictions: ")


def test_a_configuration_without_methods_is_refused(scenes, tmp_path, monkeypatch, capsys):
    path = write_config(tmp_path / "plain.yaml", config(scenes))
    assert run_script(monkeypatch, "visualize.py", "--cfg", path, "--checkpoint", "x.pth", "--out", tmp_path) == 2
    assert capsys.readouterr().err.startswith("error: distill: missing")


@pytest.mark.parametrize("head", ["GFLHead", "RetinaHead", "ATSSHead", "FCOSHead", *VARIANTS])
def test_views(head):
    """With the student's weights the same as the teacher's, all predict the same, and the maps are the scores."""
    distiller = small_distiller({"type": "CrossKD", "reused_teacher_head_idx": 1}, head=head).eval()
    distiller.student.load_state_dict(distiller.teacher.state_dict())
    images, targets = make_batch(sizes=((64, 96),), counts=(3,))
    image = images[0, :, :64, :96].clamp(0, 1).mul(255).to(torch.uint8)
    distiller.float()
    with torch.no_grad():
        views = views_of(run_all(distiller, image, targets[0], torch.device("cpu")), trained=True)
    assert [view.title for view in views] == ["teacher", "student", "student's features, teacher's head"]
    for view in views:
        view.test = replace(view.test, min_bbox_size=-1)  # boxes of random weights may lie outside the image
    for view in views:
        found = view.detections(targets[0])
        assert len(found["boxes"]) and torch.allclose(found["scores"], views[0].detections(targets[0])["scores"],
                                                      atol=1e-4)
        maps = view.score_maps()
        assert [tuple(level.shape) for level in maps] == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
        best = max(float(level.max()) for level in maps)
        assert float(found["scores"][0]) == pytest.approx(best, abs=1e-6)  # nothing is suppressed by a lower score


@pytest.mark.parametrize("student, teacher", [("GFLHead", "RetinaHead"), ("RetinaHead", "GFLHead")])
def test_views_of_heads_of_different_kinds(student, teacher):
    """The teacher's head on the student's features detects as the teacher does: with its own anchors."""
    distiller = small_distiller({"type": "CrossKD", "reused_teacher_head_idx": 1}, head=student,
                                teacher=teacher_entry(teacher), dtype=torch.float32).eval()
    images, targets = make_batch(sizes=((64, 96),), counts=(3,))
    image = images[0, :, :64, :96].clamp(0, 1).mul(255).to(torch.uint8)
    with torch.no_grad():
        views = views_of(run_all(distiller, image, targets[0], torch.device("cpu")), trained=True)
    assert [type(view.head).__name__ for view in views] == [teacher, student, teacher]
    for view in views:
        assert view.detections(targets[0])["scores"].isfinite().all()
        assert [tuple(level.shape) for level in view.score_maps()] == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]


def test_colours():
    found = colour(torch.tensor([[0.0, 0.125, 1.0, 7.0]]))
    middle = [(a + b) / 2 for a, b in zip(*COLOURS[:2])]
    assert found[:, 0].T.tolist() == [list(map(float, COLOURS[0])), middle, *[list(map(float, COLOURS[-1]))] * 2]


def test_overlay_lies_where_its_cells_do():
    values = torch.zeros(2, 3)
    values[1, 2] = 5
    picture = overlay(torch.zeros(3, 14, 20, dtype=torch.uint8), values, (8, 8), 5, 40).sum(0)  # 24 x 16 with padding
    assert picture.shape == (28, 40)
    bright = picture > picture.float().mean() + picture.float().std()
    assert bright[16:, 32:].all() and not bright[:16].any() and not bright[:, :32].any()


def test_bars():
    picture = bars(torch.tensor([1.0, 2.0, 0.0, 4.0]), 4, 8, 20)
    blue = picture[2] > picture[0]
    assert blue.sum(0).tolist() == [5, 5, 10, 10, 0, 0, 20, 20] and blue[-1, 0] and not blue[0, 0]
    assert (bars(torch.tensor([1.0]), 2, 8, 20, line=1.0)[:, 10] == 0).all()


def test_the_student_of_another_format(scenes, tmp_path, monkeypatch, capsys):
    """For heads of equal width, a state dict without the method's weights is enough."""
    path = distilled(scenes, tmp_path)
    torch.save(build_detector(classes(model())).state_dict(), tmp_path / "plain.pth")
    code = run_script(monkeypatch, "visualize.py", "--cfg", path, "--checkpoint", tmp_path / "plain.pth", "--out",
                      tmp_path / "out", "--count", 1, "--device", "cpu")
    assert code == 0, capsys.readouterr().err
    assert panels(480, size_of(tmp_path / "out" / "000000_detections.png")[1]) == 4
