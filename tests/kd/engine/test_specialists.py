"""Two teachers that know some classes each, and a student that learns all: from their training to the pictures."""
import json

import pytest
import torch
from runs import config, config_with, run_script, write_config

from data import generate_scenes
from data.sources.scenes import CLASSES

ROUND, ANGULAR = CLASSES[:2], CLASSES[2:]
METHODS = [{"type": "CrossKD", "reused_teacher_head_idx": 1}, {"type": "FGD"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("specialists")
    for name, classes in (("round", ROUND), ("angular", ANGULAR), ("all", CLASSES)):
        generate_scenes(folder / name, train=8, val=6, size=(64, 64), classes=classes)
    return folder


def entry(folder, name, class_map):
    """A trained specialist whose configuration is `NAME.yaml`."""
    return {"name": name, "cfg": str(folder / f"{name}.yaml"), "checkpoint": str(folder / name / "run" / "last.pth"),
            "class_map": class_map}


def test_from_their_training_to_the_pictures(folder, monkeypatch, capsys):
    for name, classes in (("round", ROUND), ("angular", ANGULAR)):
        cfg = config(folder / name, 1)
        cfg["model"]["head"]["num_classes"] = len(classes)
        path = write_config(folder / f"{name}.yaml", cfg)
        assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", folder / name / "run", "--device",
                          "cpu") == 0
    teachers = [entry(folder, "round", [0, 1, None, None, None, None]),
                entry(folder, "angular", [None, None, 0, 1, 2, 3])]
    path = write_config(folder / "student.yaml", config(folder / "all", 1, {"teacher": teachers, "methods": METHODS}))
    capsys.readouterr()
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--check", "--device", "cpu") == 0
    printed, knows = capsys.readouterr().out, ["which knows 2 of 6 classes (disc, ring)",
                                               "which knows 4 of 6 classes (square, triangle, cross, star)"]
    for i, text in enumerate(knows):
        assert f"distilled by CrossKD, FGD, {text}" in printed and f"from teacher {i}, {text}: times 1" in printed
        assert f" teacher {i}, {text}: AP " in printed
        assert f"teacher {i} ({teachers[i]['name']}): " in printed
    assert "student class scores (4, 86, 2) <-" in printed and "student class scores (4, 86, 4) <-" in printed

    run = folder / "run"
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", run, "--device", "cpu") == 0
    losses = next(line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line)
    assert {f"loss_cls_kd/{name}/CrossKD0" for name in ("round", "angular")} <= losses.keys()
    capsys.readouterr()
    assert run_script(monkeypatch, "visualize.py", "--cfg", path, "--checkpoint", run / "last.pth", "--out",
                      folder / "pictures", "--count", 1, "--device", "cpu") == 0
    captured = capsys.readouterr()
    assert all(text in captured.err + captured.out for text in knows) and len(list((folder / "pictures").iterdir())) > 2
    assert run_script(monkeypatch, "summary.py", "--cfg", path) == 0
    # Without the map, densekd says which one is meant.
    for teacher in teachers:
        del teacher["class_map"]
    cfg = (folder / "round.yaml").read_text()
    (folder / "round.yaml").write_text(cfg.replace("num_classes: 2", "stacked_convs: 1"))
    write_config(path, config(folder / "all", 1, {"teacher": teachers[0], "methods": METHODS}))
    capsys.readouterr()
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--check", "--device", "cpu") == 2
    assert "distill.teacher.class_map=[0,1,null,null,null,null]" in capsys.readouterr().err


def test_a_specialists_ap_is_that_of_its_classes(folder, monkeypatch):
    """A detector that is right on its classes and silent on others has all points."""
    from kd.config import parse_config
    from kd.engine import start
    from kd.engine.run import build_run
    untrained = {"model": config(folder / "all")["model"], "checkpoint": None, "class_map": [0, 1, *[None] * 4]}
    untrained["model"]["head"] |= {"num_classes": 2}
    distill = {"teacher": untrained, "methods": METHODS, "init_student": True}
    cfg = parse_config(config_with(config(folder / "all", 1, distill)))
    run = build_run(cfg, folder / "none", torch.device("cpu"))
    figures = {"AP": 0.3, "per_class": dict(zip(CLASSES, [1.0, 0.8, 0.0, 0.0, 0.0, None]))}
    monkeypatch.setattr(start, "evaluate", lambda *args, **options: figures)
    text = start.starting_points(run.distiller, run.cfg, CLASSES, torch.device("cpu"))
    assert "teacher 0: 90.0, which knows 2 of 6 classes" in text and "student:   30.0" in text
    assert start.mean_ap(figures, ["star"]) is None
