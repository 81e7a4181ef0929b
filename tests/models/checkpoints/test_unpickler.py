"""Checkpoints come from other people: reading one runs no code, and a damaged one gives an error of one line."""

import os
import pickle
import struct
import sys
import tracemalloc
import types
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch

from models.weights import CheckpointError, load_weights, read_checkpoint

FORMATS = ["zip.pth", "legacy.pth", "plain.pkl"]
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
DTYPES += [torch.bool, torch.complex64]


class Call:
    """Its pickle is a call of `function`, which is made on unpickling."""

    def __init__(self, function, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced


def write(folder, name, content):
    path = folder / name
    if name == "plain.pkl":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=name == "zip.pth")
    return path


def refusal(path):
    """The message of the error, which is one line."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("how", ["os.system", "builtins.eval", "subprocess.call", "builtins.exec", "os.mkdir"])
def test_commands_are_refused_and_do_not_run(tmp_path, name, how):
    import subprocess

    marker = tmp_path / "marker"
    attack, asked = {
        "os.system": (Call(os.system, f"touch {marker}"), f"{os.system.__module__}.system"),
        "builtins.eval": (Call(eval, f"open({str(marker)!r}, 'w').close()"), ".eval"),
        "builtins.exec": (Call(exec, f"open({str(marker)!r}, 'w').close()"), ".exec"),
        "subprocess.call": (Call(subprocess.call, ["touch", str(marker)]), "commands.call"),  # Python 2's name
        "os.mkdir": (Call(os.mkdir, str(marker)), f"{os.mkdir.__module__}.mkdir"),
    }[how]
    path = write(tmp_path, name, {"state_dict": {"weight": torch.ones(2) if ".pth" in name else 1, "x": attack}})
    assert f"{asked}, which weights do not need" in refusal(path)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="refused"):
        load_weights(model, path, allow_missing="*")
    assert not marker.exists()

    # The attack is real: Python's own way to read the file runs the command.
    torch.load(path, weights_only=False) if ".pth" in name else pickle.loads(path.read_bytes())
    assert marker.exists()


def plain_pickle(tmp_path, program):
    path = tmp_path / "program.pkl"
    path.write_bytes(program)
    return path


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch marker'\ntR.",
        b"(S'touch marker'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch marker'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch marker\x85R.",  # STACK_GLOBAL
        b"\x80\x04\x8c\x08builtins\x8c\x10getattr.__self__\x93.",  # dotted names do not walk into attributes
        b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.",
        b"ctorch\nload\n.",
        b"ctorch.hub\nload\n.",
        b"ctorch\nsave\n.",
        b"cnumpy\nload\n.",
        b"cnumpy\nfromfile\n.",
        b"cmodels.weights\nload_weights\n.",
        b"ccopyreg\n_reconstructor\n.",
        b"cfunctools\npartial\n.",
        b"coperator\nattrgetter\n.",
        b"cbuiltins\n__import__\n.",
        b"ctorch.storage\n_load_from_bytes\n.",
        b"ctorch.jit\nload\n.",
        b"ctorch._utils\n_import_dotted_name\n.",
    ],
)
def test_other_globals_are_refused(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    assert "refused, it asks for" in refusal(plain_pickle(tmp_path, program))
    assert not (tmp_path / "marker").exists()


GETATTR = b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93"


@pytest.mark.parametrize(
    "program",
    [
        GETATTR + b"\x8c\x04text\x8c\x09__class__\x86R.",  # getattr of a string
        GETATTR + GETATTR[2:] + b"\x8c\x09_function\x86R.",  # getattr of getattr
        b"\x80\x04\x8c\x07_codecs\x8c\x06encode\x93\x8c\x04text\x8c\x03zip\x86R.",
        # _rebuild_from_type_v2 calls its argument: a placeholder is not one of the builders
        b"\x80\x04\x8c\x0dtorch._tensor\x8c\x15_rebuild_from_type_v2\x93(\x8c\x08mmengine\x8c\x01a\x93N)NtR.",
        # BUILD on a builder: {"_function": 1}, then attributes as slots
        b"\x80\x04\x8c\x05torch\x8c\x04Size\x93}\x8c\x09_function\x4b\x01sb.",
        b"\x80\x04\x8c\x05torch\x8c\x04Size\x93N}\x8c\x09_function\x4b\x01s\x86b.",
    ],
)
def test_allowed_names_open_no_other_way(tmp_path, program):
    refusal(plain_pickle(tmp_path, program))
    assert read_checkpoint(write(tmp_path, "zip.pth", {"size": torch.Size([2])})) == {"size": torch.Size([2])}


def test_rebuild_from_type_calls_builders_only(tmp_path):
    path = write(tmp_path, "zip.pth", {"p": torch.nn.Parameter(torch.arange(3.0))})
    assert type(read_checkpoint(path)["p"]) is torch.Tensor
    args = (Call(os.system, "touch marker"), torch.Tensor, (), None)
    path = write(tmp_path, "zip.pth", {"p": Call(torch._tensor._rebuild_from_type_v2, *args)})
    assert "system" in refusal(path)


def test_torchscript_archive_is_refused(tmp_path):
    """torch.load would pass it to torch.jit.load, which does not use an unpickler."""
    path = tmp_path / "script.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert "a TorchScript archive is a program" in refusal(path)


@pytest.mark.parametrize(
    "size, stride, offset", [((100,), (1,), 0), ((2, 2), (1, 40), 0), ((2,), (1,), 3), ((2,), (-1,), 1)]
)
def test_tensors_stay_inside_their_storage(tmp_path, size, stride, offset):
    class Outside(Call):
        def __init__(self):
            storage = torch.arange(4.0).__reduce_ex__(2)[1][0]
            super().__init__(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())

    for name in FORMATS[:2]:
        assert "a tensor " in refusal(write(tmp_path, name, {"weight": Outside()}))


def test_numpys_integers_are_no_shape(tmp_path):
    """Their products overflow: 99 * 100 is negative in eight bits, as if the tensor ended before its storage."""
    storage = torch.arange(4.0).__reduce_ex__(2)[1][0]
    shape = Call(torch._utils._rebuild_tensor_v2, storage, 0, (np.int8(100),), (np.int8(100),), False, OrderedDict())
    assert "a tensor has an impossible shape" in refusal(write(tmp_path, "zip.pth", {"weight": shape}))


def test_arrays_of_objects_are_refused(tmp_path):
    assert "numpy array of O8" in refusal(write(tmp_path, "plain.pkl", {"a": np.array([1, "x"], dtype=object)}))
    structured = np.zeros(2, dtype=[("x", "f4")])
    assert "numpy array of V4" in refusal(write(tmp_path, "plain.pkl", {"a": structured}))


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"PK", b"<!DOCTYPE html>\n<html>404</html>", b"\x80\x02", b"\x00" * 1000]
)
def test_garbage(tmp_path, content):
    path = tmp_path / "garbage.pth"
    path.write_bytes(content)
    refusal(path)


def test_missing_file_and_folder(tmp_path):
    assert refusal(tmp_path / "none.pth") == f"no such checkpoint file: {tmp_path / 'none.pth'}"
    assert refusal(tmp_path).startswith(f"cannot read checkpoint {tmp_path}: ")


@pytest.mark.parametrize("name", FORMATS)
def test_cut_short_anywhere(tmp_path, name):
    weight = torch.arange(300.0)
    whole = write(tmp_path, name, {"state_dict": {"weight": weight if ".pth" in name else weight.numpy()}}).read_bytes()
    path = tmp_path / f"cut-{name}"
    for length in range(0, len(whole) - 1, 37):
        path.write_bytes(whole[:length])
        refusal(path)


def test_damaged_bytes_are_noticed(tmp_path):
    path = write(tmp_path, "zip.pth", {"weight": torch.arange(300.0)})
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack("<f", 299.0))
    content[at] ^= 1
    path.write_bytes(content)
    assert "CRC" in refusal(path)


def test_zip_of_something_else(tmp_path):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photo.jpg", b"data")
    assert "torch.save did not write it" in refusal(path)


def test_compressed_archive(tmp_path):
    source = write(tmp_path, "zip.pth", {"weight": torch.zeros(300)})
    path = tmp_path / "compressed.pth"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    assert "compressed" in refusal(path)


# --- what must still be readable --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS[:2])
def test_tensors_come_back_as_they_were(tmp_path, name):
    base = torch.arange(24.0)
    content = OrderedDict(
        view=base.view(4, 6).t(),
        same_storage=base[4:8],
        scalar=torch.tensor(3.5),
        empty=torch.empty(0, 4),
        parameter=torch.nn.Parameter(torch.ones(2)),
        **{str(dtype): torch.tensor([0, 1, 2]).to(dtype) for dtype in DTYPES},
    )
    found = read_checkpoint(write(tmp_path, name, content))
    assert type(found) is OrderedDict and list(found) == list(content)
    for key, value in content.items():
        assert type(found[key]) is torch.Tensor
        assert found[key].dtype == value.dtype and torch.equal(found[key], value.detach()), key
    assert found["view"].stride() == (1, 6)
    found["view"][4, 0] = -1.0
    assert found["same_storage"][0] == -1.0  # still one storage


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_plain_content_comes_back_as_it_was(tmp_path, name, protocol):
    content = {
        "numbers": [1, 2.5, 10**30, True, None, 1 + 2j],
        "texts": ("a", b"\xff\x00", b"", bytearray(b"x")),
        "sets": [{1, 2}, frozenset({3})],
        "counters": [Counter("aab"), defaultdict(list, {1: [2]})],
        "arrays": [np.arange(6, dtype=">i4").reshape(2, 3).T, np.float32(2.5), np.zeros((0, 2)), np.array("text"),
                   np.array([True, False])],
        "torch": [torch.Size([1, 2]), torch.float16, torch.device("cpu")],
    }  # fmt: skip
    if name == "plain.pkl":
        path = tmp_path / name
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        path = tmp_path / name
        torch.save(content, path, pickle_protocol=max(protocol, 2), _use_new_zipfile_serialization=name == "zip.pth")
    found = read_checkpoint(path)
    for key in ("numbers", "texts", "sets", "counters", "torch"):
        assert found[key] == content[key], key
    for value, expected in zip(found["arrays"], content["arrays"], strict=True):
        # The byte order is the machine's own, for any byte order in the file.
        assert value.dtype == expected.dtype.newbyteorder("=") and value.shape == expected.shape
        assert np.array_equal(value, expected)


def test_pickle_of_python_2(tmp_path):
    """Its byte strings hold array data, and numpy's module had a different name."""
    data = np.array([1.5, -2.0], dtype="<f4").tobytes()
    assert len(data) == 8
    dtype = b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x02t" + dtype
    program = b"\x80\x02}U\x07conv1_b" + array + b"\x89U\x08" + data + b"tbs."
    path = tmp_path / "python2.pkl"
    path.write_bytes(program)
    assert read_checkpoint(path)["conv1_b"].tolist() == [1.5, -2.0]


