"""COCO figures."""
import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data import CocoDataset
from kd.evaluation import coco
from kd.evaluation.coco import FIGURES, coco_api, coco_evaluation, coco_figures, format_figures
from kd.evaluation.evaluate import detect
from models import Preprocess

EVALUATORS = ["pycocotools", pytest.param("faster_coco_eval", marks=pytest.mark.skipif(
    importlib.util.find_spec("faster_coco_eval") is None, reason="faster-coco-eval, the extra `eval`, is missing"))]


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


@pytest.fixture(params=EVALUATORS)
def evaluator(request, monkeypatch):
    """The package that computes the figures."""
    if request.param == "pycocotools":
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)  # as if it were not installed
    assert {api.__module__.partition(".")[0] for api in coco_api()} == {request.param}
    assert coco_api(fast=False) == (COCO, COCOeval)


def result(image_id, bbox, score, label=0):
    return image_id, np.array([[*bbox, score, label]])


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


@pytest.mark.usefixtures("evaluator")
@pytest.mark.parametrize("results", [[], [(1, np.zeros((0, 6))), (2, np.zeros((0, 6)))]])
def test_no_detections_are_zero_not_an_error(dataset, results):
    figures = coco_figures(results, dataset)
    assert figures["AP"] == 0 and figures["AR100"] == 0
    assert set(figures) == {*FIGURES, "per_class"}


def test_what_cannot_be_measured_is_none_and_shown_as_a_dash(dataset):
    figures = coco_figures([result(1, [50, 50, 30, 40], 0.8)], dataset)
    assert figures["per_class"]["crowd"] is None
    assert "-" in format_figures(figures)
    json.loads(json.dumps(figures))


