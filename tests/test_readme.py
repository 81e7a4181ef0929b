"""What the README shows, and the pages that go on from it, runs as it stands there."""
import re

import pytest
import torch
from commands import commands, make_workspace, run_command
from runs import ROOT
from small_models import make_batch, small_config

import kd
from data.errors import counted
from kd import Method, build_distiller
from kd.config import load_config
from models import build_detector

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
RUN = [README, *(PAGES[f"{name}.md"] for name in ("commands", "shipping", "training", "speed"))]  # in one workspace


def python_block(page: str, containing: str) -> str:
    return next(block for block in re.findall(r"```python\n(.*?)```", PAGES[page], re.S) if containing in block)


def test_the_short_method(monkeypatch):
    scope = {"Method": Method}
    exec(python_block("methods.md", "(Method)"), scope)  # noqa: S102 our own page
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


def test_the_python_page(tmp_path):
    """With an untrained teacher, and a file in the place of a run's."""
    code = python_block("python.md", "load_config").replace('num_classes=3"]', 'num_classes=3", NO_CHECKPOINT]')
    assert "NO_CHECKPOINT" in code and '"runs/' in code
    student = load_config("configs/bccd/student_gfl_r18w16.yaml", ["model.head.num_classes=3"])["model"]
    torch.save(build_detector(student).state_dict(), tmp_path / "last.pth")
    images, targets = make_batch(dtype=torch.float32)
    scope = {"images": images, "targets": targets, "NO_CHECKPOINT": "distill.teacher.checkpoint=null"}
    exec(re.sub(r'"runs/\S+"', repr(str(tmp_path / "last.pth")), code), scope)  # noqa: S102 our own page
    assert {"loss_cls", "loss_cls_kd", "loss_reg_kd"} <= set(scope["losses"])
    assert len(scope["detections"]) == len(targets) and set(scope["detections"][0]) == {"boxes", "scores", "labels"}
    keys = set(re.findall(r"^\| `(\w+)` \|", PAGES["python.md"], re.M))
    assert keys == {*targets[0], "pad_size", "ignored_boxes", "unlabelled"}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_what_the_readme_links_to_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links), links


def test_configurations_named_in_the_readme_exist():
    assert all((ROOT / name).exists() for name in re.findall(r"configs/[\w/]+\.yaml", README))


@pytest.fixture(scope="module")
def lines():
    return [line for page in RUN for line in commands(page)]


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
    assert {"teacher_gfl_r18w32", "crosskd_r50_gfl_r101_1x", "crosskd_own_teacher", "crosskd_new_teacher"} <= runs


def test_every_script_is_shown(lines):
    """In a command that is run, and in the table of scripts."""
    scripts = {path.name for path in (ROOT / "scripts").glob("*.py")}
    run = {word.removeprefix("scripts/") for line in lines for word in line.split() if word.startswith("scripts/")}
    assert scripts - run == {"demo.py", "generate_data.py", "write_reference.py"}  # make demo's, and for developers
    rows = [row.split("|")[1] for row in PAGES["commands.md"].splitlines() if row.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+\.py)`", row)} == scripts


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_no_command_hides_in_a_sentence(page):
    """Commands with a configuration of their own stand in blocks, where they are run."""
    sentences = re.sub(r"^```.*?^```", "", README if page == "README.md" else PAGES[page], flags=re.S | re.M)
    assert not re.findall(r"`python scripts/[^`]*--cfg configs[^`]*`", sentences)


def test_troubleshooting_quotes_what_the_code_says():
    quotes = [quote for row in PAGES["troubleshooting.md"].splitlines() if row.startswith("| `")
              for quote in re.findall(r"`([^`-][^`]+)`", row.split("|")[1])]
    source = "".join(path.read_text(encoding="utf-8") for folder in ("kd", "data", "models")
                     for path in sorted((ROOT / folder).rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    source = re.sub(r"\{counted\([^{}]*?'(\w+)'\)\}", lambda match: counted(2, match[1]), source)
    source = re.sub(r"\{[^{}]*\}", "#", source)
    assert len(quotes) > 8
    for quote in quotes:
        parts = [part.strip(" ,") for part in re.split(r"\.\.\.|\d[\d.]*|loss_cls is nan|: is |^onnx", quote)]
        parts = [part for part in parts if len(part) > 3]
        assert parts and all(part in source for part in parts), quote
