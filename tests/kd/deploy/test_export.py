"""Exported files of detectors that are unusual: one class, equal scores, all forms, weights beside the file."""
import json
from dataclasses import replace

import onnx_rules
import pytest
import torch
from exports import tiny_detector, tiny_export
from small_models import HEADS, VARIANTS

from data.extras import MissingExtra
from kd.deploy.options import check_options
from kd.deploy.runtimes import first_sentence, open_exported
from kd.exceptions import ExportError, UsageError

pytestmark = onnx_rules.needed


@pytest.mark.parametrize("head", [*HEADS, *VARIANTS])
def test_one_class(tmp_path, capfd, head):
    """The commonest detector of all; the exporter prints nothing."""
    found, _ = tiny_export(tmp_path / "file", tiny_detector(head, classes=1, score_thr=0.1, nms_iou_threshold=0.9))
    assert found.agrees and found.detections > 3
    assert capfd.readouterr() == ("", "") and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind, options", [("onnx", {"nms": "outside"}), ("pt2", {"end2end": 40})])
def test_one_class_of_an_untrained_detector(tmp_path, capfd, kind, options):
    """Its scores are equal or nearly so: runtimes round differently, choose others, and are not refused for it."""
    detector = tiny_detector("FCOSHead", False, classes=1, score_thr=0.0, nms_pre=60, max_per_img=200,
                             nms_iou_threshold=0.9)
    found, _ = tiny_export(tmp_path / "file", detector, kind, **options)
    assert found.agrees and found.detections > 5 and found.box < 1e-4 and found.score < 1e-5
    assert capfd.readouterr() == ("", "") and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_equal_scores_keep_their_order(tmp_path):
    """A head without weights gives equal scores, of which a file takes those that PyTorch takes, in the same order."""
    detector = tiny_detector(strides=(16, 32), score_thr=0.0, nms_pre=7, max_per_img=10)
    for parameter in detector.bbox_head.parameters():
        parameter.data.zero_()
    tiny_export(tmp_path / "file", detector)
    images, sizes = torch.zeros(2, 3, 192, 256, dtype=torch.uint8), [(192, 256), (150, 210)]
    boxes, scores, labels = open_exported(tmp_path / "file").run(images, torch.tensor(sizes))
    targets = [{"image_size": size} for size in sizes]
    with torch.no_grad():
        expected = detector.predict(detector.preprocess(images, targets), targets, False)
    for i, one in enumerate(expected):
        real = scores[i] > 0
        assert len(one["labels"]) > 5 and labels[i][real].tolist() == one["labels"].tolist()
        torch.testing.assert_close(boxes[i][real], one["boxes"], atol=1e-3, rtol=0)


def test_weights_beside_a_file_that_would_be_too_large_and_a_later_opset(tmp_path, monkeypatch):
    """Two files, which belong together by their names; nothing else is left, and neither holds paths."""
    onnx, detector = pytest.importorskip("onnx"), tiny_detector("ATSSHead", clip="after")
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    found, about = tiny_export(tmp_path / "a.onnx", detector, opset=21)
    assert found.agrees and sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    large, small = (tmp_path / "a.onnx.data").read_bytes(), (tmp_path / "a.onnx").read_bytes()
    assert len(large) > 4 * sum(p.numel() for p in detector.parameters()) * 0.9 > len(small)
    assert str(tmp_path).encode() not in small and b".py" not in small
    model = onnx.load(tmp_path / "a.onnx")
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 21)]
    assert json.loads({one.key: one.value for one in model.metadata_props}["densekd"])["batch"] == 2
    assert about.clip == "after"


@pytest.mark.parametrize("arguments, part", [
    (("a.onnx", None, None, False, "outside", 5, {}), "--end2end suppresses overlaps inside the file"),
    (("a.onnx", None, None, False, "inside", None, {"depth": 3}), "--fixed depth=3: there are batch, height and width"),
    (("a.onnx", None, None, False, "inside", None, {"height": 100}), "--fixed height=100: must be a multiple of 32"),
    (("a.pt2", None, 18, False, "inside", None, {}), "--opset is for ONNX files"),
    (("a.xml", None, None, True, "inside", None, {}), "--weights beside is for ONNX files"),
    (("a.onnx", "openvino", None, False, "inside", None, {}), "must be called .xml")])
def test_options_that_contradict_each_other(tmp_path, arguments, part):
    name, *others = arguments
    with pytest.raises(UsageError, match=part):
        check_options(tmp_path / name, *others)


def test_the_kind_of_a_file(tmp_path, monkeypatch):
    rest = None, None, False, "inside", None, {"batch": 1, "height": 64}
    assert check_options(tmp_path / "a.pt2", *rest) == "pt2" and check_options(tmp_path / "a.model", *rest) == "onnx"
    assert check_options(tmp_path / "a.model", "pt2", *rest[1:]) == "pt2"
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(MissingExtra, match="OpenVINO export needs openvino, which is not installed: pip install"):
        check_options(tmp_path / "a.xml", *rest)


def test_what_disagrees_is_not_left_behind(tmp_path, monkeypatch):
    def shifted(path):
        file = open_exported(path)
        return replace(file, run=lambda *inputs: [file.run(*inputs)[0] + 0.01, *file.run(*inputs)[1:]])

    monkeypatch.setattr("kd.deploy.export.open_exported", shifted)
    (tmp_path / "a.onnx").write_bytes(b"before")
    with pytest.raises(ExportError, match="does not agree with PyTorch.*0.01 pixels"):
        tiny_export(tmp_path / "a.onnx", tiny_detector())
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.onnx", b"before")]


@pytest.mark.parametrize("text, said", [
    ("[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load failed. More", "Load failed"),
    ("Exception from src/core.cpp:84:\nCheck 'a == b(c, 1)' failed at src/x.cpp:9:\nIncorrect weights in bin file!\n\n",
     "Incorrect weights in bin file"),
    ("Exception from src/core.cpp:84:\n", "Exception from src/core.cpp:84"), ("short", "ValueError short")])
def test_the_reason_of_a_runtime_comes_without_places_in_its_code(text, said):
    assert first_sentence(ValueError(text)) == said
