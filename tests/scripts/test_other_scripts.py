"""generate_data.py, demo.py, and the help of every script."""
import json
import os
import subprocess
import sys

import pytest
import torch
from runs import ROOT, run_script

from data.images import read_image


def test_generate_data(tmp_path, monkeypatch, capsys):
    out = tmp_path / "scenes"
    assert run_script(monkeypatch, "generate_data.py", "--out", out, "--train", 2, "--val", 1, "--size", 64, 64) == 0
    assert "2 training and 1 validation images" in capsys.readouterr().out
    assert len(json.loads((out / "annotations" / "train.json").read_text())["images"]) == 2
    assert len(list((out / "val").glob("*.jpg"))) == 1


def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = ["--work-dir", tmp_path, "--device", "cpu", "--images", 8, "train.epochs=1", "data.batch_size=4",
                 "data.workers=0"]
    for _ in range(2):  # the second replaces the first
        assert run_script(monkeypatch, "demo.py", *arguments) == 0
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert rows == ["teacher", "student alone", "student with CrossKD"]
    picture = read_image(tmp_path / "detections.png")
    assert picture.shape[0] == 3 and picture.float().std() > 10


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.py")))
def test_help_shows_an_example(script, monkeypatch, capsys):
    assert run_script(monkeypatch, script, "--help") == 0
    assert f"example: python scripts/{script}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("error, reason", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nlong story"), "Tried to allocate 2 GiB."),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                  "to allocate 9 bytes.\nlong story"), "memory: you tried to allocate 9 bytes."),
    (MemoryError(), "out of memory: this machine has too little.")], ids=["cuda", "cpu", "python"])
def test_out_of_memory_is_one_line(monkeypatch, capsys, error, reason):
    def allocate(*arguments):
        raise error
    monkeypatch.setattr("kd.engine.train.train", allocate)
    monkeypatch.chdir(ROOT)
    assert run_script(monkeypatch, "train.py", "--cfg", "configs/bccd/student_gfl_r18w16.yaml", "--work-dir",
                      "runs/none", "--device", "cpu") == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and f"{reason} Lower data.batch_size" in error[0]


EXTRAS = ("matplotlib", "tensorboard", "wandb", "mlflow", "onnx", "onnxruntime", "av", "faster_coco_eval",
          "safetensors")


def test_the_core_does_without_the_extras():
    """No module and no script imports an optional package before it is needed."""
    code = f"""
import importlib, pathlib, runpy, sys
for name in {EXTRAS!r}:
    sys.modules[name] = None
for folder in ("kd", "models", "losses", "data"):
    for path in pathlib.Path(folder).rglob("*.py"):
        parts = path.with_suffix("").parts
        importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
for path in sorted(pathlib.Path("scripts").glob("*.py")):
    runpy.run_path(str(path))
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout.strip().endswith("done"), done.stderr
