"""Files of detections: what they hold, and that our readers read them again."""
import csv
import json

import pytest
import torch
from pycocotools.coco import COCO

from data import DataError
from data.images import write_picture
from data.results import WRITERS, ImageDetections
from data.sources.formats import read_labelled
from data.sources.prepare import read_sizes, to_coco

CLASSES = ["cat", "dog & <co>, \"x\""]
FOUND = [
    ImageDetections("b.png", (40, 60), 1, [[0.0, 0, 60, 40], [10.25, 5.5, 10.75, 30]], [0.875, 0.3125], [1, 0]),
    ImageDetections("deep/ö 1.jpg", (64, 96), 2, [[1.5, 2.25, 33, 44.75]], [0.5], [0]),
    ImageDetections("deep/none.jpg", (64, 96), 4, [], [], [])]


def write(kind, folder, found=FOUND, ids=(3, 7)):
    writer = WRITERS[kind](folder, CLASSES, ids)
    for image in found:
        writer.add(image)
    writer.close()


@pytest.fixture
def photos(tmp_path):
    """The images, without content: only their names are read."""
    for image in FOUND:
        path = tmp_path / "photos" / image.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "photos"


@pytest.mark.parametrize("kind", ["yolo", "voc", "csv"])
def test_our_readers_read_it_again(kind, tmp_path, photos):
    write(kind, tmp_path / "out")
    read = read_labelled(kind, tmp_path / "out", images=photos)
    images = {image.file_name: image for image in read.images}
    assert images.keys() == {image.name for image in FOUND} and set(read.classes) == set(CLASSES)
    for image in FOUND:
        boxes = images[image.name].boxes
        assert [box.name for box in boxes] == [CLASSES[label] for label in image.labels]
        (h, w) = image.size if read.relative else (1, 1)
        for box, (x1, y1, x2, y2) in zip(boxes, image.boxes):
            if kind == "voc":  # whose boxes have at least one pixel
                x2 = max(x2, x1 + 1)
            assert (box.x1 * w, box.y1 * h, box.x2 * w, box.y2 * h) == pytest.approx((x1, y1, x2, y2), abs=0.01)
            assert not box.crowd


def test_coco(tmp_path):
    write("coco", tmp_path)
    found = COCO(tmp_path / "images.json").loadRes(str(tmp_path / "predictions.json"))
    assert [(a["image_id"], a["category_id"], a["score"]) for a in found.anns.values()] == [
        (1, 7, 0.875), (1, 3, 0.3125), (2, 3, 0.5)]
    assert found.anns[3]["bbox"] == [1.5, 2.25, 31.5, 42.5]
    assert json.loads((tmp_path / "images.json").read_text()) == {
        "images": [{"id": 1, "file_name": "b.png", "width": 60, "height": 40},
                   {"id": 2, "file_name": "deep/ö 1.jpg", "width": 96, "height": 64},
                   {"id": 4, "file_name": "deep/none.jpg", "width": 96, "height": 64}],
        "annotations": [], "categories": [{"id": 3, "name": CLASSES[0]}, {"id": 7, "name": CLASSES[1]}]}


def test_csv(tmp_path):
    write("csv", tmp_path, [*FOUND, ImageDetections("clip.mp4", (4, 4), 5, [], [], [], 12)])
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open(encoding="utf-8")))
    assert rows[1] == {"file": "b.png", "x1": "10.25", "y1": "5.50", "x2": "10.75", "y2": "30.00", "class": "cat",
                       "score": "0.3125", "frame": ""}
    assert [(row["file"], row["x1"], row["frame"]) for row in rows[3:]] == [("deep/none.jpg", "", ""),
                                                                          ("clip.mp4", "", "12")]


def test_yolo(tmp_path):
    write("yolo", tmp_path)
    lines = (tmp_path / "labels" / "b.txt").read_text().splitlines()
    assert lines == ["1 0.500000 0.500000 1.000000 1.000000 0.875000", "0 0.175000 0.443750 0.008333 0.612500 0.312500"]
    assert (tmp_path / "labels" / "deep" / "none.txt").read_text() == ""
    assert (tmp_path / "classes.txt").read_text().splitlines() == CLASSES


@pytest.mark.parametrize("kind, path", [("yolo", "labels/video.mp4/000003.txt"),
                                        ("voc", "Annotations/video.mp4/000003.xml")])
def test_a_frame_has_its_own_file(kind, path, tmp_path):
    write(kind, tmp_path, [ImageDetections("video.mp4", (64, 96), 9, [[1.0, 2, 3, 4]], [0.5], [0], 3)])
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("0*")] == [path]


@pytest.mark.parametrize("kind", ["coco", "csv"])
def test_files_are_complete_after_every_image(kind, tmp_path):
    """So a program that is killed leaves what is done."""
    writer = WRITERS[kind](tmp_path, CLASSES, (1, 2))
    for done in range(len(FOUND) + 1):
        if kind == "coco":
            assert len(json.loads((tmp_path / "images.json").read_text())["images"]) == done
            assert len(json.loads((tmp_path / "predictions.json").read_text())) == [0, 2, 3, 3][done]
        else:
            assert (tmp_path / "predictions.csv").read_text().count("\n") == 1 + [0, 2, 3, 4][done]
        if done < len(FOUND):
            writer.add(FOUND[done])
    writer.close()


@pytest.mark.parametrize("kind, path", [("yolo", "labels/a.txt"), ("voc", "Annotations/a.xml"),
                                        ("yolo", "classes.txt")])
def test_annotations_are_never_overwritten(kind, path, tmp_path):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text("mine")
    with pytest.raises(DataError, match="exists, and may be annotations or earlier results: give another --out"):
        WRITERS[kind](tmp_path, CLASSES, (1, 2))
    assert [file.read_text() for file in tmp_path.rglob("*.*")] == ["mine"]


def test_names_that_are_not_text(tmp_path):
    """Linux allows any bytes in a name; Python hides them in surrogates."""
    name = b"a\xff.jpg".decode(errors="surrogateescape")
    for kind in WRITERS:
        write(kind, tmp_path / kind, [FOUND[0]._replace(name=name)])
    assert b"a\xff.jpg,0.00" in (tmp_path / "csv" / "predictions.csv").read_bytes()
    assert json.loads((tmp_path / "coco" / "images.json").read_text())["images"][0]["file_name"] == name


def test_results_become_a_data_set(tmp_path):
    """The way of prepare_data.py, on real images."""
    write_picture(tmp_path / "photos" / "b.png", torch.zeros(3, 40, 60, dtype=torch.uint8))
    write("yolo", tmp_path / "out", FOUND[:1])
    read = read_labelled("yolo", tmp_path / "out", images=tmp_path / "photos")
    sizes, problems = read_sizes([tmp_path / "photos" / "b.png"], 0)
    content = to_coco(read.images, read, {"b.png": sizes[0]})
    assert not problems and content["annotations"][1]["bbox"] == pytest.approx([10.25, 5.5, 0.5, 24.5], abs=1e-3)
