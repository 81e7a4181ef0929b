"""One class, the commonest data set, through every command: tables have one row, not the class and "all"."""
import json
import re

import numpy as np
import pytest
import torch
from runs import config, run_script, write_checkpoint, write_config

from data import generate_scenes
from kd.config import parse_config
from kd.evaluation.evaluate import detect, eval_loader
from kd.inference.detectors import load_named, load_with_data

METHODS = [{"type": "CrossKD", "reused_teacher_head_idx": 0}, {"type": "LD"}, {"type": "KD"},
           {"type": "FGD"}, {"type": "PKD"}, {"type": "MGD"}, {"type": "CWD"}, {"type": "FitNet"}, {"type": "GI"},
           {"type": "BCKD"}, {"type": "PGD"}, {"type": "FRS"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Scenes whose only class is `thing`, a teacher that detects, and a run with every method."""
    root = generate_scenes(tmp_path_factory.mktemp("one"), train=4, val=4, size=(64, 64))
    for split in ("train", "val"):
        found = content(root, split)
        found["annotations"] = [each | {"category_id": 7} for each in found["annotations"]]
        (root / "annotations" / f"{split}.json").write_text(
            json.dumps(found | {"categories": [{"id": 7, "name": "thing"}]}))
    teacher = write_checkpoint(root / "teacher.pth", config(root), ["thing"])
    plain = write_config(root / "plain.yaml", config(root))
    write_config(root / "cfg.yaml", config(root, 1, {"teacher": {"cfg": str(plain), "checkpoint": str(teacher)},
                                                     "methods": METHODS}))
    with pytest.MonkeyPatch.context() as patch:
        assert run_script(patch, "train.py", "--cfg", root / "cfg.yaml", "--work-dir", root / "run", "--device",
                          "cpu") == 0
    return root


@pytest.fixture
def command(root, monkeypatch, capsys):
    """Run a script, by default with the teacher, and return what it prints."""
    def run(name, *arguments, cfg="plain.yaml", checkpoint="teacher.pth"):
        model = ["--cfg", root / cfg, "--checkpoint", root / checkpoint] if cfg else []
        assert run_script(monkeypatch, name, *model, *arguments) == 0
        return capsys.readouterr().out
    return run


def content(root, split):
    return json.loads((root / "annotations" / f"{split}.json").read_text())


def test_training_with_every_method(root):
    step, evaluation = map(json.loads, (root / "run" / "metrics.jsonl").read_text().splitlines())
    losses = {key: value for key, value in step.items() if key.startswith("loss_")}
    assert len(losses) == 3 + 2 + 8 + 2 + 2 + 2 and all(np.isfinite(value) and value > 0 for value in losses.values())
    assert evaluation["per_class"] == {"thing": evaluation["AP"]}
    log = (root / "run" / "train.log").read_text()
    assert "4 training images, 1 class," in log and "thing" not in log.split("on data.val, in points")[1]


def test_evaluation(command, tmp_path):
    printed = command("eval.py", "--out", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["per_class"] == {"thing": figures["AP"]} and figures["AP"] > 0.1
    assert f"{100 * figures['AP']:.1f}" in printed and "thing" not in printed


def test_analysis(root, command, tmp_path):
    printed = command("analyze.py", "--checkpoint", root / "run" / "last.pth", "--out", tmp_path)
    tables = re.split(r"\n\n(?=\S)", printed[printed.index("AP, and by size"):printed.index("\nwrote")])
    first = [[line.split()[0] for line in table.splitlines()[2:]] for table in tables]
    # The fourth: objects of all sizes, and those of medium size, as all are. Then come chosen scores and reliability.
    assert first == [["thing", "run", "difference"]] * 2 + [["thing", "run"], ["thing", "thing"], ["thing", "run"],
                                                            ["thing", "run", "difference"]] + [
        ["thing", "(background)"]] * 2
    teacher, _ = json.loads((tmp_path / "analysis.json").read_text())
    objects = len(content(root, "val")["annotations"])
    assert teacher["errors"][0]["objects"] == sum(teacher["confusion"][0]) == objects
    assert teacher["lost"]["classification"] == [0] and teacher["AP"][0] > 0.1


def test_predictions_are_those_of_evaluation(root, command, tmp_path):
    command("predict.py", "--input", root / "val", "--out", tmp_path, "--score-thr", "0")
    cfg = parse_config(config(root))
    detector, dataset = load_with_data(cfg, root / "teacher.pth", torch.device("cpu"))
    expected = [row for _, rows in detect(detector, eval_loader(cfg, dataset), torch.device("cpu")) for row in rows]
    found = json.loads((tmp_path / "predictions.json").read_text())
    assert {each["category_id"] for each in found} == {7} and len(found) == len(expected) > 3
    np.testing.assert_allclose([[*each["bbox"], each["score"]] for each in found], np.array(expected)[:, :5], atol=0.01)
    assert json.loads((tmp_path / "images.json").read_text())["categories"] == [{"id": 7, "name": "thing"}]


def test_pictures(command, tmp_path):
    assert len(command("visualize.py", "--count", "1", "--out", tmp_path, cfg="cfg.yaml",
                       checkpoint="run/last.pth").splitlines()) == 2 + 5
    assert {path.name for path in tmp_path.iterdir()} == {
        f"000000_{kind}.png" for kind in ("detections", "scores", "attention", "regions", "richness")}


def test_checking_the_data(root, command):
    rows = [line.split() for line in command("check_data.py", "--cfg", root / "cfg.yaml", cfg=None).splitlines()
            if line.startswith("thing")]
    assert [int(row[-1]) for row in rows] == [len(content(root, split)["annotations"]) for split in ("train", "val")]


def test_one_of_a_checkpoints_classes(root, command, monkeypatch, capsys):
    """A class map of one entry leaves the detections of that class as they are."""
    section = config(root)
    section["model"]["test"] = {"nms_pre": -1, "max_per_img": -1}
    several = write_checkpoint(root / "several.pth", section, ["other", "thing", "third"])
    section["model"]["head"]["num_classes"] = 3
    cfg, device = parse_config(section | {"eval": {"class_map": [1]}}), torch.device("cpu")
    detector, dataset = load_with_data(cfg, several, device)
    whole, _ = load_named(parse_config(section | {"data": None}), several, device)
    loader = eval_loader(cfg, dataset)
    for (_, mine), (_, every) in zip(detect(detector, loader, device), detect(whole, loader, device), strict=True):
        assert (mine[:, 5] == 0).all() and len(mine) > 0 and (every[:, 5] != 1).any()
        np.testing.assert_allclose(mine[:, :5], every[every[:, 5] == 1][:, :5], rtol=1e-6)
    capsys.readouterr()
    assert run_script(monkeypatch, "eval.py", "--cfg", root / "plain.yaml", "--checkpoint", several) == 0
    printed = capsys.readouterr().out
    assert "has 3 classes (other, thing, third): those of the data are found by their names" in printed
