"""predict.py: what it detects, draws and writes."""
import json
import shutil

import numpy as np
import pytest
import torch
from odd_images import pixels, write_rotated
from PIL import Image
from pycocotools.coco import COCO
from runs import ROOT, config, run_script, write_checkpoint, write_config

from data import DataError, generate_scenes
from data.inputs.files import batches_of_one_size, make_sample
from data.inputs.find import find_files
from data.sources.scenes import CLASSES
from kd.config import load_config, parse_config
from kd.evaluation.evaluate import detect_views
from kd.inference.detectors import load_with_data, selected_classes
from models.checkpoints.classes import checkpoint_classes
from models.checkpoints.formats import Checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """Scenes of two sizes in one data set, its configuration, and a checkpoint that finds something everywhere."""
    root = generate_scenes(tmp_path_factory.mktemp("lively"), train=1, val=5, size=(64, 96))
    file = root / "annotations" / "val.json"
    content = json.loads(file.read_text())
    for image in content["images"][1::2]:
        pixels = Image.open(root / "val" / image["file_name"]).resize((64, 160))
        pixels.save(root / "val" / image["file_name"], quality=95)
        image |= {"width": 64, "height": 160}
    for k, category in enumerate(content["categories"]):
        category["id"] = 10 * (k + 1)
    for annotation in content["annotations"]:
        annotation["category_id"] *= 10
    file.write_text(json.dumps(content))
    cfg = config(root)
    cfg["model"]["test"] = {"score_thr": 0.5, "max_per_img": 30}
    cfg["data"]["scale"] = [96, 64]
    return root, write_config(root / "cfg.yaml", cfg), write_checkpoint(root / "model.pth", cfg), cfg


def predict(monkeypatch, capsys, lively, out, *arguments):
    """Exit code, lines of stderr, the results, and the listed images."""
    root, path, checkpoint, _ = lively
    if "--input" not in arguments:
        arguments = ("--input", root / "val", *arguments)
    code = run_script(monkeypatch, "predict.py", "--cfg", path, "--checkpoint", checkpoint, "--out", out, "--device",
                      "cpu", *arguments)
    files = [json.loads((out / name).read_text()) if (out / name).exists() else None
             for name in ("predictions.json", "images.json")]
    return code, capsys.readouterr().err.strip().splitlines(), *files


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_predictions_are_those_of_evaluation(lively, tmp_path, monkeypatch, capsys, tta, batch_size):
    extra = ["eval.tta.flip=true", "eval.tta.scales=[[96, 64], [160, 96]]"] if tta else []
    code, _, results, listed = predict(monkeypatch, capsys, lively, tmp_path, "--score-thr", 0, "--batch-size",
                                       batch_size, *extra)
    assert code == 0 and [image["id"] for image in listed["images"]] == [1, 2, 3, 4, 5]
    cfg = lively[3] | {"eval": {"tta": {"flip": True, "scales": [[96, 64], [160, 96]]}}} if tta else lively[3]
    cfg = parse_config(cfg)
    detector, dataset = load_with_data(cfg, lively[2], CPU)
    expected = [{"image_id": image_id, "bbox": row[:4], "score": row[4], "label": int(row[5])}
                for image_id, rows in detect_views(detector, cfg, dataset, CPU) for row in rows]
    expected.sort(key=lambda result: result["image_id"])
    assert len(expected) > 30
    assert [(r["image_id"], r["category_id"]) for r in results] == [
        (r["image_id"], dataset.category_ids[r["label"]]) for r in expected]
    for key in ("bbox", "score"):
        np.testing.assert_allclose([r[key] for r in results], [r[key] for r in expected], rtol=1e-5, atol=1e-4)


def test_what_is_written_is_read_by_pycocotools(lively, tmp_path, monkeypatch, capsys):
    _, _, results, listed = predict(monkeypatch, capsys, lively, tmp_path)
    assert listed["images"][1] == {"id": 2, "file_name": "000001.jpg", "width": 64, "height": 160}
    assert listed["categories"][2] == {"id": 30, "name": "square"}
    found = COCO(tmp_path / "images.json").loadRes(str(tmp_path / "predictions.json"))
    assert len(found.anns) == len(results) > 20


def test_boxes_are_drawn_where_they_are(lively, tmp_path, monkeypatch, capsys):
    _, _, results, _ = predict(monkeypatch, capsys, lively, tmp_path, "--score-thr", 0.6)
    for number in range(5):
        name = f"{number:06d}.jpg"
        before, after = (np.asarray(Image.open(folder / name), dtype=int) for folder in (lively[0] / "val", tmp_path))
        assert before.shape == after.shape
        boxes = [r["bbox"] for r in results if r["image_id"] == number + 1]
        changed = (abs(before - after).max(-1) > 60).sum()
        assert changed > 20 if boxes else changed == 0
        for x, y, w, h in boxes:  # of some class's colour along the lower edge
            edge = abs(before - after).max(-1)[int(y + h) - 1, int(x):int(x + w)]
            assert np.median(edge) > 15 or w < 4
    assert results and all(r["score"] >= 0.6 for r in results)


