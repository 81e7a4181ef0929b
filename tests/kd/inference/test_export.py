"""Exported files of detectors that are unusual: one class, and thresholds at their ends."""
import pytest
import torch
from small_models import HEADS, VARIANTS, enliven, small_detector

from data.inputs.files import make_sample
from kd.inference.export import Recipe, export, load_exported

SCALE = (96, 64)


def exported(path, detector, kind="onnx", nms="inside"):
    """Export and check on noise and on an image of one colour, where many scores are equal."""
    least = 32 if kind == "onnx" else max(detector.bbox_head.prior_generator.strides) + 32
    about = Recipe(["a"] * detector.bbox_head.num_classes, SCALE, False, 32, least, nms,
                   detector.test.nms_iou_threshold, detector.test.max_per_img)
    noise = torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    samples = [make_sample(image, i, [SCALE]) for i, image in enumerate((noise, torch.full((3, 64, 96), 99).byte()))]
    return export(detector, path, kind, about, samples)


@pytest.mark.parametrize("head", [*HEADS, *VARIANTS])
def test_one_class(tmp_path, capfd, head):
    """The commonest detector of all; the exporter prints nothing."""
    detector = enliven(small_detector(head, dtype=torch.float32, head={"num_classes": 1})).eval()
    found = exported(tmp_path / "file", detector)
    assert found.agrees and found.detections > 3
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("head, kind, nms", [*((head, "onnx", "outside") for head in [*HEADS, *VARIANTS]),
                                             ("GFLHead", "pt2", "inside")])  # takes seconds
def test_one_class_of_an_untrained_detector(tmp_path, capfd, head, kind, nms):
    """Its scores are equal or nearly so: runtimes round differently, choose others, and are not refused for it."""
    sections = {"head": {"num_classes": 1}, "test": {"score_thr": 0.0, "nms_pre": 60, "max_per_img": 200,
                                                     "nms_iou_threshold": 0.9}}
    if kind == "pt2":  # fewer layers take less time
        sections["neck"] = {"start_level": 2, "num_outs": 2}
        sections["head"] |= {"stacked_convs": 1, "anchor_generator": {
            "type": "AnchorGenerator", "ratios": [1.0], "octave_base_scale": 8, "scales_per_octave": 1,
            "strides": [16, 32]}}
    detector = small_detector(head, dtype=torch.float32, **sections).eval()
    found = exported(tmp_path / "file", detector, kind, nms)
    assert found.agrees and found.detections > 5 and found.box < 1e-4 and found.score < 1e-5
    assert capfd.readouterr() == ("", "") and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("nms", ["inside", "outside"])
def test_equal_scores_keep_their_order(tmp_path, nms):
    """A head without weights gives equal scores, of which a file takes those that PyTorch takes, in the same order."""
    detector = small_detector(dtype=torch.float32, test={"score_thr": 0.0, "nms_pre": 7, "max_per_img": 10}).eval()
    for parameter in detector.bbox_head.parameters():
        parameter.data.zero_()
    exported(tmp_path / "file", detector, nms=nms)
    images, sizes = torch.zeros(2, 3, 64, 96, dtype=torch.uint8), [(64, 96), (50, 70)]
    boxes, scores, labels = load_exported(tmp_path / "file", "onnx")(images, torch.tensor(sizes))
    targets = [{"image_size": size} for size in sizes]
    with torch.no_grad():
        expected = detector.predict(detector.preprocess(images, targets), targets, False, with_nms=nms == "inside")
    for i, one in enumerate(expected):
        real = scores[i] > 0
        assert len(one["labels"]) > 5 and labels[i][real].tolist() == one["labels"].tolist()
        torch.testing.assert_close(boxes[i][real], one["boxes"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("threshold", [0, 1, 0.0, 1.0])
def test_a_threshold_may_be_a_whole_number(tmp_path, threshold):
    detector = enliven(small_detector(dtype=torch.float32, test={"nms_iou_threshold": threshold})).eval()
    found = exported(tmp_path / "file", detector)
    assert found.agrees and found.detections > 3
