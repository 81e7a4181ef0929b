"""Which images the page shows, and the boxes on them, by hand."""
import base64
import io
import json
import re

import numpy as np
import pytest
from hand_detections import A, B
from PIL import Image

from data import CocoDataset
from kd.evaluation.analyze import analyze_evaluation
from kd.evaluation.coco import coco_evaluation, precision_recall
from kd.experiments.report.checkpoints import Measured
from kd.experiments.report.pictures import Column, boxes_of, differing_images, mistakes, picture, worst_images

OBJECTS = [(7, A, (10, 10, 40, 40)), (7, B, (100, 100, 50, 50)), (3, A, (20, 20, 30, 30))]  # image 5 has none
SHADES = {7: 20, 5: 120, 3: 220}  # by image id, in the order of the file


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three grey images whose ids do not follow their order in the file."""
    folder = tmp_path_factory.mktemp("shades")
    for image_id, shade in SHADES.items():
        Image.new("RGB", (640, 480), (shade,) * 3).save(folder / f"{image_id}.png")
    content = {"images": [{"id": i, "file_name": f"{i}.png", "width": 640, "height": 480} for i in SHADES],
               "annotations": [{"id": n, "image_id": i, "category_id": 10 * (k + 1), "bbox": list(box), "iscrowd": 0,
                                "area": box[2] * box[3]} for n, (i, k, box) in enumerate(OBJECTS)],
               "categories": [{"id": 10, "name": "A"}, {"id": 20, "name": "B"}]}
    (folder / "a.json").write_text(json.dumps(content))
    return CocoDataset(folder, folder / "a.json", training=False)


def measured(dataset, found, name="x"):
    """`found`: (image id, class, box, score)."""
    results = [(i, np.array([[*box, score, k] for at, k, box, score in found if at == i]).reshape(-1, 6))
               for i in dataset.image_ids]
    evaluation = coco_evaluation(results, dataset, fast=False, matches=True)
    return Measured(name, analyze_evaluation(name, evaluation, dataset), precision_recall(evaluation, dataset), dataset)


@pytest.fixture(scope="module")
def pair(dataset):
    """One that finds an object and adds two wrong boxes, and one that finds all but adds one wrong box elsewhere."""
    before = measured(dataset, [(7, A, (10, 10, 40, 40), 0.9), (7, A, (300, 300, 40, 40), 0.5),
                                (3, B, (20, 20, 30, 30), 0.4), (5, A, (1, 1, 9, 9), 0.1)])
    after = measured(dataset, [(7, A, (11, 10, 40, 40), 0.9), (7, B, (100, 100, 50, 50), 0.8),
                               (3, A, (20, 20, 30, 30), 0.5), (5, B, (1, 1, 9, 9), 0.6)])
    return Column("before", before), Column("after", after)


def test_mistakes_are_counted_by_image(pair):
    """In the order of ids: 3, 5, 7."""
    assert mistakes(pair[0].measured, 0.3).tolist() == [2, 0, 2]
    assert mistakes(pair[1].measured, 0.3).tolist() == [0, 1, 0]
    assert mistakes(pair[0].measured, 0.05).tolist() == [2, 1, 2]
    assert mistakes(pair[1].measured, 0.7).tolist() == [1, 0, 0]


def test_images_to_both_sides_are_shown(pair):
    order, said = differing_images(*pair, 0.3, 4)
    assert order == [0, 2, 1]
    assert "makes fewer mistakes than before on 2, more on 1, and as many on 0." in said
    assert "2 images on which it is ahead most and 1 image on which it is behind most." in said
    assert differing_images(*pair, 0.3, 1)[0] == [0] and differing_images(*pair, 0.3, 0)[0] == []
    assert differing_images(*pair[::-1], 0.3, 2)[0] == [1, 0]
    order, said = differing_images(pair[0], pair[0], 0.3, 4)
    assert order == [] and "no image, because they do not differ" in said


def test_the_worst_images_of_one(pair):
    order, said = worst_images(pair[0].measured, 0.3, 2)
    assert order == [0, 2] and "On 1 image of 3 there is no mistake." in said


def test_the_boxes_are_on_their_image(pair):
    """Place 2 is image 7, the first in the file, half as large as its original."""
    html = picture(0, 2, list(pair), 0.3)
    assert "<h3>7.png</h3>" in html
    assert html.count("data:image/jpeg") == 1 and html.count('<use href="#picture-0">') == 2
    shown = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])))
    assert shown.size == (320, 240) and abs(np.asarray(shown).mean() - SHADES[7]) < 2
    captions = re.findall(r"<figcaption><strong>(.*?)</strong><span>(.*?)</span>", html)
    assert captions == [("annotated", "2 objects"), ("before", "1 found, 1 not found, 1 wrong box"),
                        ("after", "2 found, 0 not found, 0 wrong boxes")]
    boxes = re.findall(r'<title>(.)</title><rect x="(\d+)" y="(\d+)" width="(\d+)" height="(\d+)" class="edge">', html)
    assert boxes[:2] == [("A", "5", "5", "20", "20"), ("B", "50", "50", "25", "25")]


def test_kinds_of_boxes(pair):
    judged = pair[0].measured.analysis.judged
    assert boxes_of(judged, 2, ["A", "B"], 1, None)[1] == {"object": 2, "right": 0, "wrong": 0, "lost": 0}
    drawn, counts = boxes_of(judged, 2, ["A", "B"], 1, 0.3)
    assert counts == {"object": 0, "right": 1, "wrong": 1, "lost": 1} and len(drawn) == 3
    assert [re.search(r"<title>(.*?)</title>.*class=\"(right|wrong|lost)\"", box).groups() for box in drawn] == [
        ("B", "lost"), ("A 0.90", "right"), ("A 0.50", "wrong")]
