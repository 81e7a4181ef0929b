"""analyze.py from the command line, and the curves that eval.py writes."""
import json
import sys

import numpy as np
import pytest
import torch
from runs import config, model, run_script, write_config
from small_models import enliven

from data import generate_scenes
from data.images import read_image
from models import build_detector


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Configurations of two detectors with lively heads, of different widths, and their checkpoints."""
    folder = tmp_path_factory.mktemp("models")
    scenes = generate_scenes(folder / "scenes", train=2, val=6, size=(64, 64))
    for name, channels in (("narrow", 8), ("wide", 12)):
        cfg = config(scenes) | {"model": model(channels)}
        section = cfg["model"] | {"head": cfg["model"]["head"] | {"num_classes": 6}}
        torch.manual_seed(channels)
        (folder / name).mkdir()
        torch.save(enliven(build_detector(section)).state_dict(), folder / name / "last.pth")
        write_config(folder / f"{name}.yaml", cfg)
    return folder


def test_two_models_of_different_configurations(models, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "out"
    assert run_script(monkeypatch, "analyze.py", "--cfg", models / "narrow.yaml", "--cfg", models / "wide.yaml",
                      "--checkpoint", models / "narrow" / "last.pth", "--checkpoint", models / "wide" / "last.pth",
                      "--out", out, "--device", "cpu", "data.workers=0") == 0
    printed = capsys.readouterr().out
    for title in ("AP, and by size of object", "AP50, and what it would gain without the errors of one kind",
                  "How many errors there are, whatever their score", "Objects found (IoU 0.5, score 0.3 or more)",
                  "Lowest score of each class: the best F1", "Reliability of scores of 0.3 or more",
                  "narrow: objects (rows) taken for", "wide: objects (rows) taken for"):
        assert title in printed
    narrow, wide = json.loads((out / "analysis.json").read_text())
    truth = json.loads((models / "scenes" / "annotations" / "val.json").read_text())
    for each in (narrow, wide):
        assert sum(errors["objects"] for errors in each["errors"]) == len(truth["annotations"])
        assert sum(sum(row) for row in each["confusion"][:-1]) == len(truth["annotations"])
        assert sum(errors[kind] for errors in each["errors"] for kind in each["lost"]) > 0
    assert narrow["name"] == "narrow" and narrow["AP50"] != wide["AP50"]
    assert (out / "analysis.md").read_text().count("## ") == 8
    assert {path.name for path in out.glob("thresholds*")} == {"thresholds_narrow.json", "thresholds_wide.json"}
    for each in (narrow, wide):
        chosen = json.loads((out / f"thresholds_{each['name']}.json").read_text())
        assert chosen["checkpoint"] == str(models / each["name"] / "last.pth")
        assert list(chosen["classes"]) == each["classes"] == list(each["reliability"]["per_class"])
        assert sum(entry["objects"] for entry in chosen["classes"].values()) == len(truth["annotations"])
        assert 0 < each["reliability"]["ECE"] < 1


def test_pictures_of_scores(models, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="plots need the extra viz")
    arguments = ["analyze.py", "--cfg", models / "wide.yaml", "--checkpoint", models / "wide" / "last.pth",
                 "--precision", 0.2, "--device", "cpu", "--out"]
    assert run_script(monkeypatch, *arguments, tmp_path) == 0
    assert "precision 0.2 or more" in capsys.readouterr().out
    assert json.loads((tmp_path / "thresholds.json").read_text())["chosen_by"].startswith("precision 0.2 or more")
    for name in ("scores.png", "reliability.png"):
        assert read_image(tmp_path / name).float().std() > 10
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run_script(monkeypatch, *arguments, tmp_path / "without") == 0
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("no pictures: a plot needs matplotlib") and "densekd[viz]" in error[-1]
    assert {path.name for path in (tmp_path / "without").iterdir()} == {"analysis.json", "analysis.md",
                                                                        "thresholds.json"}


def test_one_model(models, monkeypatch, capsys):
    assert run_script(monkeypatch, "analyze.py", "--cfg", models / "wide.yaml", "--checkpoint",
                      models / "wide" / "last.pth", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "difference" not in printed and "Objects found" not in printed and "(background)" in printed


@pytest.mark.parametrize("arguments, expected", [
    (["--cfg", "narrow.yaml", *["--checkpoint", "narrow/last.pth"] * 3], "give one or two checkpoints"),
    ([*["--cfg", "narrow.yaml"] * 2, "--checkpoint", "narrow/last.pth"], "1 --checkpoint and 2 --cfg"),
    (["--cfg", "narrow.yaml", "--cfg", "fewer.yaml", *["--checkpoint", "narrow/last.pth"] * 2],
     "compare on the same images"),
])
def test_bad_usage(models, monkeypatch, capsys, arguments, expected):
    fewer = (models / "narrow.yaml").read_text().replace("  val:\n", "  val:\n    first: 3\n")
    (models / "fewer.yaml").write_text(fewer)
    monkeypatch.chdir(models)
    assert run_script(monkeypatch, "analyze.py", *arguments, "--device", "cpu") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and expected in error[0]


def test_curves_of_eval(models, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "curves.json"
    assert run_script(monkeypatch, "eval.py", "--cfg", models / "wide.yaml", "--checkpoint",
                      models / "wide" / "last.pth", "--curves", out, "--out", tmp_path / "figures.json",
                      "--device", "cpu") == 0
    curves, figures = (json.loads(path.read_text()) for path in (out, tmp_path / "figures.json"))
    assert curves["recall"] == [i / 100 for i in range(101)]
    known = {name: each["0.50"] for name, each in curves["precision"].items() if each["0.50"] is not None}
    assert known.keys() == {name for name, ap in figures["per_class"].items() if ap is not None}
    assert figures["AP50"] > 0
    assert np.mean(list(known.values())) == pytest.approx(figures["AP50"], abs=1e-4)  # four digits are kept
