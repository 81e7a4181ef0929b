"""prepare_data.py: conversion of other formats to COCO's, and the download of COCO."""
import json
import os
import shutil
from pathlib import Path

import pytest
from labelled_folders import (
    SIZE,
    assert_same,
    edit,
    prepare,
    read_back,
    write_csv,
    write_cvat,
    write_labelme,
    write_voc,
    write_yolo,
)
from odd_images import pixels, write_rotated
from PIL import Image
from runs import ROOT

from data import DataError, generate_scenes
from data.coco.check import check_data
from data.sources.formats import read_labelled
from data.sources.scenes import CLASSES
from kd.config import load_config
from kd.config.load import read_with_bases


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Ten images, and the annotations that every format must give: {file name: [(class, x1, y1, x2, y2)]}."""
    root = generate_scenes(tmp_path_factory.mktemp("scenes"), train=10, val=1, size=SIZE)
    content = json.loads((root / "annotations" / "train.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    boxes = {name: [] for name in names.values()}
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        boxes[names[annotation["image_id"]]].append((CLASSES[annotation["category_id"] - 1], x, y, x + w, y + h))
    boxes["000003.jpg"] = []
    return root / "train", boxes


def by_split(name):
    return {"0": "train", "1": "train", "2": "valid"}.get(name[5], "test")


SOURCES = {
    "voc": lambda folder, scenes: write_voc(folder, scenes),
    "yolo": lambda folder, scenes: write_yolo(folder, scenes),
    "yolo with classes.txt": lambda folder, scenes: write_yolo(folder, scenes, names="txt"),
    "csv": lambda folder, scenes: write_csv(folder, scenes),
    "labelme": write_labelme,
    "cvat": write_cvat,
    "voc in small letters": lambda folder, scenes: (
        write_voc(folder, scenes), (folder / "JPEGImages").rename(folder / "images"),
        (folder / "Annotations").rename(folder / "annotations")),
    "yolo with a byte order mark": lambda folder, scenes: (
        write_yolo(folder, scenes, names="txt"),
        [path.write_text(path.read_text(), encoding="utf-8-sig") for path in folder.rglob("*.txt")]),
    "csv from Roboflow": lambda folder, scenes: (
        write_csv(folder, scenes),
        edit(folder / "boxes.csv", "^file,note,x1,y1,x2,y2", "Filename,width,xmin,ymin,xmax,ymax")),
    "csv in UTF-16": lambda folder, scenes: (
        write_csv(folder, scenes),
        (folder / "boxes.csv").write_text((folder / "boxes.csv").read_text(encoding="utf-8-sig"), encoding="utf-16")),
    "csv with semicolons": lambda folder, scenes: write_csv(folder, scenes, delimiter=";", place="images"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_format_leads_back_to_the_same_boxes(scenes, tmp_path, monkeypatch, capsys, source):
    SOURCES[source](tmp_path / "in", scenes)
    code, printed, _ = prepare(monkeypatch, capsys, source.split()[0], tmp_path / "in", tmp_path / "out")
    assert code == 0
    found, names = read_back(tmp_path / "out")
    assert_same(found, scenes[1])
    assert {split: len(of) for split, of in names.items()} == {"train": 8, "val": 2}  # where nothing is said
    assert "8 images" in printed and "no problems" in printed and str(tmp_path / "out" / "data.yaml") in printed
    data, _ = read_with_bases(tmp_path / "out" / "data.yaml")
    assert Path(data["data"]["val"]["annotations"]) == tmp_path / "out" / "val.json"
    some = json.loads((tmp_path / "out" / "val.json").read_text())["images"][0]["file_name"]
    assert (Path(data["data"]["val"]["images"]) / some).is_file()


@pytest.mark.parametrize("kind, write, names", [
    ("voc", lambda folder, scenes: write_voc(folder, scenes, {
        "train": ["000000", "000001"], "val": ["000002"], "trainval": ["000000"], "disc_val": ["000009"]}),
     {"train": [0, 1], "val": [2]}),
    ("voc", lambda folder, scenes: write_voc(folder, scenes, {"trainval": ["000004"], "test": ["000005"]}),
     {"train": [4], "test": [5]}),
    ("voc", lambda folder, scenes: write_voc(folder, scenes, {
        "train": ["000000.jpg", "000001  1"], "val": ["000002.jpg -1", "images/000003.jpg", "", "000004"]}),
     {"train": [0, 1], "val": [2, 3, 4]}),
    ("yolo", lambda folder, scenes: write_yolo(folder, scenes, lambda name: ("", by_split(name))),
     {"train": [0, 1], "val": [2], "test": range(3, 10)}),
    ("yolo", lambda folder, scenes: write_yolo(folder, scenes, lambda name: (by_split(name), "")),
     {"train": [0, 1], "val": [2], "test": range(3, 10)}),
    ("csv", lambda folder, scenes: write_csv(folder, scenes, ("train.csv", "valid.csv")),
     {"train": range(0, 10, 2), "val": range(1, 10, 2)})],
    ids=["voc", "voc trainval", "voc with endings and flags", "yolo below", "yolo above", "csv"])
def test_splits_that_come_with_the_data(scenes, tmp_path, monkeypatch, capsys, kind, write, names):
    write(tmp_path / "in", scenes)
    code, printed, _ = prepare(monkeypatch, capsys, kind, tmp_path / "in", tmp_path / "out")
    assert code == 0
    found = read_back(tmp_path / "out")[1]
    assert found == {split: {f"{k:06d}.jpg" for k in numbers} for split, numbers in names.items()}
    left = 10 - sum(map(len, found.values()))
    assert (f"{left} images are in none of the splits" in printed) == (left > 0)


def test_splits_are_drawn_by_the_seed_alone(scenes, tmp_path, monkeypatch, capsys):
    write_voc(tmp_path / "in", scenes, {"train": ["000000"], "val": ["000001"]})
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        code, printed, _ = prepare(monkeypatch, capsys, "voc", tmp_path / "in", tmp_path / str(number), "--split",
                                   "train=0.5", "val=0.3", "test=0.2", "--seed", seed)
        assert code == 0 and "the splits that come with the data are not used" in printed
        drawn.append(read_back(tmp_path / str(number))[1])
    assert drawn[0] == drawn[1] != drawn[2]
    assert {split: len(names) for split, names in drawn[0].items()} == {"train": 5, "val": 3, "test": 2}
    assert set.union(*drawn[0].values()) == set(scenes[1])
    assert (tmp_path / "0" / "train.json").read_bytes() == (tmp_path / "1" / "train.json").read_bytes()
    assert f"data.val.annotations={tmp_path / '0' / 'test.json'}" in (tmp_path / "0" / "data.yaml").read_text()


@pytest.mark.parametrize("split, part", [
    (["train=0.8", "val=0.1"], "must be above 0 and sum up to 1"),
    (["train=1", "val=-1"], "--split: must be above 0 and up to 1, not -1.0"),
    (["train:0.8"], '--split: "train:0.8" is not of the form NAME=NUMBER'),
    (["train=0.9", "dev=0.1"], "must be called train, val or test"),
    (["train=0.99", "val=0.01"], "split val has no images")])
def test_wrong_shares(scenes, tmp_path, monkeypatch, capsys, split, part):
    write_csv(tmp_path / "in", scenes)
    code, _, error = prepare(monkeypatch, capsys, "csv", tmp_path / "in", tmp_path / "out", "--split", *split)
    assert code == 2 and len(error) == 1 and part in error[0] and not (tmp_path / "out").exists()


XML, TXT = "Annotations/000001.xml", "labels/000001.txt"
WRONG = {
    "no xml": ("voc", lambda f: shutil.rmtree(f / "Annotations"), "is not in Pascal VOC format"),
    "xml cut": ("voc", lambda f: edit(f / XML, "</annotation>", ""), "000001.xml: no element found"),
    "no image": ("voc", lambda f: (f / "JPEGImages/000001.jpg").unlink(),
                 "000001.xml: there is no image with this name"),
    "no corner": ("voc", lambda f: edit(f / XML, "<xmin>.*?</xmin>", ""), "000001.xml line 1: object 1 has no bndbox"),
    "no number": ("voc", lambda f: edit(f / XML, "<xmin>.*?</xmin>", "<xmin>a</xmin>"), "'a'"),
    "swapped": ("voc", lambda f: edit(f / XML, "<xmin>.*?</xmin>", "<xmin>900</xmin>"),
                "object 1, cross: xmax 80 is less than xmin 900"),
    "entities in UTF-16": ("voc", lambda f: (f / XML).write_bytes(
        ('<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE a [<!ENTITY b "c">]>'
         "<annotation><filename>&b;</filename></annotation>").encode("utf-16")), "declares a document type"),
    "entities": ("voc", lambda f: edit(f / XML, "^", '<!DOCTYPE a [<!ENTITY b "c">]>'),
                 "it declares a document type"),
    "no labels": ("yolo", lambda f: shutil.rmtree(f / "labels"), "no image has a text file"),
    "no names": ("yolo", lambda f: (f / "data.yaml").unlink(), "give --names FILE"),
    "pixels": ("yolo", lambda f: (f / TXT).write_text("0 10 20 30 40"), "are they in pixels?"),
    "unknown class": ("yolo", lambda f: (f / TXT).write_text("6 .5 .5 .1 .1"), "class 6 is not in 0 to 5"),
    "four values": ("yolo", lambda f: (f / TXT).write_text("\n0 .5 .5 .1"), "000001.txt line 2: "),
    "Latin-1": ("csv", lambda f: (f / "boxes.csv").write_bytes(b"file,x1,y1,x2,y2,class\na.jpg,1,1,9,9,gr\xfcn\n"),
                "boxes.csv line 2 is not in UTF-8"),
    "names in Latin-1": ("yolo", lambda f: (f / "data.yaml").write_bytes(b"names: [\xfc]"), "line 1 is not in UTF-8"),
    "open quotation mark": ("csv", lambda f: (f / "boxes.csv").write_text(
        'file,x1,y1,x2,y2,class\na.jpg,1,1,9,9,"b' + "\n" * 140_000), "field larger than field limit"),
    "no column": ("csv", lambda f: edit(f / "boxes.csv", "x2", "width"), "has no column x2"),
    "no class": ("csv", lambda f: edit(f / "boxes.csv", r"(,\d+),[a-z]+\n", r"\1,\n"), "line 2: it must have"),
    "not a number": ("csv", lambda f: edit(f / "boxes.csv", r"n,\d+", "n,five"), "line 2: x1 'five' is not a number"),
    "two splits": ("csv", lambda f: shutil.copy(f / "boxes.csv", f / "val.csv"), "000000.jpg is also in a table"),
    "leads out": ("csv", lambda f: edit(f / "boxes.csv", "000000.jpg", "../000000.jpg"), "leads out of the image"),
    "missing image": ("csv", lambda f: (f / "000004.jpg").unlink(), "--skip-unreadable leaves them out: image"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_are_one_line_and_nothing_is_written(scenes, tmp_path, monkeypatch, capsys, case):
    kind, spoil, part = WRONG[case]
    SOURCES[kind](tmp_path / "in", scenes)
    spoil(tmp_path / "in")
    code, _, error = prepare(monkeypatch, capsys, kind, tmp_path / "in", tmp_path / "out")
    assert code == 2 and len(error) == 1 and error[0].startswith("error: ") and part in error[0], error
    assert not (tmp_path / "out").exists()


def test_unreadable_images_are_left_out_where_asked(scenes, tmp_path, monkeypatch, capsys):
    write_yolo(tmp_path / "in", scenes)
    (tmp_path / "in" / "images" / "000004.jpg").write_bytes(b"no image")
    code, printed, _ = prepare(monkeypatch, capsys, "yolo", tmp_path / "in", tmp_path / "out", "--skip-unreadable")
    assert code == 0 and printed.count("left out: image") == 1 and "000004.jpg cannot be read" in printed
    assert set(read_back(tmp_path / "out")[0]) == set(scenes[1]) - {"000004.jpg"}


def test_polygons_become_boxes_and_images_are_upright(tmp_path, monkeypatch, capsys):
    for name in ("images", "labels"):
        (tmp_path / "in" / name).mkdir(parents=True)
    for k in range(2):
        write_rotated(tmp_path / "in" / "images" / f"{k}.jpg", pixels(40, 80), 6)
        (tmp_path / "in" / "labels" / f"{k}.txt").write_text("0 0.5 0.1 0.75 0.5 0.25 0.6\n")
    (tmp_path / "names.txt").write_text("leaf\n")
    assert prepare(monkeypatch, capsys, "yolo", tmp_path / "in", tmp_path / "out", "--names", tmp_path / "names.txt",
                   "--split", "train=0.5", "val=0.5")[0] == 0
    content = json.loads((tmp_path / "out" / "train.json").read_text())
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (40, 80)
    assert content["annotations"][0]["bbox"] == pytest.approx([10, 8, 20, 40])


def test_voc_that_counts_from_zero_and_difficult_objects(tmp_path, monkeypatch, capsys):
    for k in range(2):
        Image.fromarray(pixels(40, 80)).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.xml").write_text(
            "<annotation><object><name>a</name><difficult>1</difficult><bndbox><xmin>0</xmin><ymin>3</ymin><xmax>9"
            "</xmax><ymax>8.5</ymax></bndbox></object><object><name>a</name><bndbox><xmin>4</xmin><ymin>3</ymin><xmax>9"
            "</xmax><ymax>8</ymax></bndbox></object></annotation>")
    code, printed, _ = prepare(monkeypatch, capsys, "voc", tmp_path, tmp_path / "out", "--split", "train=0.5",
                               "val=0.5")
    assert code == 0 and "corners are assumed to count from 0" in printed
    assert "2 objects are marked difficult" in printed
    annotations = json.loads((tmp_path / "out" / "train.json").read_text())["annotations"]
    assert [(a["bbox"], a["iscrowd"]) for a in annotations] == [([0, 3, 9, 5.5], 1), ([4, 3, 5, 5], 0)]


def test_a_split_without_boxes_is_told(scenes, tmp_path, monkeypatch, capsys):
    write_voc(tmp_path / "in", scenes, {"train": ["000000", "000001"], "val": ["000003"]})
    code, printed, error = prepare(monkeypatch, capsys, "voc", tmp_path / "in", tmp_path / "out")
    assert code == 2 and error == ["error: 1 problem in the data, see above"]
    assert "no image has a box to learn" in printed


def test_a_file_of_the_users_is_not_overwritten(scenes, tmp_path, monkeypatch, capsys):
    write_yolo(tmp_path / "in", scenes)
    before = (tmp_path / "in" / "data.yaml").read_bytes()
    code, _, error = prepare(monkeypatch, capsys, "yolo", tmp_path / "in", tmp_path / "in")
    assert code == 2 and "would be overwritten: give another --out" in error[0]
    assert (tmp_path / "in" / "data.yaml").read_bytes() == before and not (tmp_path / "in" / "train.json").exists()
    for _ in range(2):  # its own it writes anew
        assert prepare(monkeypatch, capsys, "yolo", tmp_path / "in", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("text", ["names: [yes, no, on, 010, 1_000, ~]",
                                  "names: {0: yes, 1: no, 2: on, 3: 010, 4: 1_000, 5: ~}",
                                  "nc: 6\nnames:\n- yes\n- no\n- 'on'\n- 010\n- 1_000\n- ~"])
def test_names_in_yaml_stay_as_they_are_written(scenes, tmp_path, text):
    write_yolo(tmp_path / "in", scenes)
    (tmp_path / "in" / "data.yaml").write_text(text)
    assert read_labelled("yolo", tmp_path / "in").classes == ["yes", "no", "on", "010", "1_000", "~"]


@pytest.mark.parametrize("name, text, reason", [
    ("data.yaml", "names: [a, b, a, c, d, e]", "the class name 'a' occurs twice"),
    ("data.yaml", "names: [a, 'a ']", "the class name 'a' occurs twice"),
    ("data.yaml", "names: [a, ' ']", "class 1 has no name"),
    ("classes.txt", "a\n\nb\n", "class 1 has no name"),  # without the line, b would be class 1
    ("data.yaml", "names: {0: a, 2: b}", "names has no class 1: number its 2 classes from 0, without a gap")])
def test_wrong_class_names_are_refused(scenes, tmp_path, name, text, reason):
    write_yolo(tmp_path / "in", scenes)
    for file in [*(tmp_path / "in").glob("*.yaml"), *(tmp_path / "in").glob("classes.txt")]:
        file.unlink()
    (tmp_path / "in" / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name}: {reason}"):
        read_labelled("yolo", tmp_path / "in")


@pytest.mark.parametrize("rows, reason", [
    ("5,5,5,9", "without area"), ("500,5,500,9", "without area"), ("500,5,505,9", "outside the image"),
    ("5,5,5.5,9", "thinner than a pixel")])
def test_boxes_that_training_leaves_out_are_named(scenes, tmp_path, monkeypatch, capsys, rows, reason):
    write_csv(tmp_path / "in", scenes, ("train.csv", "val.csv"))
    with open(tmp_path / "in" / "val.csv", "a") as table:
        table.write(f"\n000001.jpg,n,{rows},star\n")
    line = len((tmp_path / "in" / "val.csv").read_text().splitlines())
    code, printed, _ = prepare(monkeypatch, capsys, "csv", tmp_path / "in", tmp_path / "out")
    assert code == 0 and printed.count(f"note: left out of training: val.csv line {line} is {reason}\n") == 1
    ids = [a["id"] for a in json.loads((tmp_path / "out" / "val.json").read_text())["annotations"]]
    boxes = sum(map(len, list(scenes[1].values())[1::2]))
    assert len(ids) == boxes + 1 and f"left out of training: 1 {reason}\n  {reason}: annotation " in printed


def test_many_boxes_that_training_leaves_out_are_counted(scenes, tmp_path, monkeypatch, capsys):
    write_csv(tmp_path / "in", scenes)
    with open(tmp_path / "in" / "boxes.csv", "a") as table:
        table.write("\n" + "000001.jpg,n,5,5,5,9,star\n" * 11)
    code, printed, _ = prepare(monkeypatch, capsys, "csv", tmp_path / "in", tmp_path / "out")
    assert code == 0 and printed.count("is without area\n") == 10
    assert printed.count("note: left out of training: 1 more box\n") == 1


def test_the_options_for_places_and_encodings(scenes, tmp_path, monkeypatch, capsys):
    write_voc(tmp_path / "in", scenes)
    (tmp_path / "in" / "JPEGImages").rename(tmp_path / "pics")
    (tmp_path / "in" / "Annotations").rename(tmp_path / "in" / "marks")
    for file in (tmp_path / "in" / "marks").iterdir():
        file.write_text(file.read_text().replace("star", "gr\xfcn"), encoding="cp1252")
    code, _, _ = prepare(monkeypatch, capsys, "voc", tmp_path / "in", tmp_path / "out", "--annotations", "marks",
                         "--images", tmp_path / "pics", "--encoding", "cp1252")
    assert code == 0
    assert_same(read_back(tmp_path / "out")[0], {
        name: [("gr\xfcn" if label == "star" else label, *corners) for label, *corners in boxes]
        for name, boxes in scenes[1].items()})
    code, _, error = prepare(monkeypatch, capsys, "voc", tmp_path / "in", tmp_path / "out", "--encoding", "klingon")
    assert code == 2 and "unknown encoding 'klingon': give one like cp1252, gbk or latin-1" in error[-1]


# What is moved after prepare_data.py has written photos/coco, and where data.yaml is then.
MOVES = {"nothing": (".", ".", "photos/coco/data.yaml"),
         "the file": ("photos/coco/data.yaml", "own.yaml", "own.yaml"),
         "the folder of the annotations": ("photos/coco", "elsewhere/sets", "elsewhere/sets/data.yaml"),
         "photographs and annotations": ("photos", "elsewhere/pictures", "elsewhere/pictures/coco/data.yaml"),
         "all of it": (".", "../moved", "../moved/photos/coco/data.yaml")}


@pytest.mark.parametrize("moved", MOVES)
def test_data_yaml_works_after_a_move(scenes, tmp_path, monkeypatch, capsys, moved):
    home = tmp_path / "home"
    write_yolo(home / "photos", scenes)
    assert prepare(monkeypatch, capsys, "yolo", home / "photos", home / "photos" / "coco")[0] == 0
    start, end, file = MOVES[moved]
    (home / end).resolve().parent.mkdir(parents=True, exist_ok=True)
    if start != end:
        (home / start).rename((home / end).resolve())
    path = Path(os.path.normpath(home / file))
    config = tmp_path / "config.yaml"
    config.write_text(f"_base_: ['{ROOT / 'configs/own_data/student.yaml'}', '{path}']\n")
    monkeypatch.chdir(tmp_path)
    (train, val) = check_data(load_config(config, ["data.workers=0"]).data)
    assert not train.problems and not val.problems and (train.num_images, val.num_images) == (8, 2)


def test_a_copy_uses_its_own_annotations(scenes, tmp_path, monkeypatch, capsys):
    write_yolo(tmp_path / "photos", scenes)
    assert prepare(monkeypatch, capsys, "yolo", tmp_path / "photos", tmp_path / "photos" / "coco")[0] == 0
    shutil.copytree(tmp_path / "photos", tmp_path / "copy")
    data, _ = read_with_bases(tmp_path / "copy" / "coco" / "data.yaml")
    assert data["data"]["train"]["annotations"] == str(tmp_path / "copy" / "coco" / "train.json")
