"""What the README shows runs as it stands there."""
import re

import pytest
import torch
from commands import commands, make_workspace, run_command
from runs import ROOT
from small_models import make_batch, small_config

import kd
from kd import Method, build_distiller
from kd.config import load_config
from models import build_detector

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_method_of_the_readme(monkeypatch):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "(Method)" in block)
    scope = {"Method": Method}
    exec(code, scope)  # noqa: S102 our own README
    monkeypatch.setitem(kd.METHODS, "LogitMSE", scope["LogitMSE"])
    torch.manual_seed(0)
    cfg = {"model": small_config(), "distill": {"teacher": {"model": small_config(), "checkpoint": None},
                                                "methods": [{"type": "LogitMSE", "loss_weight": 2}]}}
    distiller = build_distiller(cfg)
    losses = distiller.train().loss(*make_batch(dtype=torch.float32))
    assert losses["loss_cls_kd"] > 0
    losses["loss_cls_kd"].backward()
    cfg["distill"]["methods"][0]["loss_weight"] = "much"
    with pytest.raises(ValueError, match="methods.0.loss_weight: must be a number"):
        build_distiller(cfg)


def test_what_the_readme_links_to_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links), links


def test_configurations_named_in_the_readme_exist():
    assert all((ROOT / name).exists() for name in re.findall(r"configs/[\w/]+\.yaml", README))


@pytest.fixture(scope="module")
def lines():
    return commands(README)


def test_every_command(lines, tmp_path, monkeypatch, capsys):
    """One after another, as a newcomer would type them, on small data in the places that they name."""
    pytest.importorskip("onnxruntime", reason="the README exports")
    pytest.importorskip("matplotlib", reason="the README plots")
    workspace = make_workspace(tmp_path, monkeypatch)
    teacher = load_config("configs/gfl/gfl_r101_1x.yaml")["model"]
    (workspace / "work_dirs" / "gfl").mkdir(parents=True)
    torch.save(build_detector(teacher).state_dict(), workspace / "work_dirs" / "gfl" / "epoch_24.pth")
    for line in lines:
        run_command(line, monkeypatch)
    printed = capsys.readouterr().out
    assert len(list((workspace / "found").rglob("*.jpg"))) == 12 and (workspace / "student_mmdet.pth").is_file()
    assert {path.name for path in (workspace / "plots").iterdir()} >= {"losses.png", "ap.png", "precision_recall.png"}
    assert "wrote table.md\nwrote table.csv" in printed and "closed" in (workspace / "table.md").read_text()
    runs = {path.parent.name for path in (workspace / "runs").glob("*/last.pth")}
    assert {"teacher_gfl_r18w32", "crosskd_r50_gfl_r101_1x", "crosskd_own_teacher"} <= runs


def test_every_script_is_in_the_readme(lines):
    """What is not in a command that is run is in nobody's way."""
    shown = {word for line in lines for word in line.split() if word.startswith("scripts/")}
    shown |= {f"scripts/{name}" for name in re.findall(r"`(?:scripts/)?(\w+\.py)", README)}
    missing = {f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py")} - shown
    assert missing <= {"scripts/demo.py", "scripts/generate_data.py", "scripts/write_reference.py"}  # make demo's, ours


def test_no_command_hides_in_a_sentence():
    """Commands with a configuration of their own stand in blocks, where they are run."""
    sentences = re.sub(r"^```.*?^```", "", README, flags=re.S | re.M)
    assert not re.findall(r"`python scripts/[^`]*--cfg configs[^`]*`", sentences)


def test_troubleshooting_quotes_what_the_code_says():
    table = README.split("## Troubleshooting")[1].split("\n## ")[0]
    quotes = [quote for row in table.splitlines() if row.startswith("| `")
              for quote in re.findall(r"`([^`-][^`]+)`", row.split("|")[1])]
    source = "".join(path.read_text(encoding="utf-8") for folder in ("kd", "data", "models")
                     for path in sorted((ROOT / folder).rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    source = re.sub(r"\{[^{}]*\}", "#", source)
    assert len(quotes) > 8
    for quote in quotes:
        parts = [part.strip(" ,") for part in re.split(r"\.\.\.|\d[\d.]*|loss_cls is nan|: is |^onnx", quote)]
        parts = [part for part in parts if len(part) > 3]
        assert parts and all(part in source for part in parts), quote
