"""generate_data.py, demo.py, and the help of every script."""
import json

import pytest
from runs import ROOT, run_script
from torchvision.io import decode_image, read_file


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
    picture = decode_image(read_file(str(tmp_path / "detections.png")))
    assert picture.shape[0] == 3 and picture.float().std() > 10


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.py")))
def test_help_shows_an_example(script, monkeypatch, capsys):
    assert run_script(monkeypatch, script, "--help") == 0
    assert f"example: python scripts/{script}" in " ".join(capsys.readouterr().out.split())