def test_objects_of_a_framework_become_placeholders(tmp_path, monkeypatch):
    """As in mmdet 3's files: a logging buffer that refers to its own methods, and a configuration that is a dict."""
    module = types.ModuleType("mmengine.logging.fake")

    class HistoryBuffer:
        def __init__(self):
            self.history, self.methods = np.arange(3.0), {"mean": Call(getattr, HistoryBuffer, "mean")}

        def mean(self):
            return 0

    class ConfigDict(dict):
        pass

    for kind in (HistoryBuffer, ConfigDict):
        kind.__module__, kind.__qualname__ = "mmengine.logging.fake", kind.__name__
        setattr(module, kind.__name__, kind)
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "mmengine.logging.fake", module)
    content = {"weight": torch.ones(2), "hub": [HistoryBuffer(), ConfigDict(a=1)]}
    path = write(tmp_path, "zip.pth", content)
    for name in ("mmengine.logging.fake", "mmengine.logging", "mmengine"):
        monkeypatch.delitem(sys.modules, name)
    found = read_checkpoint(path)
    assert torch.equal(found["weight"], torch.ones(2))
    assert all(type(item).__name__ == "Placeholder" for item in found["hub"])
    assert "mmengine" not in sys.modules


class Grown:
    """Its pickle is a tensor of `count` numbers, whose `__setstate__` then makes it larger than its storage."""

    def __init__(self, count):
        self.storage = torch.zeros(count).storage()

    def __reduce__(self):
        shape = (len(self.storage),), (1,)
        return (torch._utils._rebuild_tensor_v2, (self.storage, 0, *shape, False, OrderedDict()),
                (self.storage, 0, (60000,), (1,)))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