@pytest.mark.usefixtures("evaluator")
@pytest.mark.parametrize("image_ids, annotation_ids, encoding", [
    ([0, 1], [0, 1], "utf-8"),  # pycocotools counts an object with id 0 as not found
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
    found[1] = result(image_ids[1], [10, 10, 20, 20], 0.8)
    assert coco_figures(found, dataset)["AP"] == pytest.approx(1)


IMAGES, CLASSES = 40, 5


@pytest.fixture
def random_case(tmp_path):
    """A data set and detections: crowds, images and a class without boxes, shuffled ids, many equal scores."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(1000)[:IMAGES].tolist()
    annotations, results = [], []
    for image_id in ids:
        count = rng.integers(1, 12) * (rng.random() < 0.8)
        boxes = np.column_stack([rng.uniform(0, 300, (count, 2)), np.exp(rng.uniform(2, 5.3, (count, 2)))])
        labels = rng.integers(1, CLASSES, count)
        for box, label in zip(boxes.tolist(), labels.tolist()):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": 6 + label,
                                "bbox": box, "iscrowd": int(rng.random() < 0.1)})
            if rng.random() < 0.5:  # an area that is not the box's
                annotations[-1]["area"] = box[2] * box[3] * 0.6
        near = np.repeat(np.column_stack([boxes, np.zeros(count), labels]), 15, axis=0)
        near[:, :4] *= rng.normal(1, 0.05, (len(near), 4))
        far = np.column_stack([rng.uniform(5, 200, (30, 4)), np.zeros(30), rng.integers(0, CLASSES, 30)])
        found = np.concatenate([near, far])
        found[:, 4] = (rng.random(len(found)) * np.repeat([20, 10], [len(near), 30])).round() / 20
        results.append((image_id, found))
    (tmp_path / "a.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 500, "height": 500} for i in ids],
        "annotations": annotations,
        "categories": [{"id": 6 + k, "name": f"class {k}"} for k in reversed(range(CLASSES))]}))
    return CocoDataset(tmp_path, tmp_path / "a.json", training=False), results


def plain_pycocotools(results, dataset):
    """The twelve figures and the precision of every class, from pycocotools' own loop over its own reading."""
    truth = COCO()
    truth.dataset = json.loads(dataset.annotation_file.read_text())
    for annotation in truth.dataset["annotations"]:
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes([
        {"image_id": image_id, "bbox": row[:4], "score": row[4], "category_id": dataset.category_ids[int(row[5])]}
        for image_id, rows in results for row in rows.tolist()]), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats, evaluation.eval["precision"][:, :, :, 0, -1]


@pytest.mark.usefixtures("evaluator")
def test_figures_are_those_of_pycocotools(random_case):
    dataset, results = random_case
    assert any(map(len, dataset.ignored_boxes)) and any(len(labels) == 0 for labels in dataset.labels)
    figures = coco_figures(results, dataset)
    expected, precision = plain_pycocotools(results, dataset)
    assert 0.1 < figures["AP"] < 0.9 and len(set(expected)) == 12  # otherwise it could not tell them apart
    assert [figures[name] for name in FIGURES] == expected.tolist()  # to the last digit
    for k, ap in enumerate(figures["per_class"].values()):
        assert ap is None if k == 0 else ap == pytest.approx(precision[:, :, k].mean(), rel=0, abs=1e-9)


def test_evaluators_get_the_objects_of_one_class_at_a_time(random_case, monkeypatch):
    """Otherwise 40,000 images with 100 detections would take many GiB."""
    dataset, results = random_case
    given = []
    listed = coco.listed
    monkeypatch.setattr(coco, "listed", lambda *args, **more: given.append(listed(*args, **more)) or given[-1])
    monkeypatch.setattr(json, "loads", None)  # and the annotation file is not parsed again
    coco_evaluation(results, dataset)
    assert len(given) == 2 * CLASSES and max(map(len, given)) < sum(len(rows) for _, rows in results) / 2
    assert sum(map(len, given[1::2])) == sum(len(rows) for _, rows in results)
    assert sum(map(len, given[::2])) == sum(map(len, dataset.truth))


@pytest.mark.usefixtures("evaluator")
def test_figures_of_the_first_images_alone(random_case):
    dataset, results = random_case
    part = CocoDataset(dataset.image_folder, dataset.annotation_file, training=False, first=10)
    figures = coco_figures([r for r in results if r[0] in part.image_ids], part)
    assert figures["AP"] != coco_figures(results, dataset)["AP"]


@pytest.mark.usefixtures("evaluator")
def test_image_ids_may_be_words(dataset):
    results = [result(1, [10, 10, 20, 20], 0.9), result(2, [0, 0, 100, 60], 0.8)]
    expected = coco_figures(results, dataset)
    words = {1: "b", 2: "a"}
    content = json.loads(dataset.annotation_file.read_text())
    for image in content["images"]:
        image["id"] = words[image["id"]]
    for annotation in content["annotations"]:
        annotation["image_id"] = words[annotation["image_id"]]
    dataset.annotation_file.write_text(json.dumps(content))
    renamed = CocoDataset(dataset.image_folder, dataset.annotation_file, training=False)
    assert coco_figures([(words[image_id], rows) for image_id, rows in results], renamed) == expected


def test_detect_gives_rows_of_width_and_height_per_image():
    """Boxes are in original pixels and as exact as float32, also for images without any; the model keeps its mode."""
    found = [{"boxes": torch.tensor([[0.1, 0.2, 10.3, 20.7], [5, 5, 7, 9]]), "scores": torch.tensor([0.9, 0.3]),
              "labels": torch.tensor([3, 0])},
             {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}]

    class Model(torch.nn.Module):
        preprocess = Preprocess()

        def predict(self, images, targets):
            assert not self.training and len(images) == 2
            return found

    class Loader(list):
        dataset = SimpleNamespace(image_ids=["b", "a"])

    batch = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [{"image_id": i, "image_size": (32, 32)} for i in "ab"]
    model = Model().train()
    (second, none), (first, rows) = detect(model, Loader([batch]), torch.device("cpu"))
    assert (first, second) == ("a", "b") and none.shape == (0, 6) and model.training
    boxes = found[0]["boxes"].double()
    expected = torch.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], found[0]["scores"].double(),
                                   found[0]["labels"]])
    assert rows.dtype == np.float64 and rows.tolist() == expected.tolist()
