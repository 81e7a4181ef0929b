"""The cache of annotations: what is taken from it, and when it is made again or not used."""
import json
import logging
import multiprocessing
import os
import pickle
import time

import numpy as np
import pytest

from data import CocoDataset, DataError
from data.coco import annotations, cache
from data.coco.annotations import read_annotations


@pytest.fixture
def file(tmp_path, monkeypatch):
    """An annotation file that is worth storing, and has not been changed for some time."""
    monkeypatch.setenv("DENSEKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "LEAST", 1)
    write(tmp_path / "a.json", 7)
    return tmp_path / "a.json"


def write(path, width, age=100.0):
    content = {"images": [{"id": i, "file_name": f"{i}.jpg", "width": 50, "height": 40} for i in range(4)],
               "annotations": [{"id": i, "image_id": (7 * i) % 4, "category_id": i % 2 + 1, "bbox": [i, 2, width, 5.5]}
                               for i in range(9)], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}
    path.write_text(json.dumps(content))
    settle(path, age)


def settle(path, age=100.0):
    """Make a file look old: its times, and those that no program can set."""
    os.utime(path, (time.time() - age,) * 2)


@pytest.fixture(autouse=True)
def old_enough(monkeypatch):
    """A file's own time of change cannot be set back, so a file counts as settled at once."""
    monkeypatch.setattr(cache, "SETTLED", -1.0)


def content(read):
    return [read.classes, read.category_ids, read.num_dropped_boxes, list(read.image_ids), list(read.file_names),
            [read.truth_of(i).tolist() for i in range(len(read))], [boxes.tolist() for boxes in read.boxes]]


@pytest.fixture
def parsed(monkeypatch):
    """The files that were parsed."""
    files, parse = [], annotations._parse
    monkeypatch.setattr(annotations, "_parse", lambda file, cache: files.append(file) or parse(file, cache))
    return files


def entries(tmp_path):
    return sorted((tmp_path / "cache" / "annotations").glob("*.bin"))


def test_the_second_reading_parses_nothing_and_reads_no_file(file, tmp_path, parsed, monkeypatch, reported):
    first = read_annotations(file)
    assert f"the annotations of {file} are stored in {first.entry} (" in reported()
    monkeypatch.setattr(cache, "file_digest", None)
    second = read_annotations(file)
    assert parsed == [file] and second.entry == first.entry == entries(tmp_path)[0]
    assert content(first) == content(second)
    assert not second.arrays["boxes"].flags.writeable  # it is mapped
    assert list((tmp_path / "cache" / "annotations" / "tmp").iterdir()) == []


def test_a_copy_of_the_file_has_the_same_entry(file, tmp_path, parsed):
    (tmp_path / "b.json").write_bytes(file.read_bytes())
    assert read_annotations(file).entry == read_annotations(tmp_path / "b.json").entry
    assert parsed == [file]


def test_a_changed_file_is_parsed_again_even_with_equal_length_and_time(file, tmp_path, parsed):
    before, stat = content(read_annotations(file)), file.stat()
    write(file, 8)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = read_annotations(file)
    assert after.truth_of(0)[0, 2] == 8 and content(after) != before
    assert parsed == [file] * 2 and len(entries(tmp_path)) == 2
    write(file, 7)  # back again: this content is known
    assert content(read_annotations(file)) == before and parsed == [file] * 2


def test_a_file_that_was_only_just_written_is_compared_by_its_content(file, parsed, monkeypatch):
    monkeypatch.setattr(cache, "SETTLED", 1e9)
    digests, file_digest = [], cache.file_digest
    monkeypatch.setattr(cache, "file_digest", lambda path: digests.append(path) or file_digest(path))
    for _ in range(3):
        read_annotations(file)
    assert parsed == [file] and digests == [file] * 2


@pytest.mark.parametrize("damage", [
    lambda data: data[:100], lambda data: b"", lambda data: data[:-64], lambda data: data + bytes(64),
    lambda data: b"something else" * 100, lambda data: data[:-300] + bytes([data[-300] ^ 1]) + data[-299:],
    lambda data: data.replace(b"int64", b"int32"), lambda data: data.replace(b"float64", b"complex"),
    lambda data: data.replace(b'"arrays"', b'"arrows"'), lambda data: data.replace(b"[9", b"[-"),
    lambda data: data[:8] + b"\xff" * 8 + data[16:], lambda data: data.replace(b'"a", "b"', b'"b", "a"')])
def test_a_damaged_or_foreign_entry_is_made_again(file, tmp_path, parsed, damage):
    first = content(read_annotations(file))
    entry, = entries(tmp_path)
    good = entry.read_bytes()
    entry.write_bytes(damage(good))
    assert entry.read_bytes() != good
    assert content(read_annotations(file)) == first and parsed == [file] * 2
    assert entry.read_bytes() == good


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"state": 1}', '{"state": [], "entry": "../../x"}', "\xff"])
def test_a_damaged_note_is_made_again(file, tmp_path, parsed, text):
    read_annotations(file)
    note, = (tmp_path / "cache" / "annotations").glob("*.json")
    good = note.read_text()
    note.write_text(text, encoding="latin-1")
    read_annotations(file)
    assert parsed == [file] and note.read_text() == good


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path, file, monkeypatch, reported):
    (tmp_path / "full").write_text("")
    monkeypatch.setenv("DENSEKD_CACHE", str(tmp_path / "full"))
    read = read_annotations(file)
    assert read.entry is None and read.num_dropped_boxes == 0 and len(read) == 4
    lines = reported().splitlines()
    assert lines == [f"{tmp_path / 'full' / 'annotations'} cannot be written (Not a directory): each start parses "
                     f"{file} again; give a folder in DENSEKD_CACHE"]
    assert content(pickle.loads(pickle.dumps(read))) == content(read)