def test_thresholds_of_classes(lively, tmp_path, monkeypatch, capsys):
    everything = predict(monkeypatch, capsys, lively, tmp_path / "a", "--score-thr", 0)[2]
    middle = sorted(r["score"] for r in everything if r["category_id"] == 20)
    middle = middle[len(middle) // 2]
    some = predict(monkeypatch, capsys, lively, tmp_path / "b", "--score-thr", 0.999, "--class-thr", "disc=0",
                   f"ring={middle}")[2]
    assert some == [r for r in everything if r["category_id"] == 10 or (r["category_id"] == 20
                                                                        and r["score"] >= middle)]
    for text, part in (("dics=0.5", 'there is no class "dics"; did you mean "disc"?'),
                       ("disc", '--class-thr: "disc" is not of the form NAME=NUMBER'),
                       ("disc=2", "--class-thr: must be from 0 to 1, not 2.0")):
        code, error, *_ = predict(monkeypatch, capsys, lively, tmp_path / "c", "--class-thr", text)
        assert code == 2 and len(error) == 1 and part in error[0]


def thresholds_file(path, **scores):
    """A file as analyze.py writes it."""
    path.write_text(json.dumps({"classes": {name: {"score": score} for name, score in scores.items()}}))
    return path


def test_thresholds_from_a_file(lively, tmp_path, monkeypatch, capsys):
    """What is left are the boxes that analyze.py counts, class by class; a class without a score has none."""
    root, cfg, checkpoint, _ = lively
    assert run_script(monkeypatch, "analyze.py", "--cfg", cfg, "--checkpoint", checkpoint, "--out", tmp_path,
                      "--device", "cpu") == 0
    path = tmp_path / "thresholds.json"
    chosen = json.loads(path.read_text())["classes"]
    assert list(chosen) == CLASSES and {each["score"] is None for each in chosen.values()} == {True, False}
    code, error, results, _ = predict(monkeypatch, capsys, lively, tmp_path / "found", "--thresholds", path)
    assert code == 0
    for k, each in enumerate(chosen.values()):
        own = [result["score"] for result in results if result["category_id"] == 10 * (k + 1)]
        assert len(own) == each["boxes"] and (not own or min(own) == pytest.approx(each["score"], abs=1e-6))
    without = [name for name, each in chosen.items() if each["score"] is None]
    assert f"{path} has no score for {', '.join(without)}: all their boxes are left out" in error[-1]
    both = predict(monkeypatch, capsys, lively, tmp_path / "more", "--thresholds", path, "--class-thr",
                   f"{without[0]}=0")[2]
    assert len(both) > len(results) and {r["category_id"] for r in both} > {r["category_id"] for r in results}


def test_bad_files_of_thresholds(lively, tmp_path, monkeypatch, capsys):
    right = thresholds_file(tmp_path / "right.json", **dict.fromkeys(CLASSES, 0.5))
    other = thresholds_file(tmp_path / "other.json", disc=0.5, ball=0.5)
    (tmp_path / "cut.json").write_text(right.read_text()[:-20])
    cases = [(["--thresholds", right, "--score-thr", 0.3], "give only one of them"),
             (["--thresholds", other], f"{other} is for 2 classes (disc, ball), and the detector has 6 classes "),
             (["--thresholds", tmp_path / "cut.json"], "cut.json cannot be read"),
             (["--thresholds", tmp_path / "none.json"], "none.json cannot be read (No such file")]
    for arguments, part in cases:
        code, error, *_ = predict(monkeypatch, capsys, lively, tmp_path / "out", *arguments)
        assert code == 2 and part in error[-1] and sum(line.startswith("error") for line in error) == 1
        assert not (tmp_path / "out").exists()


def test_unreadable_images_are_told_and_the_rest_goes_on(lively, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(lively[0] / "val", tmp_path / "in")
    (folder / "000000.jpg").write_bytes((folder / "000000.jpg").read_bytes()[:-300])
    (folder / "old.bmp").write_bytes(b"BM nothing")
    code, error, results, listed = predict(monkeypatch, capsys, lively, tmp_path / "out", "--input", folder)
    assert code == 1 and len(error) == 3
    assert error[0].startswith(f"left out: image {folder / '000000.jpg'} cannot be read (")
    assert error[1].startswith(f"left out: image {folder / 'old.bmp'} cannot be read (")
    assert error[2] == "error: 2 of 6 files could not be read and were left out, see above"
    assert [(image["id"], image["file_name"]) for image in listed["images"]] == [
        (number, f"{number - 1:06d}.jpg") for number in (2, 3, 4, 5)]
    assert {r["image_id"] for r in results} == {2, 3, 4, 5} and not (tmp_path / "out" / "000000.jpg").exists()


def test_images_are_turned_upright_and_kept_in_their_folders(lively, tmp_path, monkeypatch, capsys):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    write_rotated(tmp_path / "in" / "deep" / "ö 1.jpg", pixels(64, 96), 6)
    Image.fromarray(pixels(64, 96)).save(tmp_path / "in" / "b.webp")
    code, _, _, listed = predict(monkeypatch, capsys, lively, tmp_path / "out", "--input", tmp_path / "in")
    assert code == 0
    assert [(i["file_name"], i["width"], i["height"]) for i in listed["images"]] == [("b.webp", 96, 64),
                                                                                   ("deep/ö 1.jpg", 64, 96)]
    assert Image.open(tmp_path / "out" / "deep" / "ö 1.jpg").size == (64, 96)
    assert Image.open(tmp_path / "out" / "b.webp.png").format == "PNG"


def test_an_input_is_never_overwritten(lively, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(lively[0] / "val", tmp_path / "in")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, error, *_ = predict(monkeypatch, capsys, lively, folder, "--input", folder)
    assert code == 2 and len(error) == 1 and "would be overwritten: give another --out" in error[0]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_names_of_classes_come_from_the_one_who_knows(lively, tmp_path, monkeypatch, capsys):
    names = list("abcdef")
    listed = predict(monkeypatch, capsys, lively, tmp_path, "--classes", *names)[3]
    assert listed["categories"] == [{"id": k + 1, "name": name} for k, name in enumerate(names)]
    code, error, *_ = predict(monkeypatch, capsys, lively, tmp_path, "--classes", "a", "b", "--device", "cpu")
    assert code == 2 and "--classes gives 2 classes (a, b), and " in error[-1] and "has 6 classes" in error[-1]
    state = torch.load(lively[2], weights_only=True)
    del state["classes"]
    torch.save(state, tmp_path / "nameless.pth")
    nameless = ("--checkpoint", tmp_path / "nameless.pth")
    listed = predict(monkeypatch, capsys, lively, tmp_path, *nameless)[3]  # data.val's
    assert [c["name"] for c in listed["categories"]] == CLASSES and listed["categories"][0]["id"] == 10
    code, error, *_ = predict(monkeypatch, capsys, lively, tmp_path, *nameless, "data.val=null")
    assert code == 2 and len(error) == 1 and "give --classes" in error[0]
    # A class map selects data.val's classes from more.
    listed = predict(monkeypatch, capsys, lively, tmp_path, "eval.class_map=[5, 4, 3, 2, 1, 0]",
                     "model.head.num_classes=6")[3]
    assert [c["name"] for c in listed["categories"]] == CLASSES


def test_category_ids_are_those_of_the_same_names(lively, tmp_path, monkeypatch, capsys):
    """Where the checkpoint has the classes of data.val in another order, or not all of them."""
    assert predict(monkeypatch, capsys, lively, tmp_path, "--classes", *CLASSES[::-1])[3]["categories"] == [
        {"id": 60 - 10 * k, "name": name} for k, name in enumerate(CLASSES[::-1])]


def test_coco_names_of_published_checkpoints():
    """torchvision's 91 outputs with the map of its configuration, and detectron2's 80."""
    cfg = load_config(ROOT / "configs/torchvision/retinanet_r50.yaml")
    names = selected_classes(Checkpoint("torchvision", {}), 91, cfg.eval.class_map)
    assert names == selected_classes(Checkpoint("detectron2", {}), 80, None) and len(names) == 80
    assert (names[0], names[11], names[79]) == ("person", "stop sign", "toothbrush")
    assert selected_classes(Checkpoint("torchvision", {}), 91, None) is None  # some outputs have no class
    assert selected_classes(Checkpoint("detectron2", {}), 80, [80]) is None
    assert selected_classes(Checkpoint("state-dict", {}), 80, None) is None
    own = Checkpoint("densekd", {}, {"classes": ["a", "b", "c"]})
    assert selected_classes(own, 3, [2, 0]) == ["c", "a"] and selected_classes(own, None, [0]) is None


@pytest.mark.parametrize("spoil, part", [
    (lambda c: c.append("x"), "categories[6] is not an object"), (lambda c: c[0].pop("id"), "categories[0] has no id"),
    (lambda c: c[0].update(id={}), "categories id {} is not an id"),
    (lambda c: c[0].update(name="a\nb"), "wrong name 'a\\nb'")])
def test_wrong_categories_are_refused_where_only_they_are_read(lively, tmp_path, monkeypatch, capsys, spoil, part):
    state = torch.load(lively[2], weights_only=True)
    del state["classes"]
    torch.save(state, tmp_path / "nameless.pth")
    content = json.loads((lively[0] / "annotations" / "val.json").read_text())
    spoil(content["categories"])
    (tmp_path / "val.json").write_text(json.dumps(content))
    code, error, *_ = predict(monkeypatch, capsys, lively, tmp_path, "--checkpoint", tmp_path / "nameless.pth",
                              f"data.val.annotations={tmp_path / 'val.json'}")
    assert code == 2 and len(error) == 1 and "val.json has 1 problem: " in error[0] and part in error[0]


def test_names_in_checkpoints_of_others():
    assert checkpoint_classes({"dataset_meta": {"classes": ("a", "b")}}) == ["a", "b"]
    assert checkpoint_classes({"CLASSES": ("a", "b")}) == ["a", "b"]
    assert checkpoint_classes({"classes": 3, "dataset_meta": None, "CLASSES": [1]}) is None


def test_a_video(lively, tmp_path, monkeypatch, capsys):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    (tmp_path / "in").mkdir()
    write_video(av, tmp_path / "in" / "clip.mp4", [pixels(64, 96, seed) for seed in range(5)])
    Image.fromarray(pixels(64, 96)).save(tmp_path / "in" / "z.png")
    (tmp_path / "in" / "no.avi").write_bytes(b"no video")
    code, error, results, listed = predict(monkeypatch, capsys, lively, tmp_path / "out", "--input", tmp_path / "in",
                                           "--batch-size", 2)
    assert code == 1 and len(error) == 2 and "no.avi cannot be read (" in error[0]
    assert [(i["id"], i["file_name"], i.get("frame")) for i in listed["images"]] == [
        (1, "z.png", None)] + [(k + 2, "clip.mp4", k) for k in range(5)]
    assert {r["image_id"] for r in results} == set(range(1, 7))
    with av.open(str(tmp_path / "out" / "clip.mp4")) as written:
        stream = written.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (96, 64, 10)
        assert len(list(written.decode(stream))) == 5


def write_video(av, path, frames):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_frames_are_turned_upright(tmp_path):
    """As a telephone that is held upright writes them: lying, with a matrix in the track's header."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    from data.inputs.video import Video
    path = tmp_path / "a.mp4"
    write_video(av, path, [pixels(64, 96)])
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    unit, zero, minus, last = (value.to_bytes(4, "big", signed=True) for value in (1 << 16, 0, -1 << 16, 1 << 30))
    assert content[place:place + 36] == unit + zero * 3 + unit + zero * 3 + last
    content[place:place + 36] = zero + unit + zero + minus + zero * 4 + last  # a quarter turn clockwise
    path.write_bytes(content)
    (frame,) = Video(path)
    expected = np.rot90(pixels(64, 96), -1)
    assert frame.shape == (3, 96, 64) and abs(frame.permute(1, 2, 0).numpy().astype(int) - expected).max() < 20


def test_without_pyav_one_line_says_what_to_install(lively, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"")
    code, error, *_ = predict(monkeypatch, capsys, lively, tmp_path / "out", "--input", tmp_path / "clip.mp4")
    assert code == 2 and len(error) == 1 and "pip install 'densekd[video]'" in error[0]
    assert not (tmp_path / "out").exists()


def test_inputs(tmp_path):
    for name in ("a/1.jpg", "a/b/2.PNG", "a/b/3.txt", "c/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [s.name for s in find_files([tmp_path / "a"])] == ["1.jpg", "b/2.PNG"]
    assert [s.name for s in find_files([f"{tmp_path}/**/*.jpg"])] == ["a/1.jpg", "c/1.jpg"]
    assert [s.name for s in find_files([tmp_path / "a" / "b" / "3.txt"])] == ["3.txt"]  # whatever is asked for by name
    with pytest.raises(DataError, match="are both called 1.jpg"):
        find_files([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(DataError, match="does not exist, and as a glob it matches no file"):
        find_files([tmp_path / "nowhere.jpg"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image or video"):
        find_files([tmp_path / "empty"])


def test_batches_hold_images_of_one_padded_size():
    sizes = [(60, 90), (90, 60), (64, 96), (90, 64), (32, 96), (64, 65), (60, 91)]
    samples = [make_sample(torch.zeros(3, *size, dtype=torch.uint8), i, [(96, 64)]) for i, size in enumerate(sizes)]
    batches = [[sample.targets[0]["image_id"] for sample in batch] for batch in batches_of_one_size(samples, 3)]
    assert batches == [[0, 2, 5], [1, 3], [4], [6]]
