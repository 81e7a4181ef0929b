"""eval.py and predict.py with --exported: a file detects what its checkpoint does, and bad files are one line."""
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_rules
import pytest
import torch
from exports import CPU, FIXED, FORMS, OPENVINO, tiny_detector, tiny_export
from runs import ROOT, config_with, run_script, write_config

from data.images import write_picture
from data.sources.scenes import CLASSES
from kd.config import parse_config
from kd.deploy.exported import open_with_data
from kd.deploy.recipe import read_recipe
from kd.deploy.runtimes import open_exported
from kd.evaluation.evaluate import detect_views
from kd.exceptions import ExportedFileError
from kd.inference.detectors import load_with_data

pytestmark = onnx_rules.needed
BCCD = ROOT.parent / "shared" / "data" / "bccd"
openvino = pytest.param("openvino.xml", marks=pytest.mark.skipif(
    not OPENVINO, reason="needs the extra openvino"))
NAMES = [openvino if name == "openvino.xml" else name for name in FORMS]


def assert_same(mine, theirs):
    """Detections of two evaluations, image by image; where scores are nearly equal the order may differ."""
    assert [image_id for image_id, _ in mine] == [image_id for image_id, _ in theirs]
    for (_, a), (_, b) in zip(mine, theirs):
        a, b = (rows[np.lexsort((rows[:, 0].round(), rows[:, 5], rows[:, 4].round(3)))] for rows in (a, b))
        assert a.shape == b.shape
        np.testing.assert_allclose(a[:, :5], b[:, :5], atol=0.02)
        assert (a[:, 5] == b[:, 5]).all()


