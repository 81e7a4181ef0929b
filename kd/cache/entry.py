"""The file of one image's answers, see `data.shared`: the header is JSON, the blocks are the bytes of its tensors."""
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from data.shared import Damaged, checksum, padded, read_header, write_blocks

MAGIC = b"densekd\x01"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)}


@dataclass(frozen=True)
class Part:
    """One tensor of an image: its shape and strides without the batch, the type in the file, and the type in use."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    stored: str
    used: str

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes in the file, without the zeros after them."""
        return self.count * DTYPES[self.stored].itemsize

    def batch(self, flat: Tensor, images: int) -> Tensor:
        """The tensor of several images, (images, *shape), in the memory of a flat one."""
        return flat.as_strided((images, *self.shape), (self.count, *self.strides))


@dataclass(frozen=True)
class Layout:
    """The tensors of an entry. Several names may stand for one tensor.

    Attributes:
        parts: the tensors, in their order in the file.
        names: for each name, the number of its tensor.
        sizes: (h, w) of each level of the head's predictions.
    """

    parts: tuple[Part, ...]
    names: tuple[tuple[str, int], ...]
    sizes: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(padded(part.size) for part in self.parts)

    def header(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def read_layout(text: bytes) -> Layout:
    """The layout that a header describes; Damaged if it describes none."""
    try:
        found = json.loads(text)
        parts = tuple(Part(tuple(part["shape"]), tuple(part["strides"]), part["stored"], part["used"])
                      for part in found["parts"])
        names = tuple((name, number) for name, number in found["names"])
        sizes = tuple((h, w) for h, w in found["sizes"])
        fits = all(is_dense(part.shape, part.strides) and {part.stored, part.used} <= DTYPES.keys() for part in parts)
        if fits and all(number in range(len(parts)) for _, number in names):
            return Layout(parts, names, sizes)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise Damaged("its header cannot be read")


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor of this shape and these strides fills its memory without gaps, in any order."""
    expected = 1
    for stride, length in sorted((stride, length) for length, stride in zip(shape, strides, strict=True) if length > 1):
        if stride != expected:
            return False
        expected *= length
    return True


def bytes_of(flat: Tensor) -> np.ndarray:
    """The memory of a flat tensor on the CPU as bytes, not copied."""
    return flat.view(torch.uint8).numpy()


def write_entry(path: Path, layout: Layout, tensors: Sequence[Tensor]) -> int:
    """Write a file; `tensors` are flat, one for each part. Returns its length in bytes."""
    return write_blocks(path, MAGIC, layout.header(), [bytes_of(tensor) for tensor in tensors])


def read_start(file: BinaryIO, length: int) -> tuple[Layout, int]:
    """The layout and the checksum of a file of `length` bytes, which then stands at its first tensor."""
    header, begin, total = read_header(file, MAGIC)
    layout = read_layout(header)
    if begin + layout.size != length:
        raise Damaged(f"it has {length} bytes and its header says {begin + layout.size}")
    file.seek(begin)
    return layout, total


def read_tensors(file: BinaryIO, layout: Layout, total: int, tensors: Sequence[Tensor]) -> None:
    """Read the tensors of a file that stands at the first one into flat ones, and compare the checksum."""
    found = 0
    for part, tensor in zip(layout.parts, tensors, strict=True):
        content = bytes_of(tensor)
        into = memoryview(content)
        while into:
            read = file.readinto(into)
            if not read:
                raise Damaged("it ends too early")
            into = into[read:]
        found += checksum(content)
        file.seek(padded(part.size) - part.size, 1)
    if found % 2 ** 64 != total:
        raise Damaged("its checksum is wrong")
