"""The files of distill.cache: damaged ones, a full disk, several writers."""
import errno
import os
from pathlib import Path

import pytest
import torch
from caches import FLOAT, SETS, caching, run_config, without_teacher
from processes import together
from small_models import make_batch, same_losses

from data.shared import Damaged
from kd.cache import entry
from kd.cache.entry import is_dense
from kd.config import parse_config
from kd.engine.train import train

CPU = torch.device("cpu")


@pytest.fixture
def filled(tmp_path):
    distiller = caching(*SETS["all"], folder=tmp_path)
    batch = make_batch(**FLOAT)
    losses = distiller.loss(*batch)
    distiller.caches[0].finish()
    return distiller, batch, losses, sorted(tmp_path.glob("*/*/*.bin"))


def cut(content: bytes) -> bytes:
    return content[:-100]


def zeroed(content: bytes) -> bytes:
    return content[:4096] + bytes(len(content) - 4096)


def flipped(content: bytes) -> bytes:
    return content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:]


@pytest.mark.parametrize("damage", [cut, zeroed, flipped, lambda content: b"", lambda content: bytes(len(content)),
                                    lambda content: content.replace(b'"parts"', b'"party"'),
                                    lambda content: content.replace(b'"shape": [', b'"shape": [-'),
                                    lambda content: content.replace(b'"cls"', b'"clz"'),
                                    lambda content: content + b"more"])
def test_damaged_entries_are_computed_again(damage, filled, reported):
    distiller, batch, losses, files = filled
    assert len(files) == 2
    whole = [path.read_bytes() for path in files]
    for path, content in zip(files, whole):
        path.write_bytes(damage(content))
    assert same_losses(distiller.loss(*batch), losses)
    distiller.caches[0].finish()
    assert distiller.caches[0].computed == 4 and reported().count("is damaged") == 1
    assert [path.read_bytes() for path in files] == whole
    assert same_losses(without_teacher(distiller).loss(*batch), losses)


def test_a_full_disk_stops_only_the_writing(tmp_path, monkeypatch, reported):
    def full(file, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("data.shared.write_all", full)
    distiller, batch = caching(*SETS["all"], folder=tmp_path), make_batch(**FLOAT)
    losses = distiller.loss(*batch)
    distiller.caches[0].finish()
    assert same_losses(distiller.loss(*batch), losses)
    distiller.caches[0].finish()
    assert reported().count("disk full") == 1 and "the run goes on" in reported()
    assert not list(tmp_path.glob("*/tmp/*")) and not list(tmp_path.glob("*/*/*.bin"))


def test_a_folder_that_cannot_be_made_stops_the_run(scenes, tmp_path):
    (tmp_path / "file").write_text("")
    cfg = run_config(tmp_path, scenes, SETS["LD"], cache=str(tmp_path / "file" / "answers"))
    with pytest.raises(OSError, match="cannot be written") as caught:
        train(parse_config(cfg), tmp_path / "run", CPU)
    assert caught.value.exit_code == 2


def test_unfinished_files_of_a_killed_run_are_removed(filled):
    distiller = filled[0]
    folder = distiller.caches[0].store.folder / "tmp"
    old, new = folder / "old", folder / "new"
    for path in (old, new):
        path.write_text("")
    os.utime(old, (0, 0))
    distiller.caches[0].open()
    assert not old.exists() and new.exists()


def write_at_once(folder: str) -> list[bool]:
    """In each process: all images of all processes, computed and then read."""
    distiller, found = caching(*SETS["all"], folder=Path(folder)), []
    for seed in range(4):
        batch = make_batch(seed=seed, **FLOAT)
        found.append((batch, distiller.loss(*batch)))
    distiller.caches[0].finish()
    torch.distributed.barrier()
    without_teacher(distiller)
    return [same_losses(distiller.loss(*batch), losses) for batch, losses in found]


def test_two_processes_write_at_once(tmp_path):
    assert together(write_at_once, 2, tmp_path / "group", str(tmp_path / "answers")) == [[True] * 4] * 2
    assert len(list((tmp_path / "answers").glob("*/*/*.bin"))) == 8
    assert not list((tmp_path / "answers").glob("*/tmp/*"))


def test_dense_tensors():
    x = torch.zeros(2, 3, 4)
    for each, dense in ((x, True), (x.permute(2, 0, 1), True), (x[:, :2], False), (x.expand(5, 2, 3, 4), False),
                        (x[:1], True)):
        assert is_dense(each.shape, each.stride()) == dense
    with pytest.raises(Damaged):
        entry.read_layout(b'{"parts": [], "names": [["a", 0]], "sizes": []}')
