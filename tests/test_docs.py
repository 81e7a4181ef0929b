"""What the pages of docs/ show runs as it stands there, and what pages name exists."""
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import commands, make_workspace, run_command
from runs import ROOT, config, run_script, write_config
from small_models import falls, make_batch, small_config, small_distiller

import kd.build
import kd.engine.train
from data import generate_scenes
from data.coco.annotations import read_annotations
from kd.config.load import load_config, parse_yaml
from models import ModelConfig, build_detector
from models.build import read_section
from models.checkpoints import sources
from models.checkpoints.zoo import ZOO
from models.detector import BACKBONES, HEADS

PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
MAPS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "docs/README.md")]
LINKED = [*MAPS, ROOT / "RESULTS.md", *sorted((ROOT / "docs" / "results").glob("*.md")), ROOT / "configs" / "README.md",
          *(ROOT / "docs" / name for name in PAGES if name != "README.md")]
FOLDERS = ("kd", "models", "losses", "data", "scripts", "configs", "tests", "docs", "results")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.S | re.M)


def run(code: str, **scope) -> dict:
    exec(compile(code, "<page>", "exec"), scope)  # noqa: S102 our own page
    return scope


@pytest.fixture
def cosine(monkeypatch):
    method = run(blocks("new_method.md", "python")[0], __name__="kd.cosine")["Cosine"]
    monkeypatch.setitem(kd.METHODS, "Cosine", method)
    return method


def test_the_method_is_short():
    assert len(blocks("new_method.md", "python")[0].splitlines()) < 30


def test_the_method_learns_and_its_test_passes(cosine):
    run(blocks("new_method.md", "python")[2])["test_cosine"]()


def test_the_method_is_what_it_says(cosine):
    distiller = small_distiller({"type": "Cosine", "loss_weight": 3, "levels": [0, 2]})
    images, targets = make_batch()
    found = distiller(images, targets)
    student, teacher = (detector.extract_features(images) for detector in (distiller.student, distiller.teacher))
    expected = sum((1 - (student[i] * teacher[i]).sum(1) / student[i].norm(dim=1) / teacher[i].norm(dim=1)).mean()
                   for i in (0, 2))
    assert found["loss_cosine"].item() == pytest.approx(3 * expected.item())
    with pytest.raises(ValueError, match="methods.0.levels: must be a list"):
        small_distiller({"type": "Cosine", "levels": 1})


def test_the_method_from_the_command_line(cosine, tmp_path, monkeypatch, capsys):
    entry = parse_yaml(blocks("new_method.md", "yaml")[0], "page")["distill"]["methods"][0]
    scenes = generate_scenes(tmp_path / "scenes", train=4, val=2, size=(64, 64))
    teacher = config(scenes)["model"]
    path = write_config(tmp_path / "cfg.yaml", config(scenes, 1, {
        "teacher": {"model": teacher, "checkpoint": None}, "methods": [entry]}))
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--check", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "Cosine0 (Cosine) from teacher 0: times 0 now; loss_weight 0.5" in printed
    assert "student neck output 2 (4, 16, 2, 2) <- teacher neck output 2" in printed and "loss_cosine " in printed


def test_the_script_of_the_method_page(cosine, monkeypatch):
    called = []
    monkeypatch.setattr(kd.engine.train, "train", lambda *arguments: called.append(arguments))
    monkeypatch.chdir(ROOT)
    run(blocks("new_method.md", "python")[1], Cosine=cosine)
    (cfg, work_dir, device), = called
    assert cfg["distill"]["methods"] == [{"type": "Cosine", "loss_weight": 0.5}] and work_dir.name == "cosine"


def test_the_configurations_are_valid(cosine, tmp_path, monkeypatch):
    code = blocks("extending.md", "python")
    monkeypatch.setitem(BACKBONES, "PlainNet", run(code[0])["PlainNet"])
    others = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "configs/README.md")]
    others = [block for text in others for block in re.findall(r"^```yaml\n(.*?)^```", text, re.S | re.M)]
    assert len(others) == 2
    for i, text in enumerate(blocks("new_method.md", "yaml") + blocks("extending.md", "yaml") + others):
        text = text.replace("_base_: student", f"_base_: {ROOT}/configs/bccd/student")
        path = tmp_path / f"{i}.yaml"
        path.write_text(text.replace("../_base_", f"{ROOT}/configs/_base_"))
        load_config(path, [] if "head" in text or "_base_" in text else ["model.head.type=GFLHead"])


def test_the_annotations_are_valid(tmp_path):
    (tmp_path / "a.json").write_text(blocks("extending.md", "json")[0])
    read = read_annotations(tmp_path / "a.json")
    assert read.classes == ["cell"] and read.boxes[0].tolist() == [[12, 30, 212, 150]]