def evaluated(monkeypatch, capsys, cfg, out, *arguments):
    """The figures and the table of eval.py."""
    capsys.readouterr()  # an export may have printed something
    assert run_script(monkeypatch, "eval.py", "--cfg", cfg, "--out", out, *arguments) == 0
    return json.loads(out.read_text()), capsys.readouterr().out.splitlines()[:-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_has_the_figures_of_its_checkpoint(exports, name, tmp_path, monkeypatch, capsys):
    file, (cfg, checkpoint, _) = exports.file(name), exports.model(FORMS[name].get("head", "GFLHead"))
    limit = [f"model.test.max_per_img={FORMS[name]['end2end']}"] if "end2end" in FORMS[name] else []
    mine, table = evaluated(monkeypatch, capsys, cfg, tmp_path / "a.json", "--checkpoint", checkpoint, "--device",
                            "cpu", *limit)
    theirs, own_table = evaluated(monkeypatch, capsys, cfg, tmp_path / "b.json", "--exported", file,
                                 *limit)
    assert mine["AP"] > 0.05 and list(mine["per_class"]) == CLASSES and mine.keys() == theirs.keys()
    assert all(theirs[key] == pytest.approx(mine[key], abs=1e-6) for key in mine if key != "per_class" and mine[key])
    assert own_table == table[1:]  # without the line about loaded weights


@pytest.mark.parametrize("name", NAMES)
def test_a_file_detects_what_its_checkpoint_does(exports, name):
    """Also mirrored; and in batches of two and one, where the file may take two at a time."""
    _, checkpoint, cfg = exports.model(FORMS[name].get("head", "GFLHead"))
    cfg["model"]["test"]["max_per_img"] = FORMS[name].get("end2end", 50)
    cfg = parse_config(config_with(cfg, data={"batch_size": 2}, eval={"tta": {"flip": True}}))
    found = [detect_views(detector, cfg, dataset, CPU) for detector, dataset in
             (load_with_data(cfg, checkpoint, CPU), open_with_data(cfg, exports.file(name)))]
    assert sum(len(rows) for _, rows in found[0]) > 20
    assert_same(*found)


@pytest.mark.skipif(not BCCD.is_dir(), reason="../shared/data/bccd is not here")
def test_on_photographs(tmp_path):
    """On BCCD's first images, with another recipe in the configuration: the file's is used."""
    detector = tiny_detector("GFLHead", strides=(16, 32), score_thr=0.55, nms_pre=100, max_per_img=30)
    sides = {"height": 192, "width": 256}
    _, about = tiny_export(tmp_path / "a.onnx", detector, size=(256, 192), fixed=sides)
    part = {"images": str(BCCD / "images"), "annotations": str(BCCD / "annotations" / "val.json"), "first": 4}
    cfg = parse_config({"model": {"backbone": {"type": "ResNet", "depth": 18}, "head": {"type": "GFLHead"}},
                        "data": {"train": part, "val": part, "batch_size": 3, "workers": 0, "scale": [100, 100]}})
    file, dataset = open_with_data(cfg, rename(tmp_path / "a.onnx", dataset_classes(part)))
    assert dataset.scale == (256, 192)
    found = [detect_views(one, cfg, dataset, CPU) for one in (detector, file)]
    assert sum(len(rows) for _, rows in found[0]) > 20
    assert_same(*found)


def dataset_classes(part):
    content = json.loads(Path(part["annotations"]).read_text())
    return [one["name"] for one in sorted(content["categories"], key=lambda one: one["id"])]


def rename(path, classes, **changes):
    """Change the classes, and other entries, in the metadata of an ONNX file."""
    import onnx

    model = onnx.load(path)
    about = json.loads(model.metadata_props[0].value) | {"classes": classes} | changes
    onnx.helper.set_model_props(model, {"densekd": json.dumps(about)})
    onnx.save(model, path)
    return path


def test_predict_needs_nothing_but_the_file(exports, tmp_path, monkeypatch, capsys):
    cfg, checkpoint, _ = exports.model()
    for name, which in (("a", ["--checkpoint", checkpoint, "--cfg", cfg, "--device", "cpu"]),
                        ("b", ["--exported", exports.file("any.onnx")])):
        assert run_script(monkeypatch, "predict.py", "--input", exports.scenes / "val", "--out", tmp_path / name,
                          *which) == 0
    mine, theirs = (json.loads((tmp_path / name / "predictions.json").read_text()) for name in "ab")
    assert len(mine) == len(theirs) > 5
    for a, b in zip(mine, theirs):
        assert a["image_id"] == b["image_id"] and a["category_id"] == b["category_id"]
        assert a["bbox"] == pytest.approx(b["bbox"], abs=0.02) and a["score"] == pytest.approx(b["score"], abs=1e-3)
    assert len(list((tmp_path / "b").glob("*.jpg"))) == 3


def refused(monkeypatch, capsys, *arguments, code=2):
    """The one line on stderr."""
    assert run_script(monkeypatch, "eval.py", *arguments) == code
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: "), error
    return error[0]


def test_a_file_holds_the_lowest_scores_of_its_classes(exports, tmp_path, monkeypatch, capsys):
    """Of one class only the best boxes, of another none; a given score wins."""
    cfg, checkpoint, _ = exports.model("GFLHead")
    found = {name: {"score": score} for name, score in zip(CLASSES, (0.9, None, *[0.0] * (len(CLASSES) - 2)))}
    (tmp_path / "chosen.json").write_text(json.dumps({"classes": found}))
    file, photo = tmp_path / "a.onnx", tmp_path / "photo.png"
    assert run_script(monkeypatch, "export.py", "--cfg", cfg, "--checkpoint", checkpoint, "--out", file, "--thresholds",
                      tmp_path / "chosen.json", "--fixed", "batch=1", *(f"{k}={v}" for k, v in FIXED.items())) == 0
    write_picture(photo, torch.randint(0, 256, (3, 120, 160), generator=torch.Generator().manual_seed(0)).byte())
    counts = {}
    for name, more in (("own", ()), ("given", ("--score-thr", "0"))):
        assert run_script(monkeypatch, "predict.py", "--exported", file, "--input", photo, "--out", tmp_path / name,
                          *more) == 0
        results = json.loads((tmp_path / name / "predictions.json").read_text())
        counts[name] = Counter(CLASSES[one["category_id"] - 1] for one in results)
        if name == "own":
            assert all(one["score"] >= 0.9 - 1e-5 for one in results if one["category_id"] == 1)
    assert counts["given"][CLASSES[1]] and not counts["own"][CLASSES[1]]
    assert counts["own"][CLASSES[2]] == counts["given"][CLASSES[2]] > 0
    assert f"{file} has no score for {CLASSES[1]}" in capsys.readouterr().err
    broken = json.dumps({**json.loads(open_exported(file).about.to_json()), "thresholds": [0.5]})
    with pytest.raises(ExportedFileError, match=f"thresholds: must have {len(CLASSES)} entries"):
        read_recipe(broken, file)


def test_arguments(exports, tmp_path, monkeypatch, capsys):
    cfg, checkpoint, _ = exports.model()
    file = ["--exported", exports.file("any.onnx")]
    for words, part in (([*file, "--checkpoint", checkpoint], "not allowed with argument"),
                        ([], "one of the arguments --checkpoint --exported is required"),
                        ([*file, "--part", "student"], "--part chooses from a checkpoint"),
                        (["--exported", tmp_path / "a.onnx"], f"no such exported file: {tmp_path / 'a.onnx'}"),
                        ([*file, "--device", "mps"], "--device mps: "), ([*file, "data=null"], "data: missing")):
        assert part in refused(monkeypatch, capsys, "--cfg", cfg, *words)
    assert "--exported needs --cfg, a configuration with data.val" in refused(monkeypatch, capsys, *file)
    code = run_script(monkeypatch, "predict.py", *file, "--input", exports.scenes, "--out", tmp_path, "eval.tta.flip=1")
    assert code == 2 and "in which eval.tta.flip=1 is set" in capsys.readouterr().err


def test_damaged_and_foreign_files(exports, tmp_path, monkeypatch, capsys):
    import onnx

    cfg, whole, archive = exports.model()[0], exports.file("any.onnx"), exports.file("any.pt2")
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", value[:1], value[1:])
    foreign = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    named = onnx.ModelProto.FromString(foreign.SerializeToString())
    about = {one.key: one.value for one in onnx.load(whole).metadata_props}["densekd"]
    onnx.helper.set_model_props(named, {"densekd": about})
    later = onnx.ModelProto.FromString(foreign.SerializeToString())
    onnx.helper.set_model_props(later, {"densekd": json.dumps(json.loads(about) | {"format": 9, "densekd": "9.1"})})
    torch.save({"model": {}}, tmp_path / "last.pth")
    contents = {"empty": (b"", "is empty"), "text": (b"a list of photographs\n" * 9, "cannot be read as ONNX"),
                "short": (whole.read_bytes()[:20000], "cannot be read as ONNX"),
                "end": (whole.read_bytes()[:-1], "cannot be read as ONNX"),
                "foreign": (foreign.SerializeToString(), "does not say how to use it: it lacks densekd's metadata"),
                "named": (named.SerializeToString(), "has no inputs image_sizes, images"),
                "later": (later.SerializeToString(), "was written by a later version of densekd (9.1)"),
                "cut.pt2": (archive.read_bytes()[:9000], "cannot be read as a torch.export file"),
                "checkpoint": ((tmp_path / "last.pth").read_bytes(), "is not a torch.export file"),
                "page": (b"<html>404</html>", "the weights of" if OPENVINO else "")}
    for name, (content, part) in contents.items():
        (tmp_path / name).write_bytes(content)
        line = refused(monkeypatch, capsys, "--cfg", cfg, "--exported", tmp_path / name)
        assert part in line and len(line) < 500, (name, line)


@pytest.mark.parametrize("name", ["fixed.onnx", openvino])
def test_weights_that_are_missing_or_cut(exports, name, tmp_path, monkeypatch, capsys):
    cfg, file = exports.model()[0], exports.file(name)
    beside = {"fixed.onnx": "fixed.onnx.data", "openvino.xml": "openvino.bin"}[name]
    shutil.copy(file, tmp_path / name)
    line = refused(monkeypatch, capsys, "--cfg", cfg, "--exported", tmp_path / name)
    assert f"{beside}, which is missing: keep both files in one folder" in line
    (tmp_path / beside).write_bytes((file.parent / beside).read_bytes()[:5000])
    line = refused(monkeypatch, capsys, "--cfg", cfg, "--exported", tmp_path / name)
    assert name in line and ("too short" in line or "cannot be read as an OpenVINO file" in line)


def test_metadata_that_cannot_be(tmp_path):
    from kd.exceptions import ExportedFileError

    good = {"classes": ["a"], "scale": [64, 64], "antialias": False, "divisor": 32, "least_size": 32, "nms": "inside",
            "nms_iou_threshold": 0.5, "max_per_img": 9}
    assert read_recipe(json.dumps(good), tmp_path).batch is None  # of an earlier version
    for change in ({"classes": []}, {"classes": "a"}, {"scale": [0, 64]}, {"nms": "never"}, {"max_per_img": -1},
                   {"nms_iou_threshold": 7}, {"height": 1.5}, {"unknown": 1}, {"std": [0, 1, 1]}, {"format": "x"}):
        with pytest.raises(ExportedFileError, match="the metadata of .* cannot be used, .*: write it with"):
            read_recipe(json.dumps(good | change), tmp_path)
    for text in ("[]", "{", "[" * 100000, "null"):
        with pytest.raises(ExportedFileError):
            read_recipe(text, tmp_path)


def test_classes_are_those_of_the_data(exports, tmp_path, monkeypatch, capsys):
    """In another order or with more of them they are found by their names; otherwise nothing is evaluated."""
    _, _, tree = exports.model()
    file = shutil.copy(exports.file("any.onnx"), tmp_path / "a.onnx")
    fewer = json.loads((exports.scenes / "annotations" / "val.json").read_text())
    fewer["categories"] = [one for one in fewer["categories"] if one["name"] in CLASSES[1:4]]
    ids = {one["id"] for one in fewer["categories"]}
    fewer["annotations"] = [one for one in fewer["annotations"] if one["category_id"] in ids]
    (tmp_path / "fewer.json").write_text(json.dumps(fewer))
    cfg = config_with(tree, data={"val": tree["data"]["val"] | {"annotations": str(tmp_path / "fewer.json")}})
    path = write_config(tmp_path / "fewer.yaml", cfg)
    detector, dataset = open_with_data(parse_config(cfg), file)
    found = detect_views(detector, parse_config(cfg), dataset, CPU)
    whole, data = open_with_data(parse_config(tree), file)
    expected = [(image_id, rows[(rows[:, 5] >= 1) & (rows[:, 5] < 4)] - [0, 0, 0, 0, 0, 1])
                for image_id, rows in detect_views(whole, parse_config(tree), data, CPU)]
    assert dataset.classes == CLASSES[1:4] and sum(len(rows) for _, rows in found) > 3
    assert_same(found, expected)
    rename(file, [*CLASSES[:5], "comet"])
    line = refused(monkeypatch, capsys, "--cfg", write_config(tmp_path / "c.yaml", tree), "--exported", file)
    assert f"{file} has 6 classes (disc," in line and "comet" in line and "the data 6 classes" in line
    rename(file, CLASSES[:3])  # says less than the file gives
    assert "eval.class_map: missing" in refused(monkeypatch, capsys, "--cfg", tmp_path / "c.yaml", "--exported", file)
    line = refused(monkeypatch, capsys, "--cfg", path, "--exported", file, "eval.class_map=[0,1]")
    assert "it needs one for each of the data's 3 classes" in line
    rename(file, CLASSES[1:4])
    line = refused(monkeypatch, capsys, "--cfg", path, "--exported", file)
    assert "gives no detections of its 3 classes: write it again" in line


def test_what_the_configuration_sets_otherwise_is_said(exports, reported):
    _, _, tree = exports.model()
    cfg = parse_config(config_with(tree, data={"scale": [64, 64]}, model={"test": {"score_thr": 0.1, "nms_pre": 5}}))
    _, dataset = open_with_data(cfg, exports.file("any.onnx"))
    assert dataset.scale == (160, 120)
    said = "data.scale is (160, 120) there, not (64, 64), model.test.score_thr is 0.4 there, not 0.1"
    assert f"keeps its own settings: {said}" in reported()
