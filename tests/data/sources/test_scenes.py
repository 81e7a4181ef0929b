import hashlib
import json

import numpy as np
from runs import run_script

from data import CocoDataset, generate_scenes
from data.sources.scenes import CLASSES, _tight_box, render_scene
from data.sources.shapes import SHAPES


def digests(root):
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in root.rglob("*.*")}


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    first = digests(generate_scenes(tmp_path / "a", train=4, val=3, seed=1))
    assert len(first) == 4 + 3 + 2
    assert digests(generate_scenes(tmp_path / "b", train=4, val=3, seed=1)) == first
    assert len(set(first.values())) == len(first)  # splits and images differ
    some = generate_scenes(tmp_path / "some", train=4, val=3, seed=1, classes=["ring", "star"])
    content, whole = (json.loads((root / "annotations" / "train.json").read_text()) for root in (some, tmp_path / "a"))
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert list(names.values()) == ["ring", "star"] and content["images"] == whole["images"]
    boxes = [(a["image_id"], a["category_id"], a["bbox"]) for a in whole["annotations"] if a["category_id"] in names]
    assert [(a["image_id"], a["category_id"], a["bbox"]) for a in content["annotations"]] == boxes != []
    assert (some / "train" / "000000.jpg").read_bytes() == (tmp_path / "a" / "train" / "000000.jpg").read_bytes()
    other = digests(generate_scenes(tmp_path / "c", train=4, val=3, seed=2))
    assert not set(other.values()) & set(first.values())
    longer = digests(generate_scenes(tmp_path / "d", train=6, val=3, seed=1))
    images = {name: digest for name, digest in first.items() if name.endswith(".jpg")}
    assert images.items() <= longer.items()


def test_the_data_set_is_valid_and_varied(tmp_path):
    root = generate_scenes(tmp_path / "scenes", train=60, val=2, size=(120, 200))
    dataset = CocoDataset(root / "train", root / "annotations" / "train.json", training=False, scale=(200, 120))
    assert len(dataset) == 60 and dataset.classes == CLASSES and dataset.num_dropped_boxes == 0
    image, target = dataset[0]
    assert image.shape == (3, 120, 200) and target["image_size"] == (120, 200)
    boxes, labels = np.concatenate(dataset.boxes), np.concatenate(dataset.labels)
    assert (boxes >= 0).all() and (boxes <= [200, 120, 200, 120]).all()
    assert (np.bincount(labels, minlength=len(CLASSES)) > len(labels) / 15).all()
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    small, large = (areas < 32**2).mean(), (areas >= 96**2).mean()
    assert 0.25 < small < 0.6 and 0.03 < large < 0.3


def test_a_tight_box_holds_all_of_a_mask_and_no_more():
    mask = np.zeros((20, 30), dtype=bool)
    mask[4, 7] = mask[11, 9] = True
    assert _tight_box(mask) == (7, 4, 10, 12)


def test_boxes_lie_around_what_was_painted(monkeypatch):
    """On a uniform background, all boxes together cover the part of the picture that differs from it."""
    monkeypatch.setattr("data.sources.scenes._background", lambda rng, size: np.full((3, *size), 0.5, dtype=np.float32))
    monkeypatch.setattr("data.sources.scenes._add_clutter", lambda *args, **kwargs: None)
    checked = 0
    for seed in range(40):
        image, boxes, _ = render_scene(_Noiseless(np.random.default_rng(seed)), (160, 160))
        changed = (image.astype(int) != image[:, :1, :1]).any(axis=0)
        if changed[-1, -1]:
            continue  # an object covers the corner whose colour is used as the background
        rows, columns = changed.any(axis=1).nonzero()[0], changed.any(axis=0).nonzero()[0]
        painted = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        outset = (np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)]) - painted) * [1, 1, -1, -1]
        # The soft edge is slightly larger than the box, most at the tips of a star.
        assert (outset >= 0).all() and (outset <= 3).all()
        checked += 1
    assert checked > 20


class _Noiseless:
    """A random generator whose normal noise is zero."""

    def __init__(self, rng):
        self.rng = rng

    def __getattr__(self, name):
        return getattr(self.rng, name)

    def standard_normal(self, shape, dtype):
        return np.zeros(shape, dtype)


def test_shapes_fill_the_unit_square_and_differ():
    v, u = np.mgrid[-1.5:1.5:301j, -1.5:1.5:301j]
    masks = {name: shape(u, v) < 0 for name, shape in SHAPES.items()}
    for name, mask in masks.items():
        reach = np.abs(np.concatenate([u[mask], v[mask]])).max()
        assert 0.8 < reach <= 1.11, name
    for name, mask in masks.items():
        for other, other_mask in masks.items():
            overlap = (mask & other_mask).sum() / (mask | other_mask).sum()
            assert name == other or overlap < 0.9, (name, other)


def test_the_script(tmp_path, monkeypatch, capsys):
    assert run_script(monkeypatch, "generate_data.py", "--out", tmp_path / "out", "--train", 2, "--val", 1, "--size",
                      64, 96) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "2 training and 1 validation" in printed
    assert len(list((tmp_path / "out" / "train").iterdir())) == 2
