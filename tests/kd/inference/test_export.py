"""Exported files of detectors that are unusual: one class, and thresholds at their ends."""
import pytest
import torch
from small_models import enliven, small_detector

from data.inputs.files import make_sample
from kd.inference.export import Recipe, export

SCALE = (96, 64)

HEADS = ("GFLHead", "RetinaHead", "ATSSHead", "FCOSHead")


def exported(path, detector, kind="onnx", nms="inside"):
    least = 32 if kind == "onnx" else max(detector.bbox_head.prior_generator.strides) + 32
    about = Recipe(["a"] * detector.bbox_head.num_classes, SCALE, False, 32, least, nms,
                   detector.test.nms_iou_threshold, detector.test.max_per_img)
    image = torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return export(detector, path, kind, about, [make_sample(image, 0, [SCALE])])


@pytest.mark.parametrize("head, kind, nms", [
    *((head, "onnx", nms) for head in HEADS for nms in ("inside", "outside")),
    ("GFLHead", "pt2", "inside")])  # takes seconds
def test_one_class(tmp_path, capfd, head, kind, nms):
    """The commonest detector of all; the exporter prints nothing."""
    detector = enliven(small_detector(head, dtype=torch.float32, head={"num_classes": 1})).eval()
    found = exported(tmp_path / "file", detector, kind, nms)
    assert found.agrees and found.detections > 3
    assert not capfd.readouterr().out


@pytest.mark.parametrize("threshold", [0, 1, 0.0, 1.0])
def test_a_threshold_may_be_a_whole_number(tmp_path, threshold):
    detector = enliven(small_detector(dtype=torch.float32, test={"nms_iou_threshold": threshold})).eval()
    found = exported(tmp_path / "file", detector)
    assert found.agrees and found.detections > 3
