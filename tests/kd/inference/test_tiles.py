"""Detection on tiles of large images."""
import json
from types import SimpleNamespace

import pytest
import torch
from runs import config, run_script, write_checkpoint, write_config

from data import generate_scenes
from data.images import read_image, write_picture
from data.inputs.files import make_sample
from data.inputs.tiles import tile_windows
from kd.config import EvalConfig, TilesConfig, TTAConfig, parse_config
from kd.evaluation.evaluate import detect_views
from kd.inference.detectors import load_with_data
from kd.inference.tta import Views, clearance, merge_tiles
from models import ConfigError
from models.build import check_arguments
from models.postprocess import TestConfig as Settings
from models.postprocess import class_nms

CPU = torch.device("cpu")
SIZE = (150, 200)  # h, w
TILES = TilesConfig((80, 64), 0.3)  # so objects of up to 23 x 19 pixels fit into every overlap


class Ideal:
    """A detector that finds the objects of `scene`, as far as it sees them, and notes the batches that it gets."""

    training = False

    def __init__(self):
        self.test, self.batches = Settings(nms_iou_threshold=0.6, max_per_img=3), []

    def preprocess(self, images, targets):
        self.batches.append(tuple(images.shape))
        return images

    def predict(self, images, targets):
        return [self.find(image[:, :target["image_size"][0], :target["image_size"][1]].float(), target)
                for image, target in zip(images, targets)]

    def find(self, image, target):
        (h, w), (full_h, full_w) = target["image_size"], target["original_size"]
        number = torch.where(image[1] >= 128, image[0] / image[1].clamp(min=1) * 25.5, 0).round()
        found = {"boxes": [], "scores": [], "labels": []}
        for value in set(number.unique().tolist()) - {0}:
            y, x = (number == value).nonzero(as_tuple=True)
            box = [x.min().item(), y.min().item(), x.max().item() + 1, y.max().item() + 1]
            found["boxes"].append([edge * factor for edge, factor in zip(box, [full_w / w, full_h / h] * 2)])
            # The less of an object is seen, the surer this detector is: plain suppression keeps the parts.
            found["scores"].append(0.9 - len(x) / 1e5)
            found["labels"].append(0)
        return {"boxes": torch.tensor(found["boxes"]).reshape(-1, 4), "scores": torch.tensor(found["scores"]),
                "labels": torch.tensor(found["labels"], dtype=torch.long)}


def scene(boxes):
    """Objects on black: the second channel says that there is one, the first one which. A resize mixes both alike."""
    image = torch.zeros(3, *SIZE, dtype=torch.uint8)
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        image[0, y1:y2, x1:x2], image[1, y1:y2, x1:x2] = 10 * (k + 1), 255
    return image


def apart(seed, count=12, side=19):
    """Boxes of different sizes that do not touch each other."""
    generator, boxes = torch.Generator().manual_seed(seed), []
    while len(boxes) < count:
        w, h = torch.randint(4, side + 1, (2,), generator=generator).tolist()
        x, y = (int(torch.randint(0, edge - own + 1, (), generator=generator)) for edge, own in zip(SIZE[::-1], (w, h)))
        new = (x, y, x + w, y + h)
        if all(new[2] < b[0] or b[2] < new[0] or new[3] < b[1] or b[3] < new[1] for b in boxes):
            boxes.append(new)
    return boxes


def detect(image, detector=None, scale=(80, 64), batch_size=4, **tta):
    views = Views(detector or Ideal(), TTAConfig(**tta), scale, False, CPU, batch_size)
    return views([make_sample(image, 7, views.scales)])[0]


def rounded(found):
    return sorted(tuple(map(round, box)) for box in found["boxes"].tolist())


