"""The file of one image's answers: a header, then the bytes of its tensors. Nothing in it is code.

    magic, 8 bytes | length of the header, 8 | checksum of the tensors, 8 | header, JSON | zeros to a multiple of 64
    the tensors, each followed by zeros to a multiple of 64
"""
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

MAGIC = b"densekd\x01"
START = struct.Struct("<8sQQ")
ALIGNMENT = 64  # bytes
LARGEST_HEADER = 2 ** 20
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)}


class Damaged(Exception):
    """A file that is not a whole entry."""


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


def padded(size: int) -> int:
    """A number of bytes rounded up to a multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def checksum(content: np.ndarray) -> int:
    """The sum of a content's 64-bit words, modulo 2^64; it runs as fast as memory. Zeros at the end do not count."""
    whole = len(content) // 8 * 8
    words = np.add.reduce(content[:whole].view(np.uint64), dtype=np.uint64) if whole else 0
    return (int(words) + int.from_bytes(content[whole:].tobytes(), "little")) % 2 ** 64


def bytes_of(flat: Tensor) -> np.ndarray:
    """The memory of a flat tensor on the CPU as bytes, not copied."""
    return flat.view(torch.uint8).numpy()


def write_entry(path: Path, layout: Layout, tensors: Sequence[Tensor]) -> int:
    """Write a file; `tensors` are flat, one for each part. Returns its length in bytes."""
    contents = [bytes_of(tensor) for tensor in tensors]
    header = layout.header()
    total = sum(map(checksum, contents)) % 2 ** 64
    with open(path, "wb", buffering=0) as file:
        start = START.pack(MAGIC, len(header), total) + header
        write_all(file, start + bytes(padded(len(start)) - len(start)))
        for content in contents:
            write_all(file, content)
            write_all(file, bytes(padded(len(content)) - len(content)))
        return file.tell()


def write_all(file: BinaryIO, content: bytes | np.ndarray) -> None:
    """Write everything; an unbuffered file may take only a part at once."""
    left = memoryview(content)
    while left:
        left = left[file.write(left):]


def read_start(file: BinaryIO, length: int) -> tuple[Layout, int]:
    """The layout and the checksum of a file of `length` bytes, which then stands at its first tensor."""
    start = file.read(START.size)
    magic, size, total = START.unpack(start) if len(start) == START.size else (b"", 0, 0)
    if magic != MAGIC or size > LARGEST_HEADER:
        raise Damaged("it does not begin as an entry does")
    layout, begin = read_layout(file.read(size)), padded(START.size + size)
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
