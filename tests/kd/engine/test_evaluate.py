"""COCO figures."""
import json

import pytest

from data import CocoDataset
from kd.engine.evaluate import FIGURES, coco_figures, format_figures


@pytest.fixture
def dataset(tmp_path):
    """Two images, categories 3 and 7, of which 7 occurs only as a crowd."""
    (tmp_path / "images").mkdir()
    boxes = [(1, 3, [10, 10, 20, 20], 0), (1, 3, [50, 50, 30, 40], 0), (2, 3, [0, 0, 100, 100], 0),
             (2, 7, [0, 0, 10, 10], 1)]
    (tmp_path / "a.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 120, "height": 120} for i in (1, 2)],
        "annotations": [{"id": i + 1, "image_id": im, "category_id": c, "bbox": b, "iscrowd": crowd}
                        for i, (im, c, b, crowd) in enumerate(boxes)],
        "categories": [{"id": 3, "name": "cell"}, {"id": 7, "name": "crowd"}]}))
    return CocoDataset(tmp_path / "images", tmp_path / "a.json", training=False)


def result(image_id, bbox, score, label=0):
    return {"image_id": image_id, "bbox": bbox, "score": score, "label": label}


def test_perfect_detections(dataset):
    figures = coco_figures([result(1, [10, 10, 20, 20], 0.9), result(1, [50, 50, 30, 40], 0.8),
                            result(2, [0, 0, 100, 100], 0.7)], dataset)
    assert figures["AP"] == pytest.approx(1) and figures["AP50"] == pytest.approx(1)
    assert figures["per_class"] == {"cell": pytest.approx(1), "crowd": None}
    assert figures["APl"] == pytest.approx(1) and figures["AR1"] == pytest.approx(2 / 3)


def test_a_miss_and_a_loose_box(dataset):
    figures = coco_figures([result(1, [10, 10, 20, 20], 0.9), result(2, [0, 0, 100, 60], 0.8)], dataset)
    assert figures["AP50"] == pytest.approx(67 / 101)  # two of three found: precision 1 up to recall 2/3
    assert figures["AP75"] == pytest.approx(34 / 101)  # IoU 0.6 does not count
    assert figures["AR100"] == pytest.approx((1 + 3 / 10) / 3)  # 0.6 passes three of the ten thresholds


def test_no_detections_are_zero_not_an_error(dataset):
    figures = coco_figures([], dataset)
    assert figures["AP"] == 0 and figures["AR100"] == 0
    assert set(figures) == {*FIGURES, "per_class"}


def test_what_cannot_be_measured_is_none_and_shown_as_a_dash(dataset):
    figures = coco_figures([result(1, [50, 50, 30, 40], 0.8)], dataset)
    assert figures["per_class"]["crowd"] is None
    assert "-" in format_figures(figures)
    json.loads(json.dumps(figures))


@pytest.mark.parametrize("image_ids, annotation_ids, encoding", [
    ([0, 1], [0, 1], "utf-8"),  # pycocotools takes an object of id 0 for one that nobody found
    (["b", "a"], ["x", "y"], "utf-8"),
    (["2", 2], ["0", 0], "utf-8"),
    ([20230101123456789, 20230101123456790], [1, 2], "utf-8"),  # one and the same number in float64
    ([1, 2], [1, 2], "utf-8-sig"),
    ([1, 2], [1, 2], "utf-16"),
], ids=str)
def test_any_ids_and_encoding_give_the_same_figures(tmp_path, image_ids, annotation_ids, encoding):
    (tmp_path / "images").mkdir()
    (tmp_path / "a.json").write_bytes(json.dumps({
        "images": [{"id": i, "file_name": f"{k}.jpg", "width": 120, "height": 120} for k, i in enumerate(image_ids)],
        "annotations": [{"id": a, "image_id": i, "category_id": 3, "bbox": [10, 10, 20, 20]}
                        for a, i in zip(annotation_ids, image_ids)],
        "categories": [{"id": 3, "name": "cell"}]}).encode(encoding))
    dataset = CocoDataset(tmp_path / "images", tmp_path / "a.json", training=False)
    found = [result(image_ids[0], [10, 10, 20, 20], 0.9), result(image_ids[1], [60, 60, 20, 20], 0.8)]
    assert coco_figures(found[:1], dataset)["AP"] == pytest.approx(51 / 101)  # one of two
    assert coco_figures(found, dataset)["AP"] == pytest.approx(51 / 101)
    found[1]["bbox"] = [10, 10, 20, 20]
    assert coco_figures(found, dataset)["AP"] == pytest.approx(1)
