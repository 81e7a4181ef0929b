"""Test-time augmentation."""
import json
from dataclasses import replace

import pytest
import torch
from runs import config, run_script, write_checkpoint, write_config

from data import CocoDataset, generate_scenes
from data.images import read_image, write_picture
from data.transforms import flip_boxes
from kd.config import EvalConfig, TTAConfig, parse_config
from kd.evaluation import evaluate
from kd.evaluation.evaluate import eval_loader
from kd.inference.detectors import load_with_data
from kd.inference.tta import merge, merge_results
from models import ConfigError
from models.postprocess import TestConfig as Settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Four images of 96 x 64 pixels, and as a second validation set the same ones mirrored."""
    root = generate_scenes(tmp_path_factory.mktemp("scenes"), train=1, val=4, size=(64, 96))
    (root / "mirrored").mkdir()
    content = json.loads((root / "annotations" / "val.json").read_text())
    for image in content["images"]:
        pixels = read_image(root / "val" / image["file_name"])
        image["file_name"] = image["file_name"].replace(".jpg", ".png")
        write_picture(root / "mirrored" / image["file_name"], pixels.flip(2))
    (root / "annotations" / "mirrored.json").write_text(json.dumps(content))
    return root


def detector_and_data(scenes, tmp_path, split="val", **tta):
    cfg = config(scenes) | {"eval": {"tta": tta}}
    # So many candidates are kept that no cap applies, which would cut others in the mirrored image.
    cfg["model"] = cfg["model"] | {"test": {"score_thr": 0.55, "nms_pre": -1, "max_per_img": 2000}}
    cfg["data"] |= {"scale": [96, 64], "val": {"images": str(scenes / split),
                                              "annotations": str(scenes / "annotations" / f"{split}.json")}}
    checkpoint = write_checkpoint(tmp_path / "model.pth", cfg)
    cfg = parse_config(cfg)
    return *load_with_data(cfg, checkpoint, CPU), cfg


def records(results):
    """A dict per detection."""
    return [{"image_id": image_id, "bbox": row[:4].tolist(), "score": float(row[4]), "label": int(row[5])}
            for image_id, rows in results for row in rows]


def detect(*args):
    return records(evaluate.detect(*args))


def detect_views(*args):
    return records(evaluate.detect_views(*args))


def by_image(results):
    found = {}
    for result in results:
        found.setdefault(result["image_id"], []).append(result)
    return found


def test_without_flips_and_scales_it_is_plain_detection(scenes, tmp_path):
    detector, dataset, cfg = detector_and_data(scenes, tmp_path)
    plain = detect(detector, eval_loader(cfg, dataset), CPU)
    assert len(plain) > 20 and detect_views(detector, cfg, dataset, CPU) == plain
    cfg.eval.tta = TTAConfig(flip=False, scales=[(64, 96)])
    assert detect_views(detector, cfg, dataset, CPU) == plain
    cfg.eval = EvalConfig()
    assert detect_views(detector, cfg, dataset, CPU) == plain


def test_a_mirrored_image_gives_mirrored_detections(scenes, tmp_path):
    detector, dataset, cfg = detector_and_data(scenes, tmp_path, flip=True)
    found = by_image(detect_views(detector, cfg, dataset, CPU))
    _, mirrored, _ = detector_and_data(scenes, tmp_path, split="mirrored", flip=True)
    other = by_image(detect_views(detector, cfg, mirrored, CPU))
    plain = by_image(detect(detector, eval_loader(cfg, dataset), CPU))
    assert found.keys() == other.keys() and len(found) == 4 and found != plain
    for image_id, results in found.items():
        for mine, theirs in zip(results, other[image_id], strict=True):
            assert mine["score"] == pytest.approx(theirs["score"], abs=1e-6) and mine["label"] == theirs["label"]
            x, y, w, h = mine["bbox"]
            assert theirs["bbox"] == pytest.approx([96 - x - w, y, w, h], abs=1e-3)


def test_every_view_has_its_share(scenes, tmp_path):
    """Exactly the plain detections at each scale, mirrored and not mirrored, are merged."""
    scales = [[96, 64], [192, 128]]  # whole factors: how others round depends on the processor, and on the side
    detector, dataset, cfg = detector_and_data(scenes, tmp_path, flip=True, scales=scales)
    merged = {(r["image_id"], r["score"]): r for r in detect_views(detector, cfg, dataset, CPU)}
    seen = set()
    for scale in scales:
        for flip in (False, True):
            data = dataset.at_scale(scale)
            if flip:
                data = CocoDataset(scenes / "mirrored", scenes / "annotations" / "mirrored.json", False, scale=scale)
            for result in detect(detector, eval_loader(cfg, data), CPU):
                if twin := merged.get((result["image_id"], result["score"])):
                    x, y, w, h = result["bbox"]
                    assert twin["bbox"] == pytest.approx([96 - x - w if flip else x, y, w, h], abs=1e-3)
                    seen.add((twin["image_id"], twin["score"], tuple(scale), flip))
    assert {view[2:] for view in seen} == {(tuple(scale), flip) for scale in scales for flip in (False, True)}
    assert {view[:2] for view in seen} == merged.keys()


def view(boxes, scores, labels):
    return {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}


def test_merging_suppresses_within_each_class_over_all_views():
    first = view([[0.0, 0, 10, 10], [50, 50, 60, 60]], [0.9, 0.3], [0, 1])
    second = view([[1.0, 0, 11, 10], [0, 0, 10, 10], [50, 50, 60, 61]], [0.8, 0.7, 0.6], [0, 1, 1])
    test = Settings(nms_iou_threshold=0.5)
    merged = merge([first, second], test)
    assert merged["scores"].tolist() == pytest.approx([0.9, 0.7, 0.6]) and merged["labels"].tolist() == [0, 1, 1]
    assert merged["boxes"].tolist() == [[0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 61]]
    assert merge([first, second], replace(test, max_per_img=2))["scores"].tolist() == pytest.approx([0.9, 0.7])
    assert merge([first], Settings(nms_iou_threshold=0.0, max_per_img=1)) is first
    results = [[(i, torch.column_stack([each["boxes"][:, :2], each["boxes"][:, 2:] - each["boxes"][:, :2],
                                        each["scores"], each["labels"]]).double().numpy()) for i in ("a", 7)]
               for each in (first, second)]
    found = records(merge_results(results, test))
    one = [(r["score"], r["label"]) for r in found if r["image_id"] == 7]
    assert one == list(zip(merged["scores"].tolist(), merged["labels"].tolist()))
    assert len(found) == 6


def test_boxes_are_mirrored_within_the_image():
    assert flip_boxes(torch.tensor([[1.0, 2, 4, 8]]), 10).tolist() == [[6, 2, 9, 8]]


def test_eval_script_takes_it_from_the_configuration(scenes, tmp_path, monkeypatch, capsys):
    _, _, cfg = detector_and_data(scenes, tmp_path)
    path = write_config(tmp_path / "cfg.yaml", dict(cfg))
    figures = []
    for overrides in ([], ["eval.tta.flip=true", "eval.tta.scales=[[96, 64], [144, 96]]"]):
        assert run_script(monkeypatch, "eval.py", "--cfg", path, "--checkpoint", tmp_path / "model.pth", "--device",
                          "cpu", "--out", tmp_path / "out.json", *overrides) == 0
        figures.append(json.loads((tmp_path / "out.json").read_text()))
    assert figures[0] != figures[1]
    assert run_script(monkeypatch, "eval.py", "--cfg", path, "--checkpoint", tmp_path / "model.pth",
                      "eval.tta.flips=true") == 2
    assert 'eval.tta.flips: unknown key; did you mean "flip"?' in capsys.readouterr().err


def test_scales_must_have_two_edges():
    from models.build import check_arguments
    check_arguments(EvalConfig, {"tta": {"scales": [[96, 64]]}}, "eval")
    with pytest.raises(ConfigError, match="eval.tta.scales.0: must have 2 entries, not 1"):
        check_arguments(EvalConfig, {"tta": {"scales": [[96]]}}, "eval")
    assert EvalConfig().tta == TTAConfig() == EvalConfig(tta=None).tta