def test_tiles_cover_the_image_with_enough_overlap():
    for length in range(60, 400, 7):
        windows = tile_windows((50, length), (100, 80), 0.25)
        assert windows[0][0] == 0 and windows[-1][2] == length and {w[1::2] for w in windows} == {(0, 50)}
        assert {w[2] - w[0] for w in windows} == {min(100, length)}
        shared = [a[2] - b[0] for a, b in zip(windows, windows[1:])]
        assert all(each >= 25 for each in shared) and max(shared, default=0) - min(shared, default=0) <= 1
        assert len(windows) == 1 + max(0, -(-(length - 100) // 75))  # no fewer would do
    assert tile_windows((4000, 6000), (640, 640), 0.2)[-1] == (5360, 3360, 6000, 4000)
    assert len(tile_windows((4000, 6000), (640, 640), 0.2)) == 12 * 8
    assert len(tile_windows((101, 40), (32, 100), 0.9)) == 2 * 4


@pytest.mark.parametrize("tta", [{}, {"flip": True}, {"scales": [(80, 64), (160, 128)]}], ids=str)
@pytest.mark.parametrize("whole", [True, False])
def test_every_object_is_found_once_with_its_whole_box(tta, whole):
    tiles = TilesConfig(TILES.size, TILES.overlap, whole)
    for seed in range(3):
        boxes = apart(seed)
        found = detect(scene(boxes), tiles=tiles, **tta)
        assert rounded(found) == sorted(boxes)  # more than max_per_img, which is for each tile
        assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)


def test_plain_suppression_leaves_parts_at_the_seams():
    """Of the same detections: this is why boxes that a tile cuts need a rule of their own."""
    boxes, parts = apart(0), []
    image, detector = scene(boxes), Ideal()
    for window in tile_windows(SIZE, TILES.size, TILES.overlap):
        x1, y1, x2, y2 = window
        sample = make_sample(image[:, y1:y2, x1:x2], 7, [(80, 64)])
        one, = detector.predict(sample.views[0][None], sample.targets)
        parts.append((window, one | {"boxes": one["boxes"] + torch.tensor([x1, y1] * 2)}))
    together = {key: torch.cat([one[key] for _, one in parts]) for key in ("boxes", "scores", "labels")}
    kept = class_nms(**together, iou_threshold=0.6)
    assert len(kept) > len(boxes) and set(rounded({"boxes": together["boxes"][kept]})) != set(boxes)
    assert rounded(merge_tiles(parts, SIZE, detector.test)) == sorted(boxes)


def test_an_object_larger_than_the_overlap_is_that_of_the_whole_image():
    boxes = [(60, 40, 140, 110), (2, 2, 12, 14)]
    found = detect(scene(boxes), tiles=TILES, scale=(200, 150))
    assert rounded(found) == sorted(boxes)
    parts = detect(scene(boxes), tiles=TilesConfig(TILES.size, TILES.overlap, whole=False), scale=(200, 150))
    assert len(rounded(parts)) > 4 and boxes[0] not in rounded(parts)


def one(*detections):
    boxes, scores, labels = zip(*detections)
    return {"boxes": torch.tensor(boxes).float(), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}


def test_what_a_cut_box_loses_against():
    """A tile's right border at 60 cuts boxes; a box of the whole image that no tile shows uncut reaches over it."""
    left, right, size = (0, 0, 60, 50), (40, 0, 100, 50), (50, 100)
    large = ((20.0, 5, 90, 45), 0.5, 0)
    piece = (20.0, 5, 60, 45)

    def merged(*pieces, others=(large,)):
        views = [((0, 0, 100, 50), one(*others)), (left, one(*pieces)), (right, one(((90, 1, 99, 9), 0.1, 2)))]
        found = merge_tiles(views, size, Settings(nms_iou_threshold=0.6))
        return [round(score, 2) for score in found["scores"].tolist()]

    assert merged((piece, 0.9, 0)) == [0.5, 0.1]
    assert merged((piece, 0.9, 1)) == [0.9, 0.5, 0.1]  # another class
    assert merged((piece, 0.9, 0), others=[(large[0], 0.4, 0)]) == [0.9, 0.4, 0.1]  # a weak box proves nothing
    assert merged(((20.0, 5, 58, 45), 0.9, 0)) == [0.9, 0.5, 0.1]  # not cut: it ends before the border
    # What the right tile shows uncut, it decides: on cut boxes, and on those of the whole image.
    assert merged(((45.0, 5, 60, 45), 0.9, 0), others=[(large[0], 0.5, 1)]) == [0.5, 0.1]
    assert merged((piece, 0.9, 0), others=[((42.0, 5, 90, 45), 0.8, 3)]) == [0.9, 0.1]


def test_the_border_of_the_image_cuts_nothing():
    boxes = [(0, 0, 10, 10), (190, 0, 200, 12), (0, 140, 9, 150), (185, 141, 200, 150), (0, 60, 12, 72)]
    assert rounded(detect(scene(boxes), tiles=TILES)) == sorted(boxes)


def test_clearance():
    boxes = torch.tensor([[10.0, 10, 20, 20], [5, 0, 49, 48], [-3, 30, 60, 50]])
    assert clearance(boxes, (0, 0, 50, 50), (50, 50)).tolist() == [torch.inf] * 3
    assert clearance(boxes, (0, 0, 50, 50), (80, 100)).tolist() == [30, 1, -10]
    assert clearance(boxes, (4, 0, 100, 80), (80, 100)).tolist() == [6, 1, -7]


def test_an_image_that_fits_into_a_tile_is_detected_as_without_tiles():
    image = scene(apart(1))
    plain = detect(image, flip=True)
    for tiles in (TilesConfig((200, 150)), TilesConfig((500, 500), 0.0, False)):
        mine = detect(image, flip=True, tiles=tiles)
        assert all(torch.equal(mine[key], plain[key]) for key in plain)


def test_tiles_come_in_batches():
    detector = Ideal()
    detect(scene([]), detector, tiles=TILES, batch_size=4)
    assert len(tile_windows(SIZE, TILES.size, TILES.overlap)) == 4 * 3 == 12
    assert detector.batches == [(1, 3, 64, 96)] + [(4, 3, 64, 96)] * 3


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = generate_scenes(tmp_path_factory.mktemp("tiles"), train=1, val=3, size=(96, 128))
    content = json.loads((root / "annotations" / "val.json").read_text())
    image = content["images"][2]  # a small one, which fits into a tile
    pixels = read_image(root / "val" / image["file_name"])[:, :40, :60]
    image |= {"width": 60, "height": 40, "file_name": "small.png"}
    write_picture(root / "val" / "small.png", pixels)
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != image["id"]]
    (root / "annotations" / "val.json").write_text(json.dumps(content))
    cfg = config(root)
    cfg["model"]["test"] = {"score_thr": 0.5, "max_per_img": 30}
    cfg["data"]["scale"] = [64, 64]
    cfg["eval"] = {"batch_size": 3, "tta": {"flip": True, "scales": [[64, 64], [96, 96]],
                                            "tiles": {"size": [64, 60], "overlap": 0.25}}}
    return root, cfg, write_checkpoint(root / "model.pth", cfg)


