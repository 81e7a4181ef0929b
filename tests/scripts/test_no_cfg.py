"""Scripts without --cfg: a checkpoint of ours holds its configuration, and what is given wins."""
import json

import pytest
import torch
from runs import config, config_with, model, run_script, write_checkpoint, write_config

from data import generate_scenes
from kd import load_detector
from models.checkpoints import sources
from models.checkpoints.zoo import ZOO, Published


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with scenes, and the checkpoint of a distilled student as a run writes it; the teacher's file, and that
    which the student started from, are gone."""
    folder = tmp_path_factory.mktemp("place")
    cfg = config(generate_scenes(folder / "scenes", train=1, val=3, size=(64, 96)))
    cfg = config_with(cfg, train={"init": "gone.pth"}, model={"test": {"score_thr": 0.2}})
    write_config(folder / "cfg.yaml", cfg)
    distill = {"teacher": {"cfg": "gone.yaml", "checkpoint": "gone.pth"}, "methods": [{"type": "FGD"}]}
    held = config_with(cfg, model={"head": cfg["model"]["head"] | {"num_classes": 6}}, eval={"class_map": [0, 1]})
    held["distill"] = distill
    path = write_checkpoint(folder / "last.pth", cfg)
    torch.save(torch.load(path, weights_only=True) | {"config": held, "step": 1}, path)
    return folder


def with_config(place, path, **changes):
    """A copy of the checkpoint with another configuration."""
    content = torch.load(place / "last.pth", weights_only=True)
    torch.save(content | {"config": content["config"] | changes}, path)
    return path


def figures(monkeypatch, out, *arguments):
    assert run_script(monkeypatch, "eval.py", "--out", out, "--device", "cpu", *arguments) == 0
    return json.loads(out.read_text())


def test_eval(place, tmp_path, monkeypatch):
    checkpoint = ["--checkpoint", place / "last.pth"]
    own = figures(monkeypatch, tmp_path / "own.json", *checkpoint)
    assert own == figures(monkeypatch, tmp_path / "a.json", *checkpoint, "--cfg", place / "cfg.yaml") and own["AP"] > 0
    assert figures(monkeypatch, tmp_path / "b.json", *checkpoint, "model.test.max_per_img=2") != own
    other = config_with(config(place / "scenes"), model={"test": {"score_thr": 0.9}})
    path = write_config(tmp_path / "other.yaml", other)
    assert figures(monkeypatch, tmp_path / "c.json", *checkpoint, "--cfg", path)["AP"] != own["AP"]  # --cfg wins


def test_predict_and_export(place, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    found = {}
    for name, extra in (("own", []), ("given", ["--cfg", place / "cfg.yaml"])):
        assert run_script(monkeypatch, "predict.py", "--checkpoint", place / "last.pth", "--input",
                          place / "scenes" / "val", "--out", tmp_path / name, "--device", "cpu", *extra) == 0
        found[name] = (tmp_path / name / "predictions.json").read_text()
    assert found["own"] == found["given"] and len(json.loads(found["own"])) > 3
    fixed = ["--fixed", "batch=1", "height=64", "width=64"]  # takes half the time
    assert run_script(monkeypatch, "export.py", "--checkpoint", place / "last.pth", "--out", tmp_path / "a.onnx",
                      *fixed) == 0


def test_analyze_and_summary(place, tmp_path, monkeypatch, capsys):
    wide = config_with(config(place / "scenes"), model=model(12))
    path = write_checkpoint(tmp_path / "wide.pth", wide)
    torch.save(torch.load(path, weights_only=True) | {"config": wide}, path)
    assert run_script(monkeypatch, "analyze.py", "--checkpoint", place / "last.pth", "--checkpoint", path) == 0
    assert "wide: objects (rows) taken for" in capsys.readouterr().out
    printed = []
    for name, option in (("last.pth", "--checkpoint"), ("cfg.yaml", "--cfg")):
        assert run_script(monkeypatch, "summary.py", option, place / name) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "teacher" not in printed[0]
    assert run_script(monkeypatch, "summary.py", "--checkpoint", path) == 0 and capsys.readouterr().out != printed[0]


def test_a_published_checkpoint_has_a_configuration(place, monkeypatch, capsys, tmp_path):
    """The weights come through the name, and the configuration is the zoo's."""
    bare = write_checkpoint(place / "bare.pth", config(place / "scenes"))
    monkeypatch.setitem(ZOO, "mine", Published("https://weights.invalid/a.pth", str(place / "cfg.yaml"), 1.0))
    monkeypatch.setattr(sources, "_download", lambda url: str(bare))
    mine = figures(monkeypatch, tmp_path / "a.json", "--checkpoint", "zoo:mine")
    assert mine == figures(monkeypatch, tmp_path / "b.json", "--checkpoint", bare, "--cfg", place / "cfg.yaml")
    assert len(load_detector("zoo:mine", device="cpu", score_thr=0.2)(place / "scenes/val/000000.jpg")["boxes"])


@pytest.mark.parametrize("script", ["eval.py", "predict.py", "export.py", "analyze.py", "summary.py"])
def test_bad_input_is_one_line(place, tmp_path, monkeypatch, capsys, script):
    bare = write_checkpoint(tmp_path / "bare.pth", config(place / "scenes"))
    later = with_config(place, tmp_path / "later.pth", eval={"every": 1, "from_the_future": 2})
    more = {"predict.py": ["--input", place / "scenes", "--out", tmp_path], "export.py": ["--out", tmp_path / "a.onnx"]}
    for checkpoint, overrides, message in (
            (bare, [], f"checkpoint {bare} holds no configuration: give cfg, a configuration file (--cfg)"),
            (later, [], f"the configuration in checkpoint {later} cannot be used, eval.from_the_future: unknown key"),
            (place / "last.pth", ["model.tset=1"], 'model.tset: unknown key; did you mean "test"? (override'),
            ("nowhere.pth", [], "no such checkpoint file: nowhere.pth"),
            ("zoo:gfl_r50", [], "no published checkpoint is called zoo:gfl_r50; did you mean zoo:gfl_r50_1x?")):
        assert run_script(monkeypatch, script, "--checkpoint", checkpoint, *more.get(script, []), *overrides) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and message in error[0], error


def test_what_the_configuration_names_must_exist(place, tmp_path, monkeypatch, capsys):
    gone = {"images": "gone", "annotations": "gone.json"}
    path = with_config(place, tmp_path / "moved.pth", data={"train": gone, "val": gone})
    assert run_script(monkeypatch, "eval.py", "--checkpoint", path) == 2
    assert "does not exist" in capsys.readouterr().err
    assert run_script(monkeypatch, "predict.py", "--checkpoint", path, "--input", place / "scenes" / "val", "--out",
                      tmp_path / "found") == 0
