"""label.py: a teacher's detections, or any COCO results, as annotations to train on."""
import json
import shutil

import numpy as np
import pytest
from pycocotools.coco import COCO
from runs import config, config_with, run_script, write_checkpoint, write_config

from data import CocoDataset, generate_scenes
from data.coco.annotations import read_annotations
from data.coco.problems import find_problems
from data.sources.scenes import CLASSES


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """A folder with images in a subfolder, a configuration, and a checkpoint that finds something everywhere."""
    root = generate_scenes(tmp_path_factory.mktemp("lively"), train=4, val=4, size=(64, 96))
    (root / "in" / "deep").mkdir(parents=True)
    for i, path in enumerate(sorted((root / "val").glob("*.jpg"))):
        shutil.copy(path, root / "in" / ("deep" if i % 2 else ".") / path.name)
    cfg = config(root)
    cfg["model"]["test"] = {"score_thr": 0.5, "max_per_img": 30}
    cfg["data"]["scale"] = [96, 64]
    return root, write_config(root / "cfg.yaml", cfg), write_checkpoint(root / "model.pth", cfg), cfg


def label(monkeypatch, capsys, lively, out, *arguments):
    """Exit code, what was printed, the lines of stderr, and the annotations."""
    root, path, checkpoint, _ = lively
    if "--results" not in arguments:
        arguments = ("--cfg", path, "--checkpoint", checkpoint, "--device", "cpu", *arguments)
        arguments += () if "--input" in arguments else ("--input", root / "in")
    code = run_script(monkeypatch, "label.py", "--out", out, *arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err.strip().splitlines(), json.loads(out.read_text()) if out.exists() else None


def predictions(monkeypatch, capsys, lively, out, score):
    root, path, checkpoint, _ = lively
    assert run_script(monkeypatch, "predict.py", "--cfg", path, "--checkpoint", checkpoint, "--device", "cpu",
                      "--input", root / "in", "--out", out, "--score-thr", score) == 0
    capsys.readouterr()
    return json.loads((out / "predictions.json").read_text())


def keys(entries):
    return sorted((e["image_id"], e["category_id"], e["score"]) for e in entries)


def test_detections_become_annotations(lively, tmp_path, monkeypatch, capsys):
    code, printed, _, found = label(monkeypatch, capsys, lively, tmp_path / "deep" / "found.json", "--score-thr", 0.55)
    assert code == 0 and find_problems(found) == []
    assert [image["file_name"] for image in found["images"]] == [
        "000000.jpg", "000002.jpg", "deep/000001.jpg", "deep/000003.jpg"]
    assert all((image["width"], image["height"]) == (96, 64) for image in found["images"])
    assert [category["name"] for category in found["categories"]] == CLASSES
    expected = predictions(monkeypatch, capsys, lively, tmp_path / "predicted", 0.55)
    assert len(expected) > 20 and all(a["score"] >= 0.55 and a["iscrowd"] == 0 for a in found["annotations"])
    assert set(keys(found["annotations"])) <= set(keys(expected))
    assert f"{len(found['annotations'])} boxes on 4 of 4 images; " in printed
    of = {number: (image["width"], image["height"]) for number, image in enumerate(found["images"], 1)}
    for number, annotation in enumerate(found["annotations"], 1):
        x, y, w, h = annotation["bbox"]
        width, height = of[annotation["image_id"]]
        assert min(x, y) >= 0 and x + w <= width + 1e-6 and y + h <= height + 1e-6 and min(w, h) >= 1
        assert annotation["area"] == w * h and annotation["id"] == number
    assert len(COCO(str(tmp_path / "deep" / "found.json")).anns) == len(found["annotations"])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["found.json"]


def test_the_whole_way(lively, tmp_path, monkeypatch, capsys):
    """Label, look at it, train on it beside the own labels."""
    root, _, _, cfg = lively
    assert label(monkeypatch, capsys, lively, tmp_path / "found.json")[0] == 0
    assert sum(map(len, read_annotations(tmp_path / "found.json").labels)) > 20
    dataset = CocoDataset(root / "in", tmp_path / "found.json", training=True)
    assert len(dataset) == 4 and len(dataset[0][1]["boxes"])
    more = [cfg["data"]["train"], {"images": str(root / "in"), "annotations": str(tmp_path / "found.json")}]
    path = write_config(tmp_path / "more.yaml", config_with(cfg, data={"train": more}, train={"epochs": 1}))
    assert run_script(monkeypatch, "check_data.py", "--cfg", path, "--pictures", tmp_path / "seen", "--count", 5) == 0
    assert len(list((tmp_path / "seen").iterdir())) == 5
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", tmp_path / "run", "--device", "cpu") == 0
    assert run_script(monkeypatch, "label.py", "--checkpoint", tmp_path / "run" / "last.pth", "--input", root / "in",
                      "--out", tmp_path / "own.json", "--device", "cpu") == 0  # its own configuration
    assert "8 training images" in (tmp_path / "run" / "train.log").read_text()
    capsys.readouterr()


def test_thresholds_of_classes(lively, tmp_path, monkeypatch, capsys):
    everything = label(monkeypatch, capsys, lively, tmp_path / "a.json", "--score-thr", 0)[3]["annotations"]
    middle = sorted(a["score"] for a in everything if a["category_id"] == 2)
    middle = middle[len(middle) // 2]
    some = label(monkeypatch, capsys, lively, tmp_path / "b.json", "--score-thr", 0.999, f"{CLASSES[0]}=0",
                 f"{CLASSES[1]}={middle}")[3]["annotations"]
    assert keys(some) == keys(a for a in everything if a["category_id"] == 1 or (
        a["category_id"] == 2 and a["score"] >= middle) or a["score"] >= 0.999)
    default = label(monkeypatch, capsys, lively, tmp_path / "c.json")[3]["annotations"]
    assert keys(default) == keys(a for a in everything if a["score"] >= 0.5)


def test_results_of_any_detector(lively, tmp_path, monkeypatch, capsys):
    root = lively[0]
    known = json.loads((root / "annotations" / "val.json").read_text())
    first = known["images"][0]["id"]
    entries = [(first, 1, [-5, 2, 20, 30], 0.9), (first, 1, [3, 2, 9, 9], 0.4), (first, 2, [3, 2, 9, 9], 0.4),
               (first, 2, [3, 2, 0.5, 9], 0.8), (first, 3, [90, 2, 20, 5], 1.0)]
    results = [dict(zip(("image_id", "category_id", "bbox", "score"), entry)) for entry in entries]
    (tmp_path / "results.json").write_text(json.dumps(results))
    code, printed, _, found = label(monkeypatch, capsys, lively, tmp_path / "found.json", "--results", tmp_path /
                                    "results.json", "--annotations", root / "annotations" / "val.json", "--score-thr",
                                    f"{CLASSES[1]}=0.3")
    assert code == 0 and find_problems(found) == []
    assert [(a["category_id"], a["bbox"], a["area"], a["score"]) for a in found["annotations"]] == [
        (1, [0, 2, 15, 30], 450, 0.9), (2, [3, 2, 9, 9], 81, 0.4), (3, [90, 2, 6, 5], 30, 1.0)]
    assert found["images"] == known["images"] and found["categories"] == known["categories"]
    assert "3 boxes on 1 of 4 images" in printed and "1 detection left out: thinner than a pixel" in printed


def test_the_files_of_predict_are_results(lively, tmp_path, monkeypatch, capsys):
    predictions(monkeypatch, capsys, lively, tmp_path / "predicted", 0.5)
    by_results = label(monkeypatch, capsys, lively, tmp_path / "a.json", "--results", tmp_path / "predicted" /
                       "predictions.json", "--annotations", tmp_path / "predicted" / "images.json")[3]
    assert by_results == label(monkeypatch, capsys, lively, tmp_path / "b.json")[3]


def test_nothing_is_overwritten_silently(lively, tmp_path, monkeypatch, capsys):
    out = tmp_path / "found.json"
    out.write_text("[]")
    code, _, error, _ = label(monkeypatch, capsys, lively, out)
    assert code == 2 and out.read_text() == "[]" and len(error) == 1
    assert "exists: give another --out, or --overwrite to replace it" in error[0]
    assert label(monkeypatch, capsys, lively, out, "--overwrite")[0] == 0
    before = out.read_bytes()
    code, _, error, _ = label(monkeypatch, capsys, lively, out, "--overwrite", "--results", out, "--annotations", out)
    assert code == 2 and "is also read" in error[0] and out.read_bytes() == before


def test_images_that_cannot_be_read_are_told(lively, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(lively[0] / "in", tmp_path / "in")
    (folder / "000000.jpg").write_bytes(b"nothing")
    code, _, error, found = label(monkeypatch, capsys, lively, tmp_path / "found.json", "--input", folder)
    assert code == 1 and "1 of 4 images could not be read and were left out" in error[-1]
    assert [image["file_name"] for image in found["images"]] == ["000002.jpg", "deep/000001.jpg", "deep/000003.jpg"]
    assert np.isin([a["image_id"] for a in found["annotations"]], [image["id"] for image in found["images"]]).all()


@pytest.mark.parametrize("content, part", [
    ("{", "is not valid JSON"), ("{}", "is not in COCO's format of results"), ("[1]", "entry 0 has no image_id, cat"),
    ([{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 1}], "entry 0 has no category_id"),
    ([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": "1"}], "has the score '1', not a number"),
    ([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3], "score": 1}], "has bbox [1, 2, 3], not four finite"),
    ([{"image_id": 1, "category_id": 1, "bbox": [1, 2, -3, 4], "score": 1}], "negative width or height"),
    ([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": score} for score in (0.1, 0.2)]
     + [{"image_id": 99, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}],
     "results.json: 1 problem: entry 2 has the unknown image_id 99; correct the file"),
    ([{"image_id": [], "category_id": {}, "bbox": [1, 2, 3, 4], "score": 1}], "has the unknown image_id []")])
def test_wrong_results(lively, tmp_path, monkeypatch, capsys, content, part):
    (tmp_path / "results.json").write_text(content if isinstance(content, str) else json.dumps(content))
    out = tmp_path / "found.json"
    code, _, error, _ = label(monkeypatch, capsys, lively, out, "--results", tmp_path / "results.json", "--annotations",
                              lively[0] / "annotations" / "val.json")
    assert code == 2 and len(error) == 1 and part in error[0] and not out.exists()


@pytest.mark.parametrize("arguments, part", [
    (["--checkpoint", "x", "--results", "y"], "give either --checkpoint or --results"),
    ([], "give either --checkpoint or --results"), (["--checkpoint", "x"], "--checkpoint needs --input"),
    (["--results", "x"], "--results needs --annotations"),
    (["--results", "x", "--annotations", "y"], "x does not exist, or is not a file"),
    (["--results", "x", "--annotations", "y", "--input", "z"], "--results takes no --input: remove it"),
    (["--results", "x", "--annotations", "y", "data.workers=0"], "--results takes no overrides: remove it"),
    (["--checkpoint", "x", "--input", "z", "--annotations", "y"], "--checkpoint takes no --annotations"),
    (["--checkpoint", "none", "--input", "{in}"], "no such checkpoint file: none"),
    (["--checkpoint", "x", "--input", "none"], "input none is not a folder"),
    (["--checkpoint", "x", "--input", "{in}", "--score-thr", "0.5", "0.6"], "--score-thr has 2 numbers for all"),
    (["--checkpoint", "{model}", "--cfg", "{cfg}", "--input", "{in}", "--score-thr", "dics=0.5"],
     '--score-thr dics=0.5: there is no class "dics"; did you mean "disc"?'),
    (["--checkpoint", "{model}", "--cfg", "{cfg}", "--input", "{in}", "--score-thr", "disc=0.5", "disc=0.6"],
     "--score-thr: disc has more than one score: give one"),
    (["--checkpoint", "x", "--input", "{in}", "--score-thr", "=0.5"], "is not of the form NAME=NUMBER"),
    (["--checkpoint", "x", "--input", "{in}", "--score-thr", "cat=2"], "--score-thr: must be from 0 to 1, not 2.0"),
    (["--checkpoint", "x", "--input", "{mixed}"], "holds 1 video (film.mp4), and only images can be labelled")])
def test_wrong_arguments(lively, tmp_path, monkeypatch, capsys, arguments, part):
    root, path, checkpoint, _ = lively
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "film.mp4").write_bytes(b"")
    places = {"in": root / "in", "model": checkpoint, "cfg": path, "mixed": tmp_path / "mixed"}
    arguments = [str(each).format(**places) for each in arguments]
    assert run_script(monkeypatch, "label.py", "--out", tmp_path / "found.json", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and part in error[0] and not (tmp_path / "found.json").exists()
