"""Bad data in train.py: one clear line and exit code 2, or a counted skip, but never a silent error."""
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_images import pixels, write_png16, write_rotated
from PIL import Image
from runs import ROOT, config, run_script, write_config

from data import generate_scenes
from data.images import read_image


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp("sound"), train=4, val=2, size=(64, 64))


@pytest.fixture
def scenes(sound, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(sound, tmp_path / "scenes")


def change(scenes, edit, split="train"):
    file = scenes / "annotations" / f"{split}.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def train(monkeypatch, capsys, scenes, *overrides):
    """Exit code, the lines of stderr, and the log of one epoch."""
    path = write_config(scenes / "cfg.yaml", config(scenes, epochs=1))
    code = run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", scenes / "run", "--device", "cpu",
                      *overrides)
    log = scenes / "run" / "train.log"
    return code, capsys.readouterr().err.strip().splitlines(), log.read_text("utf-8") if log.exists() else ""


def assert_refused(outcome, *parts):
    code, error, _ = outcome
    assert code == 2 and len(error) == 1 and error[0].startswith("error: "), error
    for part in parts:
        assert part in error[0]


@pytest.mark.parametrize("edit, part", [
    (lambda c: c["annotations"][0].update(bbox=[1, float("nan"), 5, 5]), "bbox [1, nan, 5, 5], not four finite"),
    (lambda c: c["annotations"][0].update(bbox=[-3, 1, -5, 5]), "bbox [-3, 1, -5, 5] with negative width or height"),
    (lambda c: c["annotations"][0].update(category_id=77), "has the unknown category_id 77"),
    (lambda c: c["annotations"][0].update(image_id=77), "has the unknown image_id 77"),
    (lambda c: c["images"][1].update(id=c["images"][0]["id"]), "images id 1 occurs 2 times"),
    (lambda c: c["annotations"][1].update(id=c["annotations"][0]["id"]), "annotations id 1 occurs 2 times"),
    (lambda c: c["categories"][1].update(id=c["categories"][0]["id"]), "categories id 1 occurs 2 times"),
    (lambda c: c["images"].clear(), "has no images: its list is empty"),
    (lambda c: c["categories"].clear(), "has no categories: its list is empty"),
], ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("split", ["train", "val"])
def test_wrong_annotations_stop_before_anything_is_written(scenes, monkeypatch, capsys, edit, part, split):
    change(scenes, edit, split)
    assert_refused(train(monkeypatch, capsys, scenes), str(scenes / "annotations" / f"{split}.json"), part)
    assert not (scenes / "run").exists()


@pytest.mark.parametrize("override, expected", [
    ("train.accumulate=0", "train.accumulate: must be at least 1, not 0"),
    ("train.log_every=0", "train.log_every: must be at least 1, not 0"),
    ("train.ema=1.5", "train.ema: must be from 0 to 1, not 1.5"),
    ("data.batch_size=0", "data.batch_size: must be at least 1, not 0"),
    ("data.workers=-1", "data.workers: must be from 0 to 1000, not -1"),
])
def test_numbers_that_make_no_sense_stop_before_anything_is_written(scenes, monkeypatch, capsys, override, expected):
    assert_refused(train(monkeypatch, capsys, scenes, override), expected)
    assert not (scenes / "run").exists()


def test_all_wrong_annotations_are_told_at_once(scenes, monkeypatch, capsys):
    def spoil(content):
        box = content["annotations"][0]
        content["annotations"] = [box | {"id": i, "bbox": [5, 5, -1, 5]} for i in range(8)]
        content["annotations"] += [box | {"id": 10 + i, "category_id": 70 + i} for i in range(8)]

    change(scenes, spoil)
    assert_refused(train(monkeypatch, capsys, scenes), "has 16 problems", "annotation 0 has", "annotation 7 has",
                   "annotation 10 has", "annotation 11 has", "and 6 more")


@pytest.mark.parametrize("spoil", [
    lambda c: c["annotations"].clear(), lambda c: [a.update(iscrowd=1) for a in c["annotations"]],
    lambda c: [a.update(bbox=[500, 500, 9, 9]) for a in c["annotations"]]], ids=["none", "crowds", "outside"])
def test_data_without_a_box_to_learn(scenes, monkeypatch, capsys, spoil):
    change(scenes, spoil)
    assert_refused(train(monkeypatch, capsys, scenes), "train.json has no box to learn: add boxes")
    assert not (scenes / "run").exists()


def test_a_file_that_was_cut_off(scenes, monkeypatch, capsys):
    file = scenes / "annotations" / "train.json"
    file.write_bytes(file.read_bytes()[:-100])
    assert_refused(train(monkeypatch, capsys, scenes), "train.json is not valid JSON", "write or download it again")


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


BROKEN = {"truncated": (cut, "truncated"), "empty": (lambda path: path.write_bytes(b""), "it is empty"),
          "missing": (lambda path: path.unlink(), "does not exist")}


@pytest.mark.parametrize("spoil, part", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_the_run(scenes, monkeypatch, capsys, spoil, part, workers):
    path = sorted((scenes / "train").iterdir())[1]
    spoil(path)
    assert_refused(train(monkeypatch, capsys, scenes, f"data.workers={workers}"), str(path), part,
                   "or set data.skip_unreadable=true to train without it")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_skipped_and_counted_where_asked(scenes, monkeypatch, capsys, workers):
    paths = sorted((scenes / "train").iterdir())[:3]
    for path, (spoil, _) in zip(paths, BROKEN.values(), strict=True):
        spoil(path)
    code, error, log = train(monkeypatch, capsys, scenes, "data.skip_unreadable=true", f"data.workers={workers}",
                             "train.epochs=2")
    assert code == 0 and not error
    for path, (_, part) in zip(paths, BROKEN.values(), strict=True):
        (line,) = [line for line in log.splitlines() if str(path) in line]  # named once, not in every epoch
        assert "skipped: " in line and part in line
    assert "epoch 1: 3 images could not be read so far" in log and "epoch 2: 3 images could not be read so far" in log
    steps = [line for line in (scenes / "run" / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(steps) == 2  # an epoch is as long as it would be


def test_evaluation_does_without_no_image(scenes, monkeypatch, capsys):
    path = sorted((scenes / "val").iterdir())[0]
    cut(path)
    code, error, log = train(monkeypatch, capsys, scenes, "data.skip_unreadable=true")
    assert_refused((code, error, log), str(path), "replace the file")
    assert "skip_unreadable" not in error[0]
    assert_refused((run_script(monkeypatch, "eval.py", "--cfg", scenes / "cfg.yaml", "--checkpoint",
                               scenes / "run" / "last.pth", "data.skip_unreadable=true"),
                    capsys.readouterr().err.strip().splitlines(), ""), str(path))


def test_an_image_of_another_size_than_annotated(scenes, monkeypatch, capsys):
    path = sorted((scenes / "train").iterdir())[0]
    write_rotated(path, pixels(64, 80), 6)
    change(scenes, lambda c: c["images"][0].update(height=64, width=80))  # of the pixels as they are stored
    assert_refused(train(monkeypatch, capsys, scenes, "data.skip_unreadable=true"), str(path),
                   "is 64 x 80 pixels (EXIF orientation applied) but 80 x 64 in", "correct the annotations'")


def odd_data(folder):
    """A split with all unusual images and boxes that can be trained on, and with names beyond ASCII."""
    images, classes = folder / "Bilder 画像", ["Zelle", "細胞", "🔬 клетка"]
    images.mkdir(parents=True)
    entries, boxes = [], []

    def add(name, size, *rows):
        entries.append({"id": len(entries), "file_name": name, "height": size[0], "width": size[1]})
        for row in rows:
            boxes.append({"id": len(boxes), "image_id": entries[-1]["id"], "category_id": len(boxes) % 3, "bbox": row})

    some = [4, 4, 20, 12]
    plain = Image.fromarray(pixels(40, 60))
    for name, image in [("alpha.png", plain.convert("RGBA")), ("grey.png", plain.convert("L")),
                        ("cmyk.jpg", plain.convert("CMYK")), ("grün 緑.jpg", plain)]:
        image.save(images / name)
        add(name, (40, 60), some)
    write_png16(images / "grey16.png", np.asarray(plain)[..., 0].astype(np.uint16) * 257)
    write_png16(images / "rgb16.png", np.asarray(plain).astype(np.uint16) * 257)
    write_rotated(images / "turned.jpg", pixels(40, 60), 6)
    add("grey16.png", (40, 60), some)
    add("rgb16.png", (40, 60), some)
    add("turned.jpg", (60, 40), [4, 4, 12, 40])  # upright
    for name, (h, w) in [("dot.png", (1, 1)), ("wide.jpg", (20, 20000)), ("high.png", (20000, 20))]:
        Image.new("RGB", (w, h), (90, 40, 10)).save(images / name)
        add(name, (h, w), [0, 0, w, h])
    plain.save(images / "empty.jpg")
    add("empty.jpg", (40, 60))
    plain.save(images / "beyond.jpg")
    add("beyond.jpg", (40, 60), [-30, -20, 500, 300], [70, 4, 9, 9], [4, 50, 9, 9], [4, 4, 0, 9], [59.9, 4, 5, 9])
    plain.save(images / "crowded.jpg")
    corners = np.random.default_rng(0).uniform(0, 30, (10_000, 2)).round(2).tolist()
    add("crowded.jpg", (40, 60), *([x, y, 8, 8] for x, y in corners))
    (folder / "注釈.json").write_text(json.dumps({
        "images": entries, "annotations": boxes, "categories": [{"id": i, "name": n} for i, n in enumerate(classes)]}))
    return {"images": str(images), "annotations": str(folder / "注釈.json")}, classes


@pytest.mark.parametrize("head", ["GFLHead", "RetinaHead", "ATSSHead", "FCOSHead"])
def test_odd_data_trains(sound, tmp_path, monkeypatch, capsys, head):
    split, classes = odd_data(tmp_path)
    cfg = config(sound, epochs=1, head=head)
    cfg["data"] |= {"train": split, "val": split}
    path = write_config(tmp_path / "Einstellung ü.yaml", cfg)
    out = tmp_path / "Läufe"
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", out, "--device", "cpu") == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [value for line in lines for name, value in line.items() if "loss" in name]
    assert len(lines) == 5 and losses and np.isfinite(losses).all()  # 13 images by four, and the evaluation
    assert list(lines[-1]["per_class"]) == classes
    log = (out / "train.log").read_text("utf-8")
    assert "13 training images, 3 classes" in log and "marked as ignored): 3" in log and "細胞" in log


def test_class_names_that_the_terminal_cannot_show(tmp_path, sound, monkeypatch):
    split, _ = odd_data(tmp_path)
    cfg = config(sound, epochs=1)
    cfg["data"] |= {"train": split, "val": split}
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert run_script(monkeypatch, "check_data.py", "--cfg", write_config(tmp_path / "cfg.yaml", cfg)) == 0
    printed = sys.stdout.buffer.getvalue().decode("ascii")
    assert r"\u7d30\u80de" in printed and "Zelle" in printed
    assert "10012 boxes" in printed and "1 image is turned by its EXIF orientation" in printed


def check_data(monkeypatch, capsys, scenes, *arguments):
    path = write_config(scenes / "cfg.yaml", config(scenes))
    code = run_script(monkeypatch, "check_data.py", "--cfg", path, *arguments, "data.workers=0")
    return code, *capsys.readouterr()


def test_check_data_says_what_is_there(scenes, monkeypatch, capsys):
    code, out, error = check_data(monkeypatch, capsys, scenes)
    assert code == 0 and error == ""
    assert "4 images, 0 of them without boxes" in out and out.count("no problems") == 2 and "triangle" in out


def test_check_data_draws_training_images(scenes, monkeypatch, capsys):
    """As annotated, and as they are fed in two epochs: the last two differ, and all have their boxes."""
    code, out, error = check_data(monkeypatch, capsys, scenes, "--pictures", scenes / "seen", "--count", 3,
                                  "data.train_augment=light", "data.flip=0")
    files = sorted((scenes / "seen").iterdir())
    assert code == 0 and error == "" and len(files) == 3 and out.splitlines()[-3:] == list(map(str, files))
    picture = read_image(files[0])
    assert picture.shape[0] == 3 and picture.shape[2] > 3 * 15 * 64  # three images, enlarged for the names
    again = scenes / "again"
    check_data(monkeypatch, capsys, scenes, "--pictures", again, "--count", 1, "data.flip=0")
    plain = read_image(next(again.iterdir()))[:, 24:]
    views = [plain[:, :, 4 + i * 964:960 + i * 964] for i in range(2)]
    assert torch.equal(*views)  # without augmentation, images are fed as they are


def test_pictures_of_images_with_boxes_only(scenes, monkeypatch, capsys):
    change(scenes, lambda c: c.update(annotations=[
        a for a in c["annotations"] if a["image_id"] == c["images"][3]["id"]]))
    assert check_data(monkeypatch, capsys, scenes, "--pictures", scenes / "seen", "data.skip_empty=true",
                      "data.train.first=1")[0] == 0
    (file,) = (scenes / "seen").iterdir()
    last = json.loads((scenes / "annotations" / "train.json").read_text())["images"][3]["file_name"]
    assert file.stem == f"1_{Path(last).stem}"


def test_pictures_mark_crowds_as_ignored(scenes, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr("kd.inference.draw.draw_boxes", lambda image, boxes, labels, classes, zoom: drawn.append(
        [classes[label] for label in labels]) or image)
    change(scenes, lambda c: [a.update(iscrowd=1) for a in c["annotations"][::2]])
    file = json.loads((scenes / "annotations" / "train.json").read_text())
    first = [a for a in file["annotations"] if a["image_id"] == file["images"][0]["id"]]
    assert check_data(monkeypatch, capsys, scenes, "--pictures", scenes / "seen", "--count", 1)[0] == 0
    names = {category["id"]: category["name"] for category in file["categories"]}
    assert [sorted(each) for each in drawn] == 3 * [sorted(
        "ignored" if a["iscrowd"] else names[a["category_id"]] for a in first)] and "ignored" in drawn[0]


HIDING = "data.train_augment=[{type: RandomAffine, p: 1.0, scale: [0.001, 0.002]}]"


def test_an_augmentation_that_leaves_no_boxes_is_a_warning(scenes, monkeypatch, capsys):
    warning = "WARNING: data.train_augment leaves no box in 4 of 4 images that have boxes: make it milder; "
    code, out, error = check_data(monkeypatch, capsys, scenes, HIDING)
    assert code == 0 and error.startswith(warning) and error.count("\n") == 1
    command = ["train.py", "--cfg", scenes / "cfg.yaml", "--device", "cpu", HIDING, "data.workers=0"]
    assert run_script(monkeypatch, *command, "--check") == 0
    assert capsys.readouterr().out.splitlines().count(warning + "scripts/check_data.py --pictures DIR shows what it "
                                                      "does") == 1
    assert run_script(monkeypatch, *command, "--work-dir", scenes / "run", "train.epochs=14", "eval.every=0") == 0
    log = (scenes / "run" / "train.log").read_text()
    assert log.count("WARNING: data.train_augment leaves no box in 50 of 50 images") == 1


def test_check_data_lists_all_that_is_wrong(scenes, monkeypatch, capsys):
    train, val = sorted((scenes / "train").iterdir()), sorted((scenes / "val").iterdir())
    for path, (spoil, _) in zip([*train[:2], val[0]], BROKEN.values(), strict=True):
        spoil(path)
    change(scenes, lambda c: [a.update(bbox=[1, 1, -1, 1]) for a in c["annotations"]])
    count = len(json.loads((scenes / "annotations" / "train.json").read_text())["annotations"])
    code, out, error = check_data(monkeypatch, capsys, scenes)
    assert code == 2 and error == f"error: {count + 3} problems in the data: correct them, see above\n"
    assert f"boxes: {count} problems" in out and out.count("with negative width or height") == count
    assert "images that cannot be read: 2 problems" in out and "images that cannot be read: 1 problem\n" in out
    assert all(str(path) in out for path in (*train[:2], val[0]))


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_work_dir_that_cannot_be_written(scenes, monkeypatch, capsys, place):
    (scenes / "file").write_text("mine")
    path = write_config(scenes / "cfg.yaml", config(scenes, epochs=1))
    code = run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", scenes / place, "--device", "cpu")
    assert_refused((code, capsys.readouterr().err.strip().splitlines(), ""),
                   f"work dir {scenes / place} cannot be written", "give another --work-dir")
    assert (scenes / "file").read_text() == "mine"


def test_two_runs_in_one_work_dir(scenes, monkeypatch, capsys):
    path = write_config(scenes / "cfg.yaml", config(scenes, epochs=1000) | {"eval": {"every": 0}})
    command = [sys.executable, ROOT / "scripts/train.py", "--cfg", path, "--work-dir", scenes / "run"]
    process = subprocess.Popen([*command, "--device", "cpu", "data.workers=1"], stdout=subprocess.PIPE, text=True)
    try:
        while "epoch 2 " not in process.stdout.readline():
            assert process.poll() is None
        before = (scenes / "run" / "run.json").read_bytes()
        again = "--work-dir", scenes / "run", "--device", "cpu", "train.epochs=1"
        assert_refused((run_script(monkeypatch, "train.py", "--cfg", path, *again, "--resume-from",
                                   scenes / "run" / "last.pth"), capsys.readouterr().err.strip().splitlines(), ""),
                       f"another run is at work in {scenes / 'run'}")
        assert (scenes / "run" / "run.json").read_bytes() == before and process.poll() is None
    finally:
        process.kill()
        process.wait()
    # a killed run leaves no lock, although its worker lives on for some seconds
    assert run_script(monkeypatch, "train.py", "--cfg", path, *again, "--resume") == 0
