"""Whatever a configuration, an annotation file or another file holds, a script succeeds or ends with one line.

A short run is the same every time; `make soak` tries new cases for about a minute.
"""
import contextlib
import copy
import io
import json
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import ROOT, config, model, write_checkpoint, write_config

from data import generate_scenes
from kd.config import Config
from kd.config.hints import with_defaults

HEADS = ("GFLHead", "RetinaHead", "ATSSHead", "FCOSHead")
COSTLY = {"epochs", "workers", "compile", "loggers", "tensorboard", "cfg", "weights"}  # keys that are not changed
FEW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
SHORT = settings(max_examples=8, derandomize=True, deadline=None, database=None, suppress_health_check=FEW)
LONG = settings(max_examples=80, deadline=None, database=None, suppress_health_check=FEW)
lengths = pytest.mark.parametrize("length", [SHORT, pytest.param(LONG, marks=pytest.mark.soak)], ids=["short", "long"])

numbers = st.sampled_from([0, 1, -1, 2, 3, 100, 10**6, 2**63, 10**400]) | st.floats(width=32)
plain = st.none() | st.booleans() | numbers | st.sampled_from(["", "x", "BN", "é\n", "x" * 3000, *HEADS])
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.just("type"), inner),
                      max_leaves=6)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with scenes, the configuration of a detector, a checkpoint, and a run."""
    root = tmp_path_factory.mktemp("fuzz")
    scenes = generate_scenes(root / "scenes", train=4, val=2, size=(48, 64))
    cfg = config(scenes, epochs=1)
    cfg["data"]["scale"] = [64, 48]
    write_config(root / "cfg.yaml", cfg)
    write_checkpoint(root / "model.pth", cfg)
    assert run("train.py", "--cfg", root / "cfg.yaml", "--work-dir", root / "run", "--device", "cpu") == 0
    return root


def run(name: str, *arguments: object) -> int:
    """Run a script in this process; fails unless it succeeds, or ends with one line that is an error. The exit code."""
    output, errors = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
    lines = [line for line in errors.getvalue().splitlines() if "is left out: " not in line]  # compare.py's notes
    assert not [each for each in warned if issubclass(each.category, (UserWarning, RuntimeWarning))]
    assert end.value.code in (0, 1, 2)
    assert not lines if end.value.code == 0 else len(lines) == 1 and lines[0].startswith("error: "), lines
    return end.value.code


def places(tree: object, prefix: tuple = ()) -> list[tuple]:
    """The path to everything in a tree of mappings and lists, except for costly keys."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = [(prefix + (key,), value) for key, value in entries if key not in COSTLY]
    return [path for at, value in found for path in (at, *places(value, at))]


def changed(draw: st.DrawFn, tree: dict | list) -> dict | list:
    """A copy with one or two entries that are removed, replaced, renamed, or repeated elsewhere."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(places(tree)))
        node = tree
        for key in path[:-1]:
            node = node[key]
        last = path[-1]
        how = draw(st.sampled_from(["value", "value", "near", "remove", "rename", "wrap"]))
        if how in ("value", "near"):
            near = how == "near" and isinstance(node[last], (int, float)) and not isinstance(node[last], bool)
            node[last] = draw(st.sampled_from([1, -1, 2 * node[last], node[last] + 1])) if near else draw(values)
        elif how == "remove":
            del node[last]
        elif how == "rename" and isinstance(node, dict):
            node[draw(st.sampled_from(["x", "é\ny", ""]))] = node.pop(last)
        elif how == "wrap":
            node[last] = [node[last], node[last]]
    return tree


@st.composite
def configurations(draw, scenes: Path) -> dict:
    """A configuration with a student and a teacher, all keys written out, some of them changed."""
    head = draw(st.sampled_from(HEADS))
    method = draw(st.sampled_from(["CrossKD", "Mimic", "LD", "KD", "DKD", "FGD", "PKD", "MGD", "CWD", "FitNet", "PGD",
                                   "FRS", "BCKD", "GI"]))
    cfg = config(scenes, 1, {"teacher": {"model": model(head=head), "checkpoint": None},
                             "methods": [{"type": method}]}, head)
    cfg["data"]["scale"] = [64, 48]
    if method == "CrossKD":
        cfg["distill"]["methods"][0]["reused_teacher_head_idx"] = 1
    return changed(draw, json.loads(json.dumps(with_defaults(Config, cfg))))


@lengths
def test_configurations(place, length):
    @length
    @given(configurations(place / "scenes"), st.sampled_from(["train", "summary", "eval"]))
    def try_one(cfg, script):
        path = place / "changed.yaml"
        path.write_text(yaml.safe_dump(cfg, allow_unicode=True), encoding="utf-8")
        more = {"train": ["--check", "--device", "cpu"], "summary": [],
                "eval": ["--checkpoint", place / "model.pth", "--device", "cpu"]}[script]
        run(f"{script}.py", "--cfg", path, *more)

    try_one()


@lengths
def test_annotations(place, length):
    file = place / "scenes" / "annotations" / "val.json"
    content = json.loads(file.read_text())

    @length
    @given(st.data(), st.sampled_from(["check_data", "train", "eval"]))
    def try_one(data, script):
        (place / "val.json").write_text(json.dumps(changed(data.draw, content)))
        more = {"check_data": [], "train": ["--check", "--device", "cpu"],
                "eval": ["--checkpoint", place / "model.pth", "--device", "cpu"]}[script]
        run(f"{script}.py", "--cfg", place / "cfg.yaml", f"data.val.annotations={place / 'val.json'}", *more)

    try_one()


@lengths
def test_damaged_files(place, length):
    """The files of a run and a picture, with other bytes, cut off, or with other entries."""
    picture = next((place / "scenes" / "val").iterdir())
    originals = {path: path.read_bytes() for path in [place / "model.pth", picture, *(
        place / "run" / name for name in ("last.pth", "metrics.jsonl", "run.json"))]}

    @length
    @given(st.data(), st.sampled_from(list(originals)))
    def try_one(data, path):
        content, again = bytearray(originals[path]), place / "again"
        if path.suffix == ".pth" and data.draw(st.booleans()):
            state = torch.load(path, weights_only=True)
            state[data.draw(st.sampled_from(list(state)))] = data.draw(values)
            torch.save(state, path)
        elif path.suffix == ".json" and data.draw(st.booleans()):
            path.write_text(json.dumps(changed(data.draw, json.loads(content))))
        else:
            for _ in range(data.draw(st.integers(0, 3))):
                content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
            path.write_bytes(content[:data.draw(st.integers(0, len(content)) | st.just(len(content)))])
        try:
            run("eval.py", "--cfg", place / "cfg.yaml", "--checkpoint", place / "model.pth", "--device", "cpu")
            shutil.rmtree(again, ignore_errors=True)
            run("train.py", "--cfg", place / "cfg.yaml", "--work-dir", again, "--device", "cpu", "--resume-from",
                place / "run" / "last.pth", "train.epochs=2")
            run("compare.py", place / "run")
        finally:
            path.write_bytes(originals[path])

    try_one()
