"""Where a run's figures come from."""
import pytest
from runs import ROOT

from kd.work_dir.provenance import command


@pytest.mark.parametrize("first, shown", [
    (str(ROOT / "scripts" / "train.py"), "scripts/train.py"), ("/elsewhere/own.py", "/elsewhere/own.py")])
def test_the_command_names_no_folder_of_one_machine(first, shown, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [first, "--cfg", "a.yaml"])
    assert command() == [shown, "--cfg", "a.yaml"]