@pytest.mark.parametrize("count", [0, 4])
def test_a_tensor_cannot_be_changed(tmp_path, name, count):
    """It would show memory that the process has given back."""
    assert "it tries to change a Tensor" in refusal(write(tmp_path, name, {"weight": Grown(count)}))


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_storages_have_the_files_size_and_cannot_grow(tmp_path, name):
    content = {"a": torch.arange(4.0), "none": torch.zeros(0)}
    for value in read_checkpoint(write(tmp_path, name, content)).values():
        assert not value.untyped_storage().resizable()


def nested(levels):
    """A pickle's code for a tuple that holds the one below twice, `levels` times."""
    return b")" + b"2\x86" * levels


@pytest.mark.parametrize("program, part", [
    (b"\x80\x02c__builtin__\nlist\nc__builtin__\nbytes\nJ\x00\x00\x00\x10\x85R\x85R.", "it makes a bytes from a int"),
    (b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x10\x85R.", "it makes a bytearray from a int"),
    (b"\x80\x02}" + nested(34) + b"K\x01s.", "keys must be text or numbers"),
    (b"\x80\x02}(" + nested(34) + b"K\x01u.", "keys must be text or numbers"),
    (b"\x80\x02(" + nested(34) + b"K\x01d.", "keys must be text or numbers"),
    (b"\x80\x04\x8f(" + nested(34) + b"\x90.", "keys must be text or numbers"),
    (b"\x80\x04(" + nested(34) + b"\x91.", "keys must be text or numbers"),
    (b"\x80\x02c__builtin__\nset\n]" + nested(34) + b"a\x85R.", "keys must be text or numbers"),
    (b"\x80\x02c__builtin__\nstr\n" + nested(34) + b"\x85R.", "it makes a str from a tuple"),
    (b"\x80\x02cnumpy\ndtype\n)K\x01K\x02s.", "it tries to change a"),
    (b"\x80\x02c__builtin__\nbytes\n(X\x02\x00\x00\x00\xc3\xa9X\x08\x00\x00\x00punycodetR.", "encoding punycode"),
    (b"\x80\x03c__builtin__\nstr\n(C\x01aX\x04\x00\x00\x00idnatR.", "encoding idna"),
    # A list of a thousand entries, copied ten thousand times.
    (b"\x80\x02c__builtin__\nlist\nq\x00](" + b"N" * 1000 + b"eq\x01]" + b"h\x00h\x01\x85Ra" * 10000 + b".",
     "larger than the file"),
])
def test_small_files_do_not_fill_the_memory_or_take_forever(tmp_path, program, part):
    assert part in refusal(plain_pickle(tmp_path, program))



def test_a_bytearray_is_read_before_it_is_made(tmp_path):
    """Python's own unpickler makes as many zero bytes as the file promises: here three GiB."""
    tracemalloc.start()
    refusal(plain_pickle(tmp_path, b"\x80\x05\x96" + struct.pack("<Q", 3 << 30) + b"."))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 ** 20
