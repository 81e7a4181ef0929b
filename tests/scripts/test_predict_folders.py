"""predict.py over many images: formats, results as they come, workers, and what is refused."""
import json

import pytest
from odd_images import pixels
from PIL import Image
from processes import context
from runs import assert_they_end, config, peak_memory, run_script, write_checkpoint, write_config

from data import generate_scenes
from data.inputs.files import ImageFiles, portions
from data.sources.formats import read_labelled
from kd.inference import predict as module


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """Eleven images of two sizes, a configuration, and a checkpoint that finds something everywhere."""
    root = generate_scenes(tmp_path_factory.mktemp("lively"), train=1, val=11, size=(64, 96))
    for path in sorted((root / "val").iterdir())[1::3]:
        Image.open(path).resize((64, 160)).save(path, quality=95)
    cfg = config(root)
    cfg["model"]["test"] = {"score_thr": 0.5, "max_per_img": 30}
    cfg["data"] |= {"scale": [96, 64], "batch_size": 2}
    return root / "val", write_config(root / "cfg.yaml", cfg), write_checkpoint(root / "model.pth", cfg)


def predict(monkeypatch, lively, out, *arguments):
    images, path, checkpoint = lively
    if "--input" not in arguments:
        arguments = ("--input", images, *arguments)
    return run_script(monkeypatch, "predict.py", "--cfg", path, "--checkpoint", checkpoint, "--out", out, "--device",
                      "cpu", *arguments)


def content(out):
    return [json.loads((out / name).read_text()) for name in ("images.json", "predictions.json")]


def test_results_are_the_same_with_workers_and_without_pictures(lively, tmp_path, monkeypatch, capsys):
    assert predict(monkeypatch, lively, tmp_path / "a") == 0
    assert predict(monkeypatch, lively, tmp_path / "b", "--no-pictures", "data.workers=1") == 0
    text = [line for line in capsys.readouterr().out.splitlines() if " on 11 images; " in line]
    assert " has pictures, predictions.json and images.json" in text[0]
    assert " has predictions.json and images.json" in text[1]
    images, results = content(tmp_path / "a")
    assert [images, results] == content(tmp_path / "b")
    assert [image["id"] for image in images["images"]] == list(range(1, 12))
    assert [r["image_id"] for r in results] == sorted(r["image_id"] for r in results)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["images.json", "predictions.json"]
    assert len(list((tmp_path / "a").glob("*.jpg"))) == 11


@pytest.mark.parametrize("kind", ["yolo", "voc", "csv"])
def test_other_formats_hold_the_same_boxes(kind, lively, tmp_path, monkeypatch):
    assert predict(monkeypatch, lively, tmp_path / "coco", "--no-pictures") == 0
    assert predict(monkeypatch, lively, tmp_path / kind, "--no-pictures", "--format", kind) == 0
    images, results = content(tmp_path / "coco")
    read = {image.file_name: image for image in read_labelled(kind, tmp_path / kind, images=lively[0]).images}
    names = {category["id"]: category["name"] for category in images["categories"]}
    assert len(results) > 50
    for image in images["images"]:
        own = [result for result in results if result["image_id"] == image["id"]]
        w, h = (image["width"], image["height"]) if kind == "yolo" else (1, 1)
        boxes = read[image["file_name"]].boxes
        assert [box.name for box in boxes] == [names[result["category_id"]] for result in own]
        for box, (x, y, width, height) in zip(boxes, (result["bbox"] for result in own)):
            assert (box.x1 * w, box.y1 * h) == pytest.approx((x, y), abs=0.011)
            least = 1 if kind == "voc" else 0
            assert ((box.x2 - box.x1) * w, (box.y2 - box.y1) * h) == pytest.approx(
                (max(width, least), max(height, least)), abs=0.011)


