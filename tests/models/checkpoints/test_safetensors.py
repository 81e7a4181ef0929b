""".safetensors files: what is written, read, and refused."""
import json
import struct
import sys

import pytest
import torch

from data.extras import MissingExtra
from models.checkpoints import sources
from models.checkpoints.convert import convert_checkpoint
from models.checkpoints.formats import parse_checkpoint
from models.checkpoints.reader import read_checkpoint
from models.checkpoints.safetensors_file import is_safetensors, to_safetensors
from models.weights import CheckpointError, load_weights, open_checkpoint

safetensors = pytest.importorskip("safetensors.torch", reason="needs the extra hub")
WEIGHTS = {"bbox_head.gfl_cls.weight": torch.arange(6.0).view(2, 3), "backbone.bn1.num_batches_tracked":
           torch.tensor(7), "backbone.conv1.weight": torch.ones(2, 2, dtype=torch.float16)}
CONFIG = {"model": {"head": {"type": "GFLHead", "ratios": [0.5, 1.0]}}, "train": {"seed": 3}}


def write(path, header, data=b""):
    """A file with a header that need not fit its data; `header` is JSON, or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_ours_and_back(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(to_safetensors(WEIGHTS, {"config": CONFIG, "classes": ["a", "b"], "step": 4}))
    label, checkpoint = open_checkpoint(path)
    assert label == str(path) and checkpoint.format == "densekd"
    assert checkpoint.meta == {"config": CONFIG, "classes": ["a", "b"]}
    assert checkpoint.weights.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert checkpoint.weights[name].dtype == value.dtype and torch.equal(checkpoint.weights[name], value)
    with safetensors.safe_open(path, framework="pt") as file:  # other projects read it, too
        assert file.metadata()["format"] == "pt" and set(file.keys()) == WEIGHTS.keys()


def test_tensors_that_share_memory_or_have_gaps(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"a.weight": whole, "b.weight": whole.T, "c.weight": whole[:, ::2], "d.weight": whole[0]}
    path = tmp_path / "a.safetensors"
    path.write_bytes(to_safetensors(tensors, {}))
    found = open_checkpoint(path)[1].weights
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_files_of_others(tmp_path):
    """The names say whose they are, as in a state dict, and the texts are not ours."""
    names = ["conv1.weight", "layer1.0.conv1.weight", "bn1.weight"]
    safetensors.save_file({name: torch.ones(2) for name in names}, tmp_path / "resnet.safetensors", {
        "format": "pt", "config": "{}", "classes": '["a"]'})
    checkpoint = open_checkpoint(tmp_path / "resnet.safetensors")[1]
    assert (checkpoint.format, checkpoint.meta) == ("resnet-backbone", {})
    assert sorted(checkpoint.weights) == sorted(names)
    safetensors.save_file({"backbone.bottom_up.stem.conv1.weight": torch.ones(2)}, tmp_path / "d2.safetensors")
    assert open_checkpoint(tmp_path / "d2.safetensors")[1].format == "detectron2"
    safetensors.save_file({"student.backbone.x": torch.ones(2), "teacher.backbone.x": torch.ones(2)},
                          tmp_path / "fgd.safetensors")
    with pytest.raises(CheckpointError, match="holds student and teacher: choose the part"):
        open_checkpoint(tmp_path / "fgd.safetensors")


def test_the_content_decides_not_the_name(tmp_path):
    (tmp_path / "a.pth").write_bytes(to_safetensors(WEIGHTS, {"classes": ["a"]}))
    assert parse_checkpoint(read_checkpoint(tmp_path / "a.pth")).meta == {"classes": ["a"]}
    torch.save({"format": "densekd", "model": WEIGHTS}, tmp_path / "b.safetensors")
    assert open_checkpoint(tmp_path / "b.safetensors")[1].weights.keys() == WEIGHTS.keys()


def test_a_header_whose_length_looks_like_an_archive(tmp_path):
    """Its first bytes are PK."""
    empty = json.dumps({"__metadata__": {"x": ""}, "a.weight": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})
    length = int.from_bytes(b"PK", "little")
    header = empty.replace('"x": ""', f'"x": "{"y" * (length - len(empty))}"').encode()
    path = write(tmp_path / "a.safetensors", header, b"\x05")
    assert path.read_bytes()[:2] == b"PK" and open_checkpoint(path)[1].weights["a.weight"].tolist() == [5]


def test_archives_and_pickles_are_no_safetensors(tmp_path):
    for zipped in (True, False):
        torch.save(WEIGHTS, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        assert not is_safetensors((tmp_path / "a.pth").read_bytes()[:9])
    assert not is_safetensors(b"") and not is_safetensors(bytes(8))


ONE = {"a.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
OURS = {"densekd": "1"}


@pytest.mark.parametrize("header, data, expected", [
    (ONE, b"1234", "it is damaged"),                                         # cut off
    (ONE, b"1234" * 3, "it is damaged"),                                     # bytes left over
    (b'{"a": ', b"", "it is damaged"),
    (b"{" + b" " * 50, b"", "it is damaged"),
    (b'{"a":' + b"[" * 5000, b"", "it is damaged"),
    ({"a.weight": ONE["a.weight"] | {"shape": [3]}}, bytes(8), "it is damaged"),
    ({"a.weight": ONE["a.weight"] | {"shape": [2 ** 40, 2 ** 40]}}, bytes(8), "it is damaged"),
    ({"a.weight": ONE["a.weight"] | {"data_offsets": [0, 2 ** 60]}}, bytes(8), "it is damaged"),
    ({"a.weight": ONE["a.weight"], "b.weight": ONE["a.weight"]}, bytes(8), "it is damaged"),  # the same bytes twice
    ({"a.weight": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, bytes(8), "has the type"),
    ({}, b"", "holds no weights"),
    ({"__metadata__": OURS | {"config": "{"}} | ONE, bytes(8), "damaged or not a checkpoint"),
    ({"__metadata__": OURS | {"config": "[" * 100_000}} | ONE, bytes(8), "damaged or not a checkpoint"),
    ({"__metadata__": OURS | {"classes": " " * (2 ** 20 + 1)}} | ONE, bytes(8), "its classes has more than 1048576"),
    ({"__metadata__": OURS | {"config": json.dumps([[]] * 200_000)}} | ONE, bytes(8), "more than 100000 entries"),
    ({"__metadata__": {"densekd": 1}} | ONE, bytes(8), "it is damaged")])
def test_damaged_files(tmp_path, header, data, expected):
    path = write(tmp_path / "a.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert expected in message and str(path) in message and len(message.splitlines()) == 1 and len(message) < 500


def test_a_length_that_is_larger_than_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2 ** 31) + b"{}")
    with pytest.raises(CheckpointError, match="it is damaged"):
        open_checkpoint(path)
    path.write_bytes(struct.pack("<Q", 2 ** 62) + b"{}")
    with pytest.raises(CheckpointError, match="it is damaged or not a checkpoint"):
        open_checkpoint(path)


def test_any_damage_is_a_known_error(tmp_path):
    """A changed byte, or a file that ends earlier: it is read, or one line says that it is damaged."""
    whole, path = to_safetensors(WEIGHTS, {"config": CONFIG, "classes": ["a", "b"]}), tmp_path / "a.safetensors"
    files = [whole[:end] for end in range(0, len(whole), 7)]
    files += [whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1:] for place in range(len(whole))]
    refused = 0
    for content in files:
        path.write_bytes(content)
        try:
            open_checkpoint(path)
        except CheckpointError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert len(files) // 2 < refused < len(files)


def test_config_that_json_does_not_have():
    with pytest.raises(CheckpointError, match="cannot be written"):
        to_safetensors(WEIGHTS, {"config": {"a": object()}})
    with pytest.raises(CheckpointError, match="config has more than"):
        to_safetensors(WEIGHTS, {"config": {"a": "b" * 2 ** 20}})


def test_without_the_package(tmp_path, monkeypatch):
    """One line, and nothing is downloaded."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(to_safetensors(WEIGHTS, {}))
    torch.save({"format": "densekd", "model": WEIGHTS}, tmp_path / "last.pth")
    path.rename(tmp_path / "b.pth")
    path.touch()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setattr(sources, "_fetch", lambda *arguments: pytest.fail("it downloads"))
    needs = r"needs safetensors, which is not installed: pip install 'densekd\[hub\]', or pip install safetensors"
    for source in (path, tmp_path / "b.pth", "https://example.org/a.safetensors?download=true"):
        with pytest.raises(MissingExtra, match=needs) as caught:
            load_weights(torch.nn.Linear(1, 1), source)
        assert caught.value.exit_code == 2
    with pytest.raises(MissingExtra, match=needs):
        sources.check_file(path)
    with pytest.raises(MissingExtra, match=needs):
        convert_checkpoint(tmp_path / "last.pth", "safetensors", tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()
