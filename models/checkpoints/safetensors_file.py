"""Reads and writes .safetensors files, which hold tensors and texts and nothing that could run. Needs the extra `hub`.

A file from this project has the configuration and the names of the classes as JSON among its texts, so that it serves
as our .pth files do.
"""
import json
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from data.errors import one_line
from data.extras import need

from .unpickler import CheckpointError

SUFFIX = ".safetensors"
MARK, VERSION = "densekd", "1"  # a text of our files, see `_our_content`
MAX_TEXT = 2 ** 20  # characters of a configuration or of names, which become many objects
# The types of a detector's weights; the format has more, which not every operation knows.
_TYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}


def is_safetensors(head: bytes) -> bool:
    """Whether a file that starts with these bytes is a .safetensors file: eight bytes with the length of the header,
    and the header, which is JSON.

    A length of 2^32 or more is refused by every reader. A pickle or a zip archive does not start with such bytes.
    """
    return len(head) > 8 and head[4:8] == bytes(4) and head[8:9] == b"{"


def need_safetensors(feature: str = "a .safetensors file", module: str = "safetensors") -> ModuleType:
    """The package; MissingExtra, one line, if it is not installed."""
    return need("safetensors", "hub", feature, module)


def check_installed(source: str | os.PathLike) -> None:
    """Raise MissingExtra if a path or an address names a .safetensors file that cannot be read here."""
    if os.fspath(source).partition("?")[0].lower().endswith(SUFFIX):
        need_safetensors()


def read_safetensors(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a file in the form that `parse_checkpoint` takes; the tensors are copies on the CPU.

    The package checks the header (at most 100 MB) and that the tensors fill the file exactly, so a small file cannot
    fill the memory. Raises `CheckpointError` for a damaged file, and MissingExtra without the package.
    """
    package = need_safetensors()
    try:
        with package.safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            texts = file.metadata() or {}
            weights = {}
            for name in file.keys():  # noqa: SIM118 it is no mapping
                if (kind := file.get_slice(name).get_dtype()) not in _TYPES:
                    raise CheckpointError(f"{one_line(name, 80)} has the type {one_line(kind, 20)}, which the weights "
                                          "of a detector do not have")
                weights[name] = file.get_tensor(name).clone()  # the file itself may change
    except package.SafetensorError as error:
        raise CheckpointError(f"it is damaged or not a {SUFFIX} file ({one_line(error, 120)})") from None
    return _our_content(texts) | {"model": weights}


def _our_content(texts: Mapping[str, str]) -> dict[str, Any]:
    """The other entries of a checkpoint from the texts of a file; none if another project wrote it."""
    if MARK not in texts:
        return {}
    content: dict[str, Any] = {"format": MARK}
    for key in ("config", "classes"):
        if key in texts:
            if len(texts[key]) > MAX_TEXT:
                raise CheckpointError(f"its {key} has more than {MAX_TEXT} characters")
            content[key] = json.loads(texts[key])
    return content


def to_safetensors(weights: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bytes:
    """The bytes of a file with these weights, and with the `config` and `classes` in `meta`.

    Raises `CheckpointError` if they cannot be written as JSON, and MissingExtra without the package.
    """
    save = need_safetensors("writing a .safetensors file", "safetensors.torch").save
    texts = {"format": "pt", MARK: VERSION}  # other readers ask for the first
    try:
        texts |= {key: json.dumps(meta[key]) for key in ("config", "classes") if meta.get(key)}
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"its configuration or class names cannot be written ({one_line(error, 120)})") from None
    for key in texts:
        if len(texts[key]) > MAX_TEXT:
            raise CheckpointError(f"its {key} has more than {MAX_TEXT} characters")
    # The format takes no tensors that share memory or have gaps.
    return save({name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in weights.items()},
                texts)
