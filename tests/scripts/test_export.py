"""export.py: files that other runtimes run as PyTorch does, and the example that runs them."""
import json
import os
import re
import sys
import zipfile

import numpy as np
import onnx_rules
import pytest
import torch
from exports import CPU, FORMS, SCALE, example, few_levels
from odd_images import write_rotated
from PIL import Image
from runs import ROOT, run_script

from data.images import read_image
from data.sources.scenes import CLASSES
from data.transforms import resize_image, resized_size
from kd.config import parse_config
from kd.deploy.agreement import Agreement
from kd.deploy.export import check_samples
from kd.evaluation.evaluate import detect, eval_loader
from kd.inference.detectors import load_with_data
from models.preprocess import Preprocess

pytestmark = onnx_rules.needed


def export(monkeypatch, capsys, exports, out, *arguments, head="GFLHead"):
    """Exit code, what was printed, and the lines of stderr."""
    path, checkpoint, _ = exports.model(head)
    code = run_script(monkeypatch, "export.py", "--cfg", path, "--checkpoint", checkpoint, "--out", out, *arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err.strip().splitlines()


@pytest.mark.parametrize("name", [name for name in FORMS if name.endswith(".onnx")])
def test_the_example_detects_in_an_onnx_file_what_evaluation_does(exports, name):
    import onnxruntime

    file = exports.file(name)
    run_onnx, session = example(), onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["densekd"])
    assert about["classes"] == CLASSES and about["scale"] == SCALE and about["score_thr"] == 0.4
    assert about["channel_order"] == "rgb" and about["mean"] == [123.675, 116.28, 103.53] and about["densekd"]
    _, checkpoint, cfg = exports.model(FORMS[name].get("head", "GFLHead"))
    if about["nms"] == "end2end":
        cfg["model"]["test"]["max_per_img"] = 20
    cfg = parse_config(cfg)
    detector, dataset = load_with_data(cfg, checkpoint, CPU)
    expected = dict(detect(detector, eval_loader(cfg, dataset), CPU))
    for image_id, image in zip(dataset.image_ids, dataset.file_names):
        boxes, scores, labels = run_onnx.detect(session, about, run_onnx.read(dataset.image_folder / image))
        mine = expected[image_id]
        mine[:, 2:4] += mine[:, :2]
        assert len(mine) == len(scores) > 3
        np.testing.assert_allclose(scores, mine[:, 4], atol=1e-3)
        np.testing.assert_allclose(boxes, mine[:, :4], atol=0.05)
        assert labels.tolist() == mine[:, 5].tolist()


