"""A detector for publication: a .safetensors file that goes wherever a checkpoint goes, and the page beside it."""
import json
from pathlib import Path

import pytest
import torch
import yaml
from runs import config, config_with, run_script, write_checkpoint, write_config

from data import generate_scenes
from data.sources.scenes import CLASSES
from kd import load_config, load_detector
from kd.build import build_distiller
from models.checkpoints import sources
from models.checkpoints.zoo import ZOO, Published
from models.weights import load_backbone_weights, open_checkpoint

pytest.importorskip("safetensors", reason="needs the extra hub")
STEP = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with scenes, and the run of a distilled student as train.py leaves it, whose teacher is gone."""
    folder = tmp_path_factory.mktemp("place")
    scenes = generate_scenes(folder / "scenes", train=1, val=3, size=(64, 96))
    file = scenes / "annotations" / "train.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"licenses": [{"id": 1, "name": "CC BY 4.0"}, {
        "id": 2, "url": "https://example.org/l"}]}))
    cfg = config_with(config(scenes), model={"head": config(scenes)["model"]["head"] | {"num_classes": 6}},
                      train={"epochs": 2, "seed": 3})
    cfg["distill"] = {"teacher": {"cfg": "teacher.yaml", "checkpoint": "gone.pth"},
                      "methods": [{"type": "FGD"}, {"type": "PKD"}]}
    (folder / "run").mkdir()
    path = write_checkpoint(folder / "run" / "last.pth", cfg)
    torch.save(torch.load(path, weights_only=True) | {"config": cfg, "step": STEP}, path)
    write_records(folder / "run", cfg)
    return folder


def write_records(folder, cfg):
    (folder / "run.json").write_text(json.dumps({
        "config": cfg, "command": ["scripts/train.py", "--cfg", "a b.yaml", "train.seed=3"], "commit": "0123abc+",
        "date": "2026-11-28T10:00:00+00:00", "versions": {"python": "3.11", "torch": "2.9"}, "init": {},
        "teachers": {"gone.pth": "f" * 64}}))
    lines = [{"epoch": 0, "step": 3, "AP": 0.1, "AP50": 0.2}, {"epoch": 1, "step": STEP, "AP": 0.3456, "AP50": 0.5,
                                                              "AP75": None}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def convert(monkeypatch, capsys, *arguments):
    """Exit code, lines of stdout and of stderr."""
    code = run_script(monkeypatch, "convert.py", *arguments)
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err.splitlines()


@pytest.fixture
def shipped(place, tmp_path, monkeypatch, capsys):
    out = tmp_path / "hub" / "student.safetensors"
    code, lines, errors = convert(monkeypatch, capsys, "--checkpoint", place / "run" / "last.pth", "--to",
                                  "safetensors", "--out", out)
    assert code == 0 and not errors and len(lines) == 2 and lines[1] == f"wrote {out.parent / 'model_card.md'}"
    assert {path.name for path in out.parent.iterdir()} == {"student.safetensors", "model_card.md"}
    return out


def rows_of(page):
    return dict(map(str.strip, line.strip("| ").split(" | ", 1)) for line in Path(page).read_text().splitlines()
                if line.startswith("| "))


def test_the_page(shipped):
    page = shipped.parent / "model_card.md"
    rows, text = rows_of(page), page.read_text()
    weights = open_checkpoint(shipped)[1].weights
    assert rows["detector"] == "GFLHead, FPN, ResNet (depth 18, base_channels 8)"
    count = sum(parameter.numel() for parameter in load_detector(shipped).detector.parameters())
    assert rows["parameters"] == f"{count:,}" and len(weights) > 100
    assert rows["file"] == f"student.safetensors, {shipped.stat().st_size / 2 ** 20:.1f} MiB, float32"
    assert rows["6 classes"] == ", ".join(CLASSES) and rows["image size"] == "scaled to fit 64 x 64"
    assert rows["AP"] == "34.6 on the evaluation data after 2 epochs (AP50 50.0)"
    assert rows["training data"].endswith("train.json (1 image)")
    assert rows["evaluation data"].endswith("val.json (3 images)")
    assert rows["licence of the data"] == "CC BY 4.0, https://example.org/l"
    assert rows["teacher"] == f"teacher.yaml, gone.pth (SHA-256 {'f' * 64})" and rows["methods"] == "FGD+PKD"
    assert rows["training"] == "epochs 2, seed 3" and rows["commit"] == "0123abc+"
    assert rows["command"] == "`python scripts/train.py --cfg 'a b.yaml' train.seed=3`"
    assert rows["versions"] == "python 3.11, torch 2.9" and "not known" not in str(rows.values())
    block = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert block["model"]["head"]["num_classes"] == 6 and block["distill"]["methods"] == [{"type": "FGD"},
                                                                                         {"type": "PKD"}]
    assert "load_detector('student.safetensors')" in text


def test_it_goes_wherever_a_checkpoint_goes(place, shipped, tmp_path, monkeypatch, capsys):
    """--checkpoint without --cfg, as teacher, as backbone.weights and train.init: the same as the .pth file."""
    found = []
    for checkpoint in (place / "run" / "last.pth", shipped):
        assert run_script(monkeypatch, "eval.py", "--checkpoint", checkpoint, "--out", tmp_path / "a.json", "--device",
                          "cpu") == 0
        found.append(json.loads((tmp_path / "a.json").read_text()))
    assert found[0] == found[1] and found[0]["AP"] is not None
    detect = load_detector(shipped)
    assert detect.classes == CLASSES
    state = detect.detector.state_dict()
    model = load_config(write_config(tmp_path / "a.yaml", {"model": torch.load(
        place / "run" / "last.pth", weights_only=True)["config"]["model"]}))["model"]
    distiller = build_distiller({"model": model, "distill": {
        "teacher": {"model": model, "checkpoint": str(shipped)}, "methods": [{"type": "PKD"}]}})
    assert all(torch.equal(value, state[name]) for name, value in distiller.teacher.state_dict().items())
    report = load_backbone_weights(distiller.student.backbone, str(shipped))
    assert report.matched == report.total
    cfg = config_with(config(place / "scenes", epochs=1), train={"init": str(shipped), "epochs": 1})
    arguments = ["train.py", "--cfg", write_config(tmp_path / "b.yaml", cfg), "--device", "cpu"]
    assert run_script(monkeypatch, *arguments, "--work-dir", tmp_path / "new", "--check") == 0
    capsys.readouterr()
    assert run_script(monkeypatch, *arguments, "--work-dir", tmp_path / "new", "--resume-from", shipped) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "holds only weights, as every .safetensors file" in error[0]


def test_records_of_another_checkpoint_are_not_used(place, tmp_path, monkeypatch, capsys):
    """Another configuration, no evaluation at this step, damaged records, none: nothing is invented."""
    content = torch.load(place / "run" / "last.pth", weights_only=True)
    cases = {"config": ("is of another configuration than", UNKNOWN_RUN), "step": (None, {"AP"}),
             "damaged": ("run.json cannot be read", UNKNOWN_RUN), "none": (None, UNKNOWN_RUN)}
    for name, (warning, unknown) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        torch.save(content | ({"step": 4} if name == "step" else {}), folder / "last.pth")
        other = content["config"] | {"train": {"epochs": 7}} if name == "config" else content["config"]
        if name != "none":
            write_records(folder, other)
        if name == "damaged":
            (folder / "run.json").write_text("{")
        code, lines, _ = convert(monkeypatch, capsys, "--checkpoint", folder / "last.pth", "--to", "safetensors",
                                 "--out", folder / "out.safetensors")
        assert code == 0 and len(lines) == 2 + (warning is not None) and (warning or "") in lines[0]
        rows = rows_of(folder / "model_card.md")
        assert {key for key, value in rows.items() if value == "not known"} == unknown, name
        assert rows["methods"] == "FGD+PKD"


UNKNOWN_RUN = {"AP", "command", "commit", "date", "versions"}


def test_a_checkpoint_of_others(place, tmp_path, monkeypatch, capsys):
    """It holds no configuration: the page says so, and --cfg gives one, if it fits."""
    content = torch.load(place / "run" / "last.pth", weights_only=True)
    source, out = tmp_path / "mmdet.pth", tmp_path / "out.safetensors"
    meta = {"CLASSES": tuple(CLASSES), "config": "model = dict()"}  # mmdet's is a text
    torch.save({"meta": meta, "state_dict": content["model"]}, source)
    base = ["--checkpoint", source, "--to", "safetensors", "--out", out]
    code, lines, _ = convert(monkeypatch, capsys, *base)
    assert code == 0 and len(lines) == 3 and "holds no configuration" in lines[0] and "--cfg" in lines[0]
    rows = rows_of(tmp_path / "model_card.md")
    known = {"entry", "---", "parameters", "file", "6 classes"}
    assert {key for key, value in rows.items() if value != "not known"} == known
    cfg = write_config(tmp_path / "cfg.yaml", {"model": content["config"]["model"], "train": {"epochs": 9}})
    code, lines, _ = convert(monkeypatch, capsys, "--cfg", cfg, *base)
    assert code == 0 and len(lines) == 2 and load_detector(out).classes == CLASSES
    rows = rows_of(tmp_path / "model_card.md")
    # A configuration that the user gives says what it is, and not how others trained it.
    assert {key for key, value in rows.items() if value != "not known"} == known | {"detector"}
    code, _, errors = convert(monkeypatch, capsys, "--cfg", cfg, *base, "model.head.stacked_convs=2")
    assert code == 2 and len(errors) == 1 and "the configuration is not the one of" in errors[0]


def test_a_published_checkpoint(place, tmp_path, monkeypatch, capsys):
    """Its configuration goes into the file, and COCO's names; not if a map selects its classes."""
    model = torch.load(place / "run" / "last.pth", weights_only=True)["config"]["model"]
    cfg = write_config(tmp_path / "cfg.yaml", {"model": model})
    mapped = write_config(tmp_path / "mapped.yaml", {"model": model, "eval": {"class_map": [0, 1]}})
    bare = tmp_path / "bare.pth"
    torch.save({key: value for key, value in torch.load(place / "run" / "last.pth", weights_only=True).items()
                if key != "config"}, bare)
    monkeypatch.setattr(sources, "_download", lambda url: str(bare))
    for name, path in (("mine", cfg), ("mapped", mapped)):
        monkeypatch.setitem(ZOO, name, Published("https://example.org/a.pth", str(path), 1.0))
        out = tmp_path / f"{name}.safetensors"
        assert convert(monkeypatch, capsys, "--checkpoint", f"zoo:{name}", "--to", "safetensors", "--out", out)[0] == 0
        rows = rows_of(tmp_path / "model_card.md")
        assert rows["AP"] == "1.0 on COCO val2017, as its authors publish it"
        assert rows["command"] == rows["training"] == rows["teacher"] == "not known"
    assert open_checkpoint(tmp_path / "mine.safetensors")[1].config == {"model": model}
    assert open_checkpoint(tmp_path / "mapped.safetensors")[1].config is None


