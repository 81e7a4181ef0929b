"""Files that processes share: locks; and a header with blocks of numbers, written as a whole or not at all. There is no
code in them:

    magic, 8 bytes | length of the header, 8 | checksum of the blocks, 8 | header | zeros to a multiple of 64
    the blocks, each followed by zeros to a multiple of 64
"""
import os
import secrets
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO
from weakref import WeakSet

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

START = struct.Struct("<8sQQ")
ALIGNMENT = 64  # bytes
LARGEST_HEADER = 2 ** 20
OLD = 86400.0   # seconds after which an unfinished file is one of a process that was killed
_held: WeakSet[IO] = WeakSet()


class Damaged(Exception):
    """A file that is not what it should be, or not whole."""


def padded(size: int) -> int:
    """A number of bytes rounded up to a multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def checksum(content: np.ndarray) -> int:
    """The sum of a content's 64-bit words, modulo 2^64; it runs as fast as memory. Zeros at the end do not count."""
    whole = len(content) // 8 * 8
    words = np.add.reduce(content[:whole].view(np.uint64), dtype=np.uint64) if whole else 0
    return (int(words) + int.from_bytes(content[whole:].tobytes(), "little")) % 2 ** 64


def write_blocks(path: Path, magic: bytes, header: bytes, contents: Sequence[np.ndarray], safe: bool = False) -> int:
    """Write a file of blocks (n,) uint8, and return its length in bytes.

    Args:
        safe: wait until all of it is on the disk, so that it is whole after a loss of power.
    """
    total = sum(map(checksum, contents)) % 2 ** 64
    with open(path, "wb", buffering=0) as file:
        start = START.pack(magic, len(header), total) + header
        write_all(file, start + bytes(padded(len(start)) - len(start)))
        for content in contents:
            write_all(file, content)
            write_all(file, bytes(padded(len(content)) - len(content)))
        if safe:
            os.fsync(file.fileno())
        return file.tell()


def write_all(file: BinaryIO, content: bytes | np.ndarray) -> None:
    """Write everything; an unbuffered file may take only a part at once."""
    left = memoryview(content)
    while left:
        left = left[file.write(left):]


def read_header(file: BinaryIO, magic: bytes) -> tuple[bytes, int, int]:
    """The header of a file of blocks, the place of the first block, and the checksum of all; raises Damaged."""
    start = file.read(START.size)
    found, size, total = START.unpack(start) if len(start) == START.size else (b"", 0, 0)
    if found != magic or size > LARGEST_HEADER:
        raise Damaged("it does not begin as an entry does")
    return file.read(size), padded(START.size + size), total


def place(folder: Path, path: Path, write: Callable[[Path], Any]) -> Any:
    """Write a file so that others see all of it or nothing, also if several processes write it at once.

    Args:
        folder: has a folder `tmp`.
        write: called with the path of a temporary file in it.
    """
    partial = folder / "tmp" / secrets.token_hex(16)
    try:
        result = write(partial)
        path.parent.mkdir(exist_ok=True)
        os.replace(partial, path)
        return result
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def remove_old(folder: Path, pattern: str = "tmp/*", seconds: float = OLD) -> list[Path]:
    """Remove files in a folder that have not been written for some time, and return them."""
    removed = []
    for path in folder.glob(pattern):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > seconds:
                path.unlink()
                removed.append(path)
    return removed


def take_lock(path: Path, wait: bool = False) -> IO:
    """Lock a file, which is made if there is none, and return it opened; it is unlocked when it is closed.

    A file system without locks, as on some clusters, gives the file without one.

    Args:
        wait: whether to wait for another process that has the lock (Windows: for ten seconds).
    Raises:
        BlockingIOError: another process has the lock.
        OSError: the file cannot be made.
    """
    file = open(path, "a")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        else:
            file.seek(0)  # the lock is on one byte from here; the file may be shorter
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError) as error:  # the second on Windows
        file.close()
        raise BlockingIOError from error
    except OSError:
        pass
    _held.add(file)
    return file


def _let_go() -> None:
    """Close a forked process's copies of the locks, so that a loader worker which outlives its run keeps none."""
    for file in _held:
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