def test_sizes_vary(exports):
    """Also those of a single row or column, for which torch.export has no example; and the names say which vary."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(exports.file("any.onnx")), providers=["CPUExecutionProvider"])
    assert [one.shape for one in session.get_inputs()] == [["batch", 3, "height", "width"], ["batch", 2]]
    for n, h, w in ((1, 32, 32), (3, 64, 32)):
        images = np.random.default_rng(0).integers(0, 256, (n, 3, h, w), np.uint8)
        boxes, scores, labels = session.run(None, {"images": images, "image_sizes": np.array([[h, w]] * n)})
        assert boxes.shape == (n, 50, 4) and scores.shape == labels.shape == (n, 50) and (scores > 0).any()


def test_end2end_says_how_many_there_are(exports):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(exports.file("end2end.onnx")),
                                           providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_outputs()] == ["num_dets", "boxes", "scores", "labels"]
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 128, 160), np.uint8)
    count, boxes, scores, labels = session.run(None, {"images": images, "image_sizes": np.array([[120, 160], [2, 2]])})
    assert count.shape == (2, 1) and count.dtype == np.int32 and boxes.shape == (2, 20, 4)
    assert 0 < count[0, 0] <= 20 and count[1, 0] < 20
    for k, one, score, label in zip(count[:, 0], boxes, scores, labels):
        assert (score[:k] > 0).all() and (label[:k] >= 0).all()
        assert not score[k:].any() and not one[k:].any() and (label[k:] == -1).all()


def test_torch_export(exports, tmp_path):
    path = exports.file("any.pt2")
    with zipfile.ZipFile(path) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    assert str(ROOT).encode() not in content
    files = {"densekd.json": ""}
    module = torch.export.load(str(path), extra_files=files).module()
    about = json.loads(files["densekd.json"])
    assert about["least_size"] == 64 and about["classes"] == CLASSES
    for n, h, w in ((1, 64, 96), (3, 160, 64)):
        boxes, scores, _ = module(torch.zeros(n, 3, h, w, dtype=torch.uint8), torch.tensor([[h, w]] * n))
        assert boxes.shape == (n, 50, 4) and (scores > 0).any()
    assert not module(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[0, 0]]))[1].any()


def test_the_command(exports, tmp_path, monkeypatch, capsys):
    """All options at once, in a folder that is not there yet."""
    Image.new("RGB", (50, 90), "red").save(tmp_path / "a.png")
    out = tmp_path / "deep" / "model.onnx"
    code, printed, _ = export(monkeypatch, capsys, exports, out, "--check", tmp_path / "a.png", "--end2end", "7",
                              "--fixed", "batch=1", "height=96", "width=64", "--weights", "beside", "--opset", "20")
    assert code == 0 and re.search(r"wrote \S*model.onnx, 0.. MiB and \S*model.onnx.data, 0.. MiB. Checked: ", printed)
    assert "on 1 image:" in printed and sorted(os.listdir(out.parent)) == ["model.onnx", "model.onnx.data"]
    code, _, error = export(monkeypatch, capsys, exports, out, "--end2end", "7", "--nms", "outside")
    assert code == 2 and len(error) == 1 and "remove one" in error[0]
    code, _, error = export(monkeypatch, capsys, exports, tmp_path / "b.onnx", "--check", tmp_path / "nowhere.png")
    assert code == 2 and len(error) == 1 and not (tmp_path / "b.onnx").exists()


@pytest.mark.parametrize("kind, fault, sentence", [
    ("onnx", lambda image: image + image.kthvalue(2, dim=3, keepdim=True).values,
     "No ONNX function found for <OpOverload(op='aten.kthvalue', overload='default')>"),
    ("pt2", lambda image: image if image.sum() > 0 else -image,
     "Could not guard on data-dependent expression Eq(u0, 1) (unhinted: Eq(u0, 1))"),
    ("pt2", lambda image: {}["layer"], "KeyError 'layer'")], ids=["onnx", "pt2", "pt2 one word"])
def test_what_an_exporter_says_becomes_one_line(exports, tmp_path, monkeypatch, capfd, kind, fault, sentence):
    """Its dump of thousands of lines goes to a file, and so does what compiled code prints."""
    normalise = Preprocess.normalise

    def talkative(self, images):
        print("said in Python", file=sys.stderr)
        os.write(2, b"said in C++")
        return fault(normalise(self, images))

    monkeypatch.setattr(Preprocess, "normalise", talkative)
    code, printed, error = export(monkeypatch, capfd, exports, tmp_path / f"a.{kind}", "--fixed", "height=64",
                                  "width=64", "batch=1")
    log, other = tmp_path / f"a.{kind}.log", "pt2" if kind == "onnx" else "onnx"
    assert code == 1 and len(printed.splitlines()) == 1 and len(error) == 1  # printed: which weights were loaded
    assert error[0].startswith(f"error: this detector cannot be exported as {kind}: {sentence}"), error
    assert error[0].endswith(f". Try --format {other}, or change the layer; {log} has the whole report")
    said = log.read_text()
    assert all(part in said for part in ("Traceback", "said in Python", "said in C++")) and len(said.splitlines()) > 40
    assert list(tmp_path.iterdir()) == [log]


def test_what_is_checked(exports, tmp_path):
    """Given images, those of data.val, or noise."""
    cfg = parse_config(exports.model()[2])
    about = type("About", (), {"scale": (160, 120), "antialias": False, "within": (96, 160)})
    assert [sample.targets[0]["image_size"] for sample in check_samples(cfg, about, [])] == [(96, 128)] * 2
    Image.new("RGB", (50, 90), "red").save(tmp_path / "a.png")
    assert [sample.image.shape for sample in check_samples(cfg, about, [tmp_path / "a.png"])] == [(3, 90, 50)]
    without = parse_config(exports.model()[2] | {"data": None})
    assert [sample.image.shape for sample in check_samples(without, about, [])] == [(3, 120, 160), (3, 160, 120)]
    assert "without detections this says little" in str(Agreement(images=2))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_without_the_packages_one_line_says_what_to_install(exports, tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    code, printed, error = export(monkeypatch, capsys, exports, tmp_path / "a.onnx")
    assert code == 2 and len(error) == 1 and f"pip install 'densekd[export]', or pip install {package}" in error[0]
    assert not list(tmp_path.iterdir()) and not printed  # nothing was loaded


@pytest.mark.parametrize("within", [(None, None), (32, None), (30, 50)])
def test_the_example_resizes_as_the_data_do(tmp_path, within):
    run_onnx = example()
    pixels = np.random.default_rng(0).integers(0, 256, (37, 61, 3), dtype=np.uint8)
    write_rotated(tmp_path / "a.png", pixels, 6)
    mine, image = run_onnx.read(tmp_path / "a.png"), read_image(tmp_path / "a.png")
    assert mine.shape == (61, 37, 3) and np.array_equal(mine, image.permute(1, 2, 0).numpy())
    for scale in ((100, 80), (40, 30), (61, 37), (7, 7)):
        for antialias in (False, True):
            size = resized_size((61, 37), scale, within)
            expected = resize_image(image, size, antialias).permute(1, 2, 0).numpy()
            small = run_onnx.resize(mine, {"scale": scale, "antialias": antialias, "height": within[0],
                                           "width": within[1]})
            assert small.shape == expected.shape and abs(small.astype(int) - expected).max() <= 1


def test_the_example_as_a_program(exports, tmp_path, monkeypatch, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    file, photo = str(exports.file("any.onnx")), str(tmp_path / "a.jpg")
    monkeypatch.setattr("sys.argv", ["run_onnx.py", file, photo, "--out", str(tmp_path / "found")])
    example().main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{photo}: ") and any(printed[1].startswith(f"  {c} 0.") for c in CLASSES)
    assert Image.open(tmp_path / "found" / "a.png").size == (120, 90)
    (tmp_path / "b.onnx").write_bytes(b"no model")
    monkeypatch.setattr("sys.argv", ["run_onnx.py", str(tmp_path / "b.onnx"), photo])
    with pytest.raises(SystemExit) as end:
        example().main()
    error = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(error) == 1 and "b.onnx cannot be read" in error[0]


def test_fewer_levels_are_those_of_the_detector():
    """The helper gives as many strides as its neck has outputs."""
    for head in ("GFLHead", "FCOSHead"):
        neck, section = few_levels(head)
        assert neck["num_outs"] == len(section.get("strides") or section["anchor_generator"]["strides"]) == 2