def test_evaluation_and_prediction_agree(scenes, tmp_path, monkeypatch, capsys):
    root, cfg, checkpoint = scenes
    parsed = parse_config(cfg)
    detector, dataset = load_with_data(parsed, checkpoint, CPU)
    read = []
    monkeypatch.setattr("data.coco.dataset.read_image", lambda path: read.append(path) or read_image(path))
    expected = {image_id: rows for image_id, rows in detect_views(detector, parsed, dataset, CPU)}
    assert len(read) == 3  # each image once, for 2 scales, flips and all tiles
    assert list(expected) == dataset.image_ids and sum(map(len, expected.values())) > 60
    assert max(map(len, expected.values())) > 30  # max_per_img is for each tile
    path = write_config(tmp_path / "cfg.yaml", cfg)
    names = [root / "val" / name for name in dataset.file_names]
    assert run_script(monkeypatch, "predict.py", "--cfg", path, "--checkpoint", checkpoint, "--device", "cpu",
                      "--score-thr", 0, "--out", tmp_path, "--input", *names) == 0
    results = json.loads((tmp_path / "predictions.json").read_text())
    for image_id, rows in zip(range(1, 4), expected.values()):
        own = [result for result in results if result["image_id"] == image_id]
        assert [r["score"] for r in own] == pytest.approx(rows[:, 4].tolist())
        for result, row in zip(own, rows.tolist()):
            assert result["bbox"] == pytest.approx(row[:4], abs=1e-3)
    assert run_script(monkeypatch, "eval.py", "--cfg", path, "--checkpoint", checkpoint, "--device", "cpu",
                      "--out", tmp_path / "out.json") == 0
    assert "AP50" in json.loads((tmp_path / "out.json").read_text())


def test_shares_of_processes_are_the_whole(scenes, monkeypatch):
    root, cfg, checkpoint = scenes
    parsed = parse_config(cfg)
    detector, dataset = load_with_data(parsed, checkpoint, CPU)
    alone = detect_views(detector, parsed, dataset, CPU)
    shares = []
    fake = SimpleNamespace(world_size=lambda: 2, gather_rows=lambda rows: shares.append(rows) or rows)
    for rank in range(2):
        fake.rank = lambda rank=rank: rank
        monkeypatch.setattr("kd.evaluation.evaluate.distributed", fake)
        detect_views(detector, parsed, dataset, CPU)
    assert [sorted(set(rows[:, 0].tolist())) for rows in shares] == [[0, 2], [1]]
    assert sum(map(len, shares)) == sum(len(rows) for _, rows in alone)


@pytest.mark.parametrize("tiles, message", [
    ({}, "eval.tta.tiles.size: missing"), ({"size": [16, 640]}, "must be at least 32, not 16"),
    ({"size": [640]}, "eval.tta.tiles.size: must have 2 entries, not 1"),
    ({"size": [640, 640], "overlap": 0.95}, "eval.tta.tiles.overlap: must be from 0 to 0.9, not 0.95"),
    ({"size": [640, 640], "overlp": 0.1}, 'eval.tta.tiles.overlp: unknown key; did you mean "overlap"?')])
def test_wrong_settings(tiles, message):
    with pytest.raises(ConfigError) as caught:
        check_arguments(EvalConfig, {"tta": {"tiles": tiles}}, "eval")
    assert message in str(caught.value)