@pytest.mark.parametrize("kind, index, table", [("PlainNet", 0, BACKBONES), ("DistanceHead", 1, HEADS)])
def test_a_part_of_ones_own(monkeypatch, kind, index, table):
    """It trains, detects, and is distilled, as student and as teacher."""
    monkeypatch.setitem(table, kind, run(blocks("extending.md", "python")[index], __name__="models.own")[kind])
    model = small_config()
    if kind == "PlainNet":
        model["backbone"] = {"type": kind, "width": 4}
    else:
        model["head"] = {"type": kind, "num_classes": 3, "stacked_convs": 2, "feat_channels": 16,
                         "norm_cfg": {"type": "GN", "num_groups": 4}}
    torch.manual_seed(0)
    detector = build_detector(model)
    images, targets = make_batch(dtype=torch.float32)
    optimizer, history = torch.optim.Adam(detector.parameters(), lr=0.003), []
    for _ in range(60):
        loss = sum(detector.loss(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.7 * history[0]
    detector.eval()
    found = detector.predict(images, targets, rescale=False)
    assert len(found) == 2 and sum(len(each["boxes"]) for each in found)

    methods = [{"type": "CrossKD", "reused_teacher_head_idx": 1}, {"type": "FGD"}]
    distiller = kd.build_distiller({"model": model, "distill": {"teacher": {"model": model, "checkpoint": None},
                                                                "methods": methods}}).train()
    assert {"loss_cls_kd", "loss_reg_kd", "loss_fgd"} <= set(falls(distiller))


def test_bytes_and_efficiency_are_as_printed(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    run(blocks("scaling.md", "python")[0])
    assert capsys.readouterr().out == blocks("scaling.md", "text")[0]


def names_in(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(path: Path) -> set[str]:
    """The headings of a page, as GitHub makes anchors of them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_in(path: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")) if "://" not in link]


@pytest.mark.parametrize("path", LINKED, ids=names_in)
def test_links_lead_somewhere(path):
    for link in links_in(path):
        place, _, anchor = link.partition("#")
        target = path.parent / place if place else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def paths_in(text: str) -> Iterator[str]:
    """Words in backticks, outside of blocks, that name a file or folder of the project."""
    sentences = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    for word in (word for quoted in re.findall(r"`([^`]+)`", sentences) for word in quoted.split()):
        if word.split("/")[0] in FOLDERS and "/" in word or re.fullmatch(r"[\w.-]+\.(md|py|toml|cfg|cff)", word):
            yield word


@pytest.mark.parametrize("path", MAPS, ids=names_in)
def test_paths_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    named = set(paths_in(text)) | set(re.findall(r"(?<![\w/])(?:configs|scripts)/[\w/]+\.(?:yaml|py)", text))
    assert len(named) + len(links_in(path)) > 10
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_every_folder_has_its_line():
    """In CONTRIBUTING.md's map, which is of the code down to the last folder."""
    rows = re.findall(r"^\| `([\w/]+)/` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)
    packages = {init.parent.relative_to(ROOT).as_posix() for top in ("kd", "models", "losses", "data")
                for init in (ROOT / top).rglob("__init__.py")}
    assert packages | set(FOLDERS) <= set(rows)


def test_every_page_is_in_the_index():
    assert set(PAGES) - {"README.md"} <= set(links_in(ROOT / "docs" / "README.md"))


def test_files_that_are_named_exist():
    for name, text in PAGES.items():
        named = set(re.findall(r"(?<![\w/])(?:configs|scripts|models|kd|tests)/[\w/]+\.(?:yaml|py)", text))
        missing = {path for path in named if not (ROOT / path).exists()}
        assert missing <= {"kd/methods/cosine.py", "configs/bccd/cosine.yaml"}, (name, missing)


def test_the_commands_of_own_data(tmp_path, monkeypatch, capsys):
    """From labelled photographs to an exported student."""
    pytest.importorskip("onnxruntime", reason="the page exports")
    workspace = make_workspace(tmp_path, monkeypatch)
    for line in commands(PAGES["own_data.md"]):
        run_command(line, monkeypatch)
    assert load_config("photos/crosskd.yaml").distill.teacher.cfg == "photos/teacher.yaml"
    printed = capsys.readouterr().out
    assert "no problems" in printed and "teacher 0:" in printed and "CrossKD0 (CrossKD) from teacher 0" in printed
    table = [line.split()[:2] for line in printed.splitlines()]
    assert ["crosskd", "CrossKD"] in table and ["student", "-"] in table
    assert len(list((workspace / "found").rglob("*.jpg"))) == len(list((workspace / "photos/images").iterdir())) == 12
    assert (workspace / "student.onnx").is_file() and list((workspace / "pictures").glob("*_detections.png"))


def test_the_configurations_without_a_gpu_stand_in_for_the_others(tmp_path, monkeypatch, capsys):
    """As the page says: other names in the three lines that write configurations, and the same commands."""
    workspace = make_workspace(tmp_path, monkeypatch)
    lines = [re.sub(r"(configs/own_data/\w+)\.yaml", r"\1_cpu.yaml", line) for line in commands(PAGES["own_data.md"])]
    assert sum("_cpu.yaml" in line for line in lines) == 3
    for line in lines[:next(i for i, line in enumerate(lines) if "compare.py" in line)]:
        run_command(line, monkeypatch)
    assert load_config("photos/crosskd.yaml").model.backbone["base_channels"] == 16
    assert "detectors usually need some thousands" in capsys.readouterr().out
    assert (workspace / "runs" / "crosskd" / "last.pth").is_file()


def test_own_data_outside_of_the_checkout(tmp_path, tmp_path_factory, monkeypatch, capsys):
    """The page says to write another path instead of `photos`, and that the folder can be moved."""
    outside = tmp_path_factory.mktemp("somewhere") / "pictures"
    workspace = make_workspace(tmp_path, monkeypatch)
    (workspace / "photos").rename(outside)
    lines = [re.sub(r"\bphotos\b", str(outside), line) for line in commands(PAGES["own_data.md"])]
    prepared, checked = (next(i for i, line in enumerate(lines) if word in line) for word in ("check_data", "--check"))
    for line in lines[:prepared]:
        run_command(line, monkeypatch)
    moved = outside.rename(outside.with_name("moved"))
    for line in lines[prepared:checked]:
        run_command(line.replace(str(outside), str(moved)), monkeypatch)
    assert "no problems" in capsys.readouterr().out
    assert load_config(moved / "student.yaml").data.val.annotations == str(moved / "coco" / "val.json")
    assert (workspace / "runs" / "teacher" / "last.pth").is_file()


def test_the_commands_of_fine_tuning(tmp_path, monkeypatch, capsys):
    """Published checkpoints are narrow here, too, and trained on nothing."""
    workspace = make_workspace(tmp_path, monkeypatch)
    for entry in ZOO.values():
        if "/gfl" in entry.cfg:
            weights = build_detector(load_config(workspace / entry.cfg).model).state_dict()
            torch.save({"state_dict": weights, "meta": {}}, workspace / entry.url.rpartition("/")[2])
    monkeypatch.setattr(sources, "_download", lambda url: str(workspace / url.rpartition("/")[2]))
    own_data = [line for line in commands(PAGES["own_data.md"]) if "prepare_data" in line or "> photos/teacher" in line]
    for line in own_data + commands(PAGES["fine_tuning.md"]):
        run_command(line, monkeypatch)
    printed = capsys.readouterr().out
    assert "starts from mmdet2 checkpoint zoo:gfl_r50_1x" in printed
    assert "classes found among COCO's names: none; new classes: 3 (disc, ring, star)" in printed
    assert "starts from densekd checkpoint runs/first/last.pth" in printed
    assert "the checkpoint's names: 80 (class 1, " in printed and "new classes: none" in printed
    assert len(list((workspace / "found").rglob("*.jpg"))) == 12


@pytest.mark.parametrize("page", ["teachers.md", "new_method.md"])
def test_commands_name_what_there_is(page):
    """Those that need checkpoints or methods of one's own: their options and keys are valid, and nothing is run."""
    lines = [line for line in commands(PAGES[page]) if line.startswith("python scripts/")]
    assert lines
    for line in lines:
        words = shlex.split(line)
        source = "".join((ROOT / path).read_text(encoding="utf-8") for path in (words[1], "kd/cli.py"))
        assert all(f'"{word}"' in source for word in words if word.startswith("--")), line
        for i, word in enumerate(words):
            if word == "--cfg" and words[i + 1] != "configs/bccd/cosine.yaml":
                load_config(ROOT / words[i + 1], [other for other in words if "=" in other])


def test_a_teacher_with_more_classes(monkeypatch):
    section = parse_yaml(blocks("teachers.md", "yaml")[0], "page")["distill"]
    model = small_config(head={"num_classes": 2})
    section["teacher"]["checkpoint"] = None
    section["methods"] = [{"type": "Mimic"}]
    monkeypatch.setattr(kd.build, "teacher_model", lambda entry: read_section(ModelConfig, small_config(
        head={"num_classes": load_config(ROOT / entry.cfg).model.head["num_classes"]}), "model"))
    distiller = kd.build_distiller({"model": model, "distill": section})
    assert distiller.teacher.bbox_head.num_classes == 2


def test_a_network_of_ones_own_teaches(tmp_path, monkeypatch):
    (tmp_path / "my_teacher.py").write_text(blocks("teachers.md", "python")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_teacher", raising=False)  # another test's
    several, published, own = (parse_yaml(block, "page")["distill"] for block in blocks("teachers.md", "yaml")[1:])
    assert several["teacher"] == load_config(ROOT / "configs/demo/crosskd_specialists.yaml")["distill"]["teacher"]
    assert published["teacher"]["checkpoint"] == "DEFAULT"
    torch.save(run((tmp_path / "my_teacher.py").read_text())["build"](64).state_dict(), tmp_path / "my_teacher.pth")
    distiller = kd.build_distiller({"model": small_config(), "distill": own}).train()
    assert distiller.teacher.strides == [8, 16, 32, 64] and distiller.loss(*make_batch(dtype=torch.float32))["loss_fgd"]
