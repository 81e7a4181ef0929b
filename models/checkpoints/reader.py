"""Reads checkpoint files (torch's zip format, its older format, plain pickles, .safetensors) without running code from
them.

`torch.load` is not used. With `weights_only=True` it refuses real mmdet 3 files and every detectron2 `.pkl`. Without
it, some of its branches (TorchScript archives, tar files) never use the unpickler that was passed to it. Both formats
are simple enough to read here.
"""
import io
import os
import struct
import zipfile
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from data.errors import one_line
from data.extras import MissingExtra

from .safetensors_file import is_safetensors, read_safetensors
from .sources import check_file
from .unpickler import CheckpointError, CheckpointUnpickler

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first object in files from torch before version 1.6
_LEGACY_PROTOCOL = 1001


def read_checkpoint(path: str | os.PathLike) -> Any:
    """The content of a checkpoint file, with every tensor on the CPU.

    The file may be torch's (`.pth`, zip or older format), a plain pickle (`.pkl`, also Python 2's) or `.safetensors`.
    Its content decides, not its name. Tensors, numpy arrays, plain containers and numbers are returned as they are;
    objects of mmengine, mmcv and mmdet become empty placeholders.
    Raises `CheckpointError`, in one line, if the file is missing, empty, damaged or not a checkpoint, or if it asks for
    an object that weights do not need. This object is not even looked up. Raises `MissingExtra` if the package for
    `.safetensors` is not installed.
    """
    path = os.fspath(path)
    check_file(path)
    try:
        with open(path, "rb") as file:
            return _read(file)
    except MissingExtra:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror or one_line(error)}") from error
    except Exception as error:  # a pickle with damaged bytes can raise any exception
        detail = one_line(f"{type(error).__name__}: {error}", 120)
        raise CheckpointError(f"cannot read checkpoint {path}: it is damaged or not a checkpoint ({detail})") from error


def _read(file: BinaryIO) -> Any:
    head, size = file.read(9), os.fstat(file.fileno()).st_size
    file.seek(0)
    if not head:
        raise CheckpointError("the file is empty")
    if is_safetensors(head):  # before the archives: the length of a header may have their first bytes
        return read_safetensors(file.name)
    if head[:2] == b"PK":
        return _read_zip(file)
    first = CheckpointUnpickler(file, size).load()
    if isinstance(first, int) and first == _LEGACY_MAGIC:
        return _read_legacy(file, size)
    return first


def _read_zip(file: BinaryIO) -> Any:
    """Reads a zip archive: `NAME/data.pkl` refers to storages by key, and `NAME/data/KEY` holds a storage's bytes
    without compression."""
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("data.pkl") and name.count("/") < 2]
        if len(roots) != 1:
            raise CheckpointError("it is a zip archive, but torch.save did not write it")
        root = roots[0]
        if f"{root}constants.pkl" in entries:
            raise CheckpointError("a TorchScript archive is a program: save the model's state dict instead")
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
            raise CheckpointError("it is a compressed archive, which torch.save never writes")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise CheckpointError("it was written on a big-endian machine")
        storages: dict[tuple[str, torch.dtype], Tensor] = {}

        def storage(dtype: torch.dtype, key: str, count: int, view: object) -> Tensor:
            if (key, dtype) not in storages:
                storages[key, dtype] = _zip_storage(archive, entries[f"{root}data/{key}"], dtype, count)
            return storages[key, dtype]

        program = archive.read(f"{root}data.pkl")
        return CheckpointUnpickler(io.BytesIO(program), len(program), storage).load()


def _zip_storage(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, dtype: torch.dtype, count: int) -> Tensor:
    size = count * dtype.itemsize
    if entry.file_size != size:
        raise CheckpointError(f"it is damaged: a storage has {entry.file_size} bytes instead of {size}")
    return _fixed_storage(bytearray(archive.read(entry)), dtype)


def _fixed_storage(data: bytearray, dtype: torch.dtype) -> Tensor:
    """A flat tensor over bytes. Nothing can make its storage larger, in contrast to a storage from torch."""
    return torch.from_numpy(np.frombuffer(data, np.uint8)).view(dtype)


def _read_legacy(file: BinaryIO, size: int) -> Any:
    """Reads the format before torch 1.6, after the magic number: protocol, machine, the object, the keys of its
    storages, then their bytes."""
    if CheckpointUnpickler(file, size).load() != _LEGACY_PROTOCOL:
        raise CheckpointError("it has an unknown version of torch's older format")
    if not CheckpointUnpickler(file, size).load().get("little_endian"):
        raise CheckpointError("it was written on a big-endian machine")
    unclaimed = size
    storages: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, count: int, view: tuple | None) -> Tensor:
        nonlocal unclaimed
        if key not in storages:
            unclaimed -= count * dtype.itemsize
            if unclaimed < 0:
                raise CheckpointError("it is damaged: its storages are larger than the file")
            storages[key] = _fixed_storage(bytearray(count * dtype.itemsize), dtype)
        if view is None:
            return storages[key]
        _, offset, length = view
        return storages[key][offset : offset + length]

    content = CheckpointUnpickler(file, size, storage).load()
    keys = [str(key) for key in CheckpointUnpickler(file, size).load()]
    if set(keys) != set(storages):
        raise CheckpointError("it is damaged: the list of its storages is wrong")
    for key in keys:
        _fill(file, storages[key])
    return content


def _fill(file: BinaryIO, storage: Tensor) -> None:
    (count,) = struct.unpack("<q", file.read(8))
    data = memoryview(storage.view(torch.uint8).numpy())
    if count != storage.numel() or file.readinto(data) != len(data):
        raise CheckpointError("it is damaged or cut short")
