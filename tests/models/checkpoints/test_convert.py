"""Weights are converted for other projects and back."""
import os

import pytest
import torch
from runs import run_script

from models import build_detector
from models.checkpoints.convert import convert_checkpoint, to_mmdet
from models.weights import CheckpointError, load_weights


def detector(head="GFLHead", channels=32, depth=18, base_channels=8, **head_options):
    torch.manual_seed(0)
    neck = {"type": "FPN", "out_channels": channels, "start_level": 1, "num_outs": 5, "add_extra_convs": "on_output"}
    width = {"base_channels": base_channels, "stem_channels": base_channels}
    model = build_detector(
        {
            "backbone": {"type": "ResNet", "depth": depth, **width},
            "neck": neck,
            "head": {"type": head, "num_classes": 4, "feat_channels": channels, **head_options},
        }
    )
    with torch.no_grad():
        for value in model.parameters():
            value.uniform_()
    return model


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def fgd_file(path):
    student, teacher = detector().state_dict(), detector(depth=50).state_dict()
    state = {f"student.{name}": value for name, value in student.items()}
    state |= {f"teacher.{name}": value for name, value in teacher.items()}
    torch.save({"meta": {"mmdet_version": "2.11.0", "CLASSES": ("a", "b", "c", "d")}, "state_dict": state}, path)
    return student, teacher


@pytest.mark.parametrize("head", ["GFLHead", "RetinaHead"])
def test_to_mmdet_and_back(tmp_path, head):
    model = detector(head)
    source, out = tmp_path / "last.pth", tmp_path / "new" / "mmdet.pth"
    torch.save({"format": "densekd", "model": model.state_dict(), "classes": ["a", "b", "c", "d"]}, source)
    line = convert_checkpoint(source, "mmdet", out)
    assert line.startswith(f"converted densekd checkpoint {source}: ") and line.endswith(f" tensors to {out}")
    written = torch.load(out, weights_only=True)  # the file contains only plain types
    assert written["meta"]["CLASSES"] == ("a", "b", "c", "d")
    assert written["meta"]["dataset_meta"] == {"classes": ("a", "b", "c", "d")}
    extra = {"bbox_head.integral.project"} if head == "GFLHead" else set()
    assert written["state_dict"].keys() - model.state_dict().keys() == extra
    if extra:
        assert written["state_dict"]["bbox_head.integral.project"].tolist() == list(range(17))
    other = detector(head)
    with torch.no_grad():
        other.bbox_head.cls_convs[0].conv.weight.zero_()
    report = load_weights(other, out)
    assert report.format == "mmdet3" and not report.unexpected
    assert_same(other.state_dict(), model.state_dict())
    assert os.listdir(out.parent) == ["mmdet.pth"]


def test_to_mmdet_leaves_out_what_mmdet_has_not():
    weights = {"bbox_head.retina_cls.weight": torch.ones(1), "bbox_head.loss_normalizer": torch.ones(())}
    content = to_mmdet(weights, {"classes": ("a",), "hook": object(), "nested": [{1: object()}], "epoch": 3})
    assert list(content["state_dict"]) == ["bbox_head.retina_cls.weight"]
    assert content["meta"] == {
        "classes": ("a",),
        "epoch": 3,
        "CLASSES": ("a",),
        "dataset_meta": {"classes": ("a",)},
    }


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_fgd_to_its_parts(tmp_path, part):
    student, teacher = fgd_file(tmp_path / "fgd.pth")
    convert_checkpoint(tmp_path / "fgd.pth", "student", tmp_path / "out.pth", None if part == "student" else part)
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    del written["state_dict"]["bbox_head.integral.project"]
    assert_same(written["state_dict"], student if part == "student" else teacher)
    assert written["meta"]["CLASSES"] == ("a", "b", "c", "d")


# --- the script -------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_not_converted(tmp_path):
    state = detector().state_dict()
    state["bbox_head.gfl_cls.bias"][0] = float("nan")
    with pytest.raises(CheckpointError, match=r"has NaN or infinite values in 1 \(bbox_head.gfl_cls.bias\)"):
        convert_checkpoint({"state_dict": state}, "mmdet", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_script(tmp_path, monkeypatch, capsys):
    student, _ = fgd_file(tmp_path / "fgd.pth")
    assert run_script(monkeypatch, "convert.py", "--checkpoint", tmp_path / "fgd.pth", "--to", "student", "--out",
                      tmp_path / "student.pth") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("converted fgd checkpoint") and printed.out.count("\n") == 1 and not printed.err
    model = detector()
    load_weights(model, tmp_path / "student.pth")
    assert_same(model.state_dict(), student)


def test_script_with_bad_input(tmp_path, monkeypatch, capsys):
    fgd_file(tmp_path / "fgd.pth")
    torch.save(detector().state_dict(), tmp_path / "gfl.pth")
    (tmp_path / "file").write_text("not a folder")
    out = tmp_path / "out.pth"
    cases = [
        (tmp_path / "none.pth", "mmdet", out, "no such checkpoint file"),
        (tmp_path / "file", "mmdet", out, "it is damaged or not a checkpoint"),
        (tmp_path / "fgd.pth", "mmdet", out, "holds student and teacher: choose the part to load"),
        (tmp_path / "gfl.pth", "torchvision", out, "only a RetinaNet can be converted to torchvision"),
        (tmp_path / "gfl.pth", "student", out, "holds no part 'student'"),
        (tmp_path / "gfl.pth", "mmdet", tmp_path / "file" / "out.pth", "file"),
    ]
    for source, to, target, message in cases:
        code = run_script(monkeypatch, "convert.py", "--checkpoint", source, "--to", to, "--out", target)
        error = capsys.readouterr().err
        assert code == 2, message
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
        assert not out.exists()