def test_a_stopped_run_leaves_what_is_done(lively, tmp_path, monkeypatch, capsys):
    predictor, calls = module.Predictor.__call__, []

    def stopping(self, samples):
        calls.append(len(samples))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return predictor(self, samples)

    monkeypatch.setattr(module.Predictor, "__call__", stopping)
    assert predict(monkeypatch, lively, tmp_path) == 130
    assert capsys.readouterr().err.strip() == "interrupted"
    images, results = content(tmp_path)
    done = sum(calls[:5])
    assert len(images["images"]) == done == len(list(tmp_path.glob("*.jpg"))) and done >= 8
    assert {r["image_id"] for r in results} <= {image["id"] for image in images["images"]}
    for picture in tmp_path.glob("*.jpg"):
        Image.open(picture).load()


def test_few_images_are_held_at_a_time(lively, tmp_path, monkeypatch):
    """Not even if all have different sizes, and so no batch becomes full."""
    (tmp_path / "in").mkdir()
    for k in range(12):
        Image.fromarray(pixels(40 + 32 * k, 60)).save(tmp_path / "in" / f"{k:02d}.png")
    read, done = [], []
    item, call = ImageFiles.__getitem__, module.Predictor.__call__
    monkeypatch.setattr(ImageFiles, "__getitem__", lambda self, index: read.append(index) or item(self, index))

    def counting(self, samples):
        done.extend(samples)
        assert len(read) - len(done) <= module.BATCHES * 2
        return call(self, samples)

    monkeypatch.setattr(module.Predictor, "__call__", counting)
    assert predict(monkeypatch, lively, tmp_path / "out", "data.scale=[800, 96]", "--no-pictures", "--input",
                   tmp_path / "in") == 0
    assert len(done) == 12 and all(sample.image is None for sample in done)


def test_portions():
    items = iter(range(7))
    assert [list(portion) for portion in portions(items, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(portions([], 3)) == []


def test_a_picture_that_cannot_be_written_ends_the_run(lively, tmp_path, monkeypatch, capsys):
    (tmp_path / "000003.jpg").mkdir(parents=True)
    assert predict(monkeypatch, lively, tmp_path) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "000003.jpg cannot be written (Is a directory)" in error[0]


@pytest.mark.parametrize("kind, name", [("yolo", "labels/a.txt"), ("voc", "Annotations/a.xml")])
def test_two_images_with_one_file_are_refused(kind, name, lively, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for ending in ("jpg", "png"):
        Image.fromarray(pixels(40, 60)).save(tmp_path / "in" / f"a.{ending}")
    assert predict(monkeypatch, lively, tmp_path / "out", "--format", kind, "--input", tmp_path / "in") == 2
    error = capsys.readouterr().err
    assert f"a.jpg and a.png would both have the file {tmp_path / 'out' / name}" in error
    assert not (tmp_path / "out").exists()


def test_a_video_in_other_formats(lively, tmp_path, monkeypatch):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for k in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels(64, 96, k), format="rgb24")))
        container.mux(stream.encode())
    out = tmp_path / "out"
    assert predict(monkeypatch, lively, out, "--format", "yolo", "--no-pictures", "--input", tmp_path / "clip.mp4") == 0
    assert sorted(path.name for path in out.rglob("*.*")) == ["000000.txt", "000001.txt", "000002.txt", "classes.txt",
                                                              "clip.mp4"]
    assert (out / "labels" / "clip.mp4").is_dir()


def test_memory_on_a_large_image(lively, tmp_path):
    """Some copies of the pixels, and not hundreds of bytes for each."""
    pytest.importorskip("resource", reason="Windows has no resource module")
    side = 3000
    Image.new("RGB", (side, side), "grey").save(tmp_path / "large.bmp")
    arguments = ("eval.tta.tiles={size: [800, 800]}", "--cfg", lively[1], "--checkpoint", lively[2], "--device", "cpu",
                 "--out", tmp_path / "out", "--input", tmp_path / "large.bmp")
    process = context.Process(target=peak_memory, args=(tmp_path / "log", tmp_path / "peak", "predict.py", *arguments))
    process.start()
    assert_they_end([process], 0, tmp_path / "log")
    assert (tmp_path / "out" / "large.bmp.png").stat().st_size
    assert 3 * side ** 2 < int((tmp_path / "peak").read_text()) < 12 * 3 * side ** 2