def test_bad_usage(place, tmp_path, monkeypatch, capsys):
    source, out = place / "run" / "last.pth", tmp_path / "out"
    cfg = write_config(tmp_path / "cfg.yaml", {"model": {}})
    old = tmp_path / "old.pth"
    torch.save(torch.load(source, weights_only=True) | {"config": {"model": {"backbone": {"type": "VGG"}}}}, old)
    for arguments, part in (
            (["--checkpoint", source, "--to", "safetensors", "a=1"], "a=1: settings replace those of --cfg"),
            (["--checkpoint", source, "--to", "mmdet", "--cfg", cfg], "--cfg has no effect with --to mmdet"),
            (["--checkpoint", source, "--to", "detectron2"], "only a RetinaNet can be converted to detectron2"),
            (["--checkpoint", tmp_path / "no.safetensors", "--to", "mmdet"], "no such checkpoint file"),
            (["--checkpoint", old, "--to", "safetensors"], "cannot be used, model.")):
        code, _, errors = convert(monkeypatch, capsys, *arguments, "--out", out)
        assert code == 2 and len(errors) == 1 and part in errors[0], errors
        assert not out.exists()
    right = write_config(tmp_path / "right.yaml", {"model": torch.load(source, weights_only=True)["config"]["model"]})
    arguments = ["--checkpoint", old, "--to", "safetensors", "--cfg", right, "--out", out]
    assert convert(monkeypatch, capsys, *arguments)[0] == 0
