"""export.py: files that other runtimes run as PyTorch does, and the example that runs them."""
import importlib.util
import json
import os
import sys

import numpy as np
import pytest
import torch
from odd_images import write_rotated
from PIL import Image
from runs import ROOT, config, run_script, write_checkpoint, write_config
from small_models import HEADS

import kd.inference.export
from data import generate_scenes
from data.images import read_image
from data.sources.scenes import CLASSES
from data.transforms import resize_image, resized_size
from kd.config import parse_config
from kd.evaluation.evaluate import detect, eval_loader
from kd.inference.detectors import load_with_data
from models.preprocess import Preprocess

SCALE = [160, 120]  # that of the scenes: how a resize rounds depends on the processor


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """A function from a head to its configuration and checkpoint, over three scenes."""
    root = generate_scenes(tmp_path_factory.mktemp("lively"), train=1, val=3, size=(120, 160))

    def make(head):
        cfg = config(root, head=head)
        cfg["model"]["test"] = {"score_thr": 0.6, "max_per_img": 50}
        cfg["data"]["scale"] = SCALE
        if head == "RetinaHead":
            del cfg["model"]["head"]["norm_cfg"]
        return write_config(root / f"{head}.yaml", cfg), write_checkpoint(root / f"{head}.pth", cfg), cfg
    return make


def export(monkeypatch, capsys, lively, out, *arguments, head="GFLHead"):
    """Exit code, what was printed, and the lines of stderr."""
    path, checkpoint, _ = lively(head)
    code = run_script(monkeypatch, "export.py", "--cfg", path, "--checkpoint", checkpoint, "--out", out, *arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err.strip().splitlines()


def example():
    """docs/run_onnx.py as a module."""
    spec = importlib.util.spec_from_file_location("run_onnx", ROOT / "docs" / "run_onnx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(lively, head):
    """Evaluation's detections by image id: boxes, scores and labels, best first."""
    _, checkpoint, cfg = lively(head)
    cfg = parse_config(cfg)
    detector, dataset = load_with_data(cfg, checkpoint, torch.device("cpu"))
    found = {}
    for image_id, rows in detect(detector, eval_loader(cfg, dataset), torch.device("cpu")):
        found[image_id] = [([x, y, x + w, y + h], score, int(label)) for x, y, w, h, score, label in rows]
    return dataset, found


@pytest.mark.parametrize("head, nms", [*((head, "inside") for head in HEADS), ("GFLHead", "outside"),
                                       ("FCOSHead", "outside")])
def test_the_example_detects_in_an_onnx_file_what_evaluation_does(lively, tmp_path, monkeypatch, capsys, head, nms):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    out = tmp_path / "deep" / "model.onnx"
    code, printed, _ = export(monkeypatch, capsys, lively, out, "--nms", nms, head=head)
    assert code == 0 and f"wrote {out}" in printed and "2 images: boxes differ" in printed
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]
    run_onnx, session = example(), onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["densekd"])
    assert about["classes"] == CLASSES and about["nms"] == nms and about["scale"] == SCALE
    dataset, expected = results(lively, head)
    for image_id, name in zip(dataset.image_ids, dataset.file_names):
        boxes, scores, labels = run_onnx.detect(session, about, run_onnx.read(dataset.image_folder / name))
        mine = expected[image_id]
        assert len(mine) == len(scores) > 5
        np.testing.assert_allclose(scores, [score for _, score, _ in mine], atol=1e-3)
        np.testing.assert_allclose(boxes, [box for box, _, _ in mine], atol=0.05)
        assert labels.tolist() == [label for _, _, label in mine]


def test_torch_export(lively, tmp_path, monkeypatch, capsys):
    out = tmp_path / "model.pt2"
    anchors = "{type: AnchorGenerator, ratios: [1.0], octave_base_scale: 8, scales_per_octave: 1, strides: [8, 16, 32]}"
    code, printed, _ = export(monkeypatch, capsys, lively, out, "model.neck.num_outs=3",  # fewer levels take less time
                              f"model.head.anchor_generator={anchors}")
    assert code == 0 and "2 images: boxes differ from PyTorch's by at most 0 pixels" in printed
    files = {"densekd.json": ""}
    module = torch.export.load(str(out), extra_files=files).module()
    about = json.loads(files["densekd.json"])
    assert about["least_size"] == 64 and about["classes"] == CLASSES
    for n, h, w in ((1, 64, 96), (3, 160, 64)):
        boxes, scores, _ = module(torch.zeros(n, 3, h, w, dtype=torch.uint8), torch.tensor([[h, w]] * n))
        assert boxes.shape == (n, 50, 4) and (scores > 0).any()
    assert not module(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[0, 0]]))[1].any()


