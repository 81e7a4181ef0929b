"""Short names of published checkpoints: what they stand for, and that pages and configurations use them."""
import re

import pytest
import torch
from runs import CONFIGS, ROOT, run_script

from kd.config import load_config
from models.checkpoints import sources
from models.checkpoints.sources import check_file, is_address, local_path
from models.checkpoints.zoo import ZOO, Published, checksum, published_config, zoo_table
from models.weights import CheckpointError, load_weights

PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.yaml")]


def test_a_name_stands_for_an_address(monkeypatch):
    monkeypatch.setattr(sources, "_download", lambda url: f"file of {url}")
    for name, entry in ZOO.items():
        assert local_path(f"zoo:{name}") == f"file of {entry.url}" and is_address(f"zoo:{name}")
        check_file(f"zoo:{name}")
    assert not is_address("zoo/a.pth") and not is_address("C:/a.pth")


def test_weights_come_through_a_name(tmp_path, monkeypatch):
    """As any download does: see test_sources.py."""
    source, model = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    monkeypatch.setitem(ZOO, "mine", Published("https://weights.invalid/a.pth", "none.yaml", 1.0))
    monkeypatch.setattr(sources, "_download", lambda url: tmp_path / url.rpartition("/")[2])
    assert load_weights(model, "zoo:mine").source == "zoo:mine" and torch.equal(model.weight, source.weight)
    (tmp_path / "a.pth").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="it was downloaded from zoo:mine: delete the file"):
        load_weights(model, "zoo:mine")


@pytest.mark.parametrize("name, advice", [("gfl_r101", "did you mean zoo:gfl_r101_2x?"),
                                          ("GFL_R50_1X", "did you mean zoo:gfl_r50_1x?"),
                                          ("yolo", f"known: {', '.join(f'zoo:{name}' for name in ZOO)}")])
def test_unknown_names(name, advice):
    for call in (check_file, local_path, published_config):
        with pytest.raises(CheckpointError, match=re.escape(f"checkpoint is called zoo:{name}; {advice}")):
            call(f"zoo:{name}")


def test_the_entries():
    assert [checksum(entry.url) for entry in ZOO.values()] == [
        "dfcadd6f", "511424d6", "ede514a8", "25944287", "dd12f847", "936edec3", "6829f96b", "83250d22", "c2398f9e",
        "5560aee8", "366f5af1", None, "eeacb38b"]
    for name, entry in ZOO.items():
        assert entry.url.startswith("https://") and 30 < entry.ap < 60
        head = load_config(published_config(f"zoo:{name}")).model.head
        kind = name.removeprefix("detectron2_").removeprefix("torchvision_")[:3]
        assert head["type"].lower().startswith({"paa": "atss"}.get(kind, kind))
        assert head.get("quality", "centerness") == ("iou" if kind == "paa" else "centerness")
        assert head["num_classes"] == (91 if name.startswith("torchvision") else 80)


def test_pages_and_configurations_use_the_names():
    """No address of a checkpoint hides in them, and every name is known."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"https?://\S+\.(?:pth|pkl)\b", text), path
        assert set(re.findall(r"\bzoo:(\w+)", text)) <= {*ZOO, "NAME"}, path
    teachers = {(teacher.checkpoint, teacher.cfg) for path in CONFIGS for teacher in load_config(path).teachers
                if is_address(teacher.checkpoint)}
    assert teachers == {(f"zoo:{name}", entry.cfg) for name, entry in ZOO.items()
                        if not name.startswith(("detectron2", "paa"))}


def test_the_table(monkeypatch, capsys):
    page = (ROOT / "docs" / "teachers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(zoo:\w+)` \| ([\d.]+) \| `([\w/.]+)` \|$", page, re.M)
    assert [list(row) for row in rows] == [row[:3] for row in zoo_table()[1]]
    assert run_script(monkeypatch, "summary.py", "--zoo") == 0
    printed = capsys.readouterr().out
    assert all(word in printed for row in zoo_table()[1] for word in row)