def test_a_full_disk_leaves_nothing_behind(tmp_path, file, monkeypatch, reported):
    def full(path, *args, **kwargs):
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_blocks", full)
    assert read_annotations(file).entry is None
    assert "(disk full)" in reported() and reported().count("\n") == 1
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_wrong_and_small_files_are_not_stored(file, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "LEAST", 10 ** 6)
    assert read_annotations(file).entry is None and not (tmp_path / "cache").exists()
    monkeypatch.setattr(cache, "LEAST", 1)
    write(file, -1)
    with pytest.raises(DataError, match="9 problems"):
        read_annotations(file)
    assert entries(tmp_path) == []


def test_old_entries_are_removed(file, tmp_path, monkeypatch):
    read_annotations(file)
    old, = entries(tmp_path)
    unfinished = old.parent / "tmp" / "killed"
    unfinished.write_text("")
    settle(unfinished, 10 ** 6)
    write(file, 8)
    read_annotations(file)
    assert len(entries(tmp_path)) == 2 and not unfinished.exists()
    settle(old, 1.1 * cache.UNUSED)
    write(file, 9)
    read_annotations(file)
    assert len(entries(tmp_path)) == 2 and old not in entries(tmp_path)


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DENSEKD_CACHE", "given")
    assert str(cache.cache_folder()) == os.path.join("given", "annotations")
    monkeypatch.delenv("DENSEKD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "densekd" / "annotations"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_folder() == tmp_path / "home" / ".cache" / "densekd" / "annotations"


def test_a_pickled_data_set_names_its_annotations(file, tmp_path, parsed):
    dataset = CocoDataset(tmp_path, file, training=True)
    packed = pickle.dumps(dataset)
    assert len(packed) < 5000 and b"\x00" * 100 not in packed
    other = pickle.loads(packed)
    assert other.image_ids == dataset.image_ids and other.sizes == dataset.sizes and other.origins == dataset.origins
    assert [labels.tolist() for labels in other.labels] == [labels.tolist() for labels in dataset.labels]
    assert parsed == [file]
    for path in entries(tmp_path):
        path.unlink()
    assert pickle.loads(packed).file_names == dataset.file_names  # it is made again
    write(file, 8)
    for path in entries(tmp_path):
        path.unlink()
    with pytest.raises(DataError, match="annotations of .* cannot be read any more .No such file .*start again"):
        pickle.loads(packed)


def _read(file, barrier, results):
    cache.LEAST, cache.SETTLED = 1, -1.0
    files, parse = [], annotations._parse

    def slow(*args):
        files.append(args[0])
        time.sleep(0.3)
        return parse(*args)

    annotations._parse = slow
    barrier.wait()
    read = read_annotations(file)
    results.put((len(files), float(read.truth_of(0).sum()), read.entry is not None))


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_at_once(file, tmp_path, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr("data.shared.fcntl.flock", lambda *args: (_ for _ in ()).throw(OSError(95, "no locks")))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_read, args=(file, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sum(count for count, *_ in found) == (1 if locks else 2)
    assert found[0][1:] == found[1][1:] and found[0][2] and len(entries(tmp_path)) == 1


def test_nothing_is_logged_when_an_entry_is_there(file, caplog):
    read_annotations(file)
    with caplog.at_level(logging.INFO, "densekd"):
        caplog.clear()
        assert np.array_equal(read_annotations(file).truth_of(1), read_annotations(file).truth_of(1))
    assert not caplog.records
