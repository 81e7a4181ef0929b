"""Which checkpoint of a work dir a run goes on from, and what the user hears about damaged ones."""
import os

import pytest
import torch

from kd.work_dir.checkpoint import newest_checkpoint, save_checkpoint, write_whole
from models.weights import CheckpointError


@pytest.fixture
def work_dir(tmp_path):
    """Two checkpoints, last.pth newer than last.1.pth, and a newer file of another kind."""
    for step in (1, 2):
        save_checkpoint(tmp_path / "last.pth", {"step": step}, keep=2)
    write_whole(tmp_path / "replay.pth", {"format": "densekd-replay", "step": 2})
    for age, name in enumerate(("replay.pth", "last.pth", "last.1.pth")):
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    return tmp_path


def cut(path):
    time = path.stat().st_mtime
    path.write_bytes(path.read_bytes()[:-100])
    os.utime(path, (time, time))


def test_the_newest_checkpoint(work_dir, caplog):
    assert newest_checkpoint(work_dir) == work_dir / "last.pth" and not caplog.messages
    assert torch.load(work_dir / "last.1.pth")["step"] == 1


def test_a_damaged_one_is_named_and_the_one_before_it_used(work_dir, caplog):
    cut(work_dir / "last.pth")
    assert newest_checkpoint(work_dir) == work_dir / "last.1.pth"
    message, = caplog.messages
    assert message.startswith(f"passed over: checkpoint {work_dir / 'last.pth'} cannot be read: it is damaged or cut")


def test_all_damaged_is_not_called_missing(work_dir):
    for name in ("last.pth", "last.1.pth"):
        cut(work_dir / name)
    with pytest.raises(CheckpointError, match=r"can be read \(last\.pth, last\.1\.pth\): give another one with"):
        newest_checkpoint(work_dir)
    assert newest_checkpoint(work_dir, missing_ok=True) is None


def test_a_work_dir_without_checkpoints(tmp_path):
    assert newest_checkpoint(tmp_path, missing_ok=True) is None
    with pytest.raises(CheckpointError, match="no checkpoint to resume from in"):
        newest_checkpoint(tmp_path)