def test_what_disagrees_is_not_left_behind(lively, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    load = kd.inference.export.load_exported

    def shifted(path, kind):
        run = load(path, kind)
        return lambda *inputs: [run(*inputs)[0] + 0.01, *run(*inputs)[1:]]

    monkeypatch.setattr(kd.inference.export, "load_exported", shifted)
    code, _, error = export(monkeypatch, capsys, lively, tmp_path / "a.onnx")
    assert code == 1 and len(error) == 1 and "does not agree with PyTorch" in error[0] and "0.01 pixels" in error[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, fault, sentence", [
    ("onnx", lambda image: torch.fft.fft2(image).real,
     "Exporting the operator 'aten::fft_fft2' to ONNX opset version 18 is not supported"),
    ("pt2", lambda image: image if image.sum() > 0 else -image,
     "Could not guard on data-dependent expression Eq(u0, 1) (unhinted: Eq(u0, 1))"),
    ("pt2", lambda image: {}["layer"], "KeyError 'layer'")], ids=["onnx", "pt2", "pt2 one word"])
def test_what_an_exporter_says_becomes_one_line(lively, tmp_path, monkeypatch, capfd, kind, fault, sentence):
    """Its dump of thousands of lines goes to a file, and so does what compiled code prints."""
    normalise = Preprocess.normalise

    def talkative(self, images):
        print("said in Python", file=sys.stderr)
        os.write(2, b"said in C++")
        return fault(normalise(self, images))

    monkeypatch.setattr(Preprocess, "normalise", talkative)
    code, printed, error = export(monkeypatch, capfd, lively, tmp_path / f"a.{kind}")
    log, other = tmp_path / f"a.{kind}.log", "pt2" if kind == "onnx" else "onnx"
    assert code == 1 and len(printed.splitlines()) == 1 and error == [  # printed: which weights were loaded
        f"error: this detector cannot be exported as {kind}: {sentence}. Try --format {other}, or change the layer; "
        f"{log} has the whole report"]
    said = log.read_text()
    assert all(part in said for part in ("Traceback", "said in Python", "said in C++")) and len(said.splitlines()) > 40
    assert list(tmp_path.iterdir()) == [log]


def test_checks_on_given_images_and_without_data(lively, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    Image.new("RGB", (50, 90), "red").save(tmp_path / "a.png")
    code, printed, _ = export(monkeypatch, capsys, lively, tmp_path / "a.onnx", "--check", tmp_path / "a.png")
    assert code == 0 and "on 1 image:" in printed
    code, printed, _ = export(monkeypatch, capsys, lively, tmp_path / "a.onnx", "data.val=null")
    assert code == 0 and "on 2 images" in printed  # noise
    code, printed, _ = export(monkeypatch, capsys, lively, tmp_path / "a.onnx", "model.test.score_thr=0.9999")
    assert code == 0 and "0 detections on 2 images" in printed and "without detections this says little" in printed
    code, _, error = export(monkeypatch, capsys, lively, tmp_path / "b.onnx", "--check", tmp_path / "nowhere.png")
    assert code == 2 and len(error) == 1 and not (tmp_path / "b.onnx").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_packages_one_line_says_what_to_install(lively, tmp_path, monkeypatch, capsys, package):
    if package == "onnxruntime":
        pytest.importorskip("onnx", reason="onnx is not installed")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    code, _, error = export(monkeypatch, capsys, lively, tmp_path / "a.onnx")
    assert code == 2 and len(error) == 1 and f"pip install 'densekd[export]', or pip install {package}" in error[0]
    assert not list(tmp_path.iterdir())


def test_the_example_resizes_as_the_data_do(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    run_onnx = example()
    pixels = np.random.default_rng(0).integers(0, 256, (37, 61, 3), dtype=np.uint8)
    write_rotated(tmp_path / "a.png", pixels, 6)
    mine, image = run_onnx.read(tmp_path / "a.png"), read_image(tmp_path / "a.png")
    assert mine.shape == (61, 37, 3) and np.array_equal(mine, image.permute(1, 2, 0).numpy())
    for scale in ((100, 80), (40, 30), (61, 37), (7, 7)):
        for antialias in (False, True):
            expected = resize_image(image, resized_size((61, 37), scale), antialias).permute(1, 2, 0).numpy()
            small = run_onnx.resize(mine, {"scale": scale, "antialias": antialias})
            assert small.shape == expected.shape and abs(small.astype(int) - expected).max() <= 1


def test_the_example_as_a_program(lively, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    assert export(monkeypatch, capsys, lively, tmp_path / "m.onnx")[0] == 0
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    monkeypatch.setattr("sys.argv", ["run_onnx.py", str(tmp_path / "m.onnx"), str(tmp_path / "a.jpg"), "--out",
                                     str(tmp_path / "found")])
    example().main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{tmp_path / 'a.jpg'}: ") and any(printed[1].startswith(f"  {c} 0.") for c in CLASSES)
    assert Image.open(tmp_path / "found" / "a.png").size == (120, 90)
