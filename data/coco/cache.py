"""Annotations as arrays in files that all processes of a machine map into their memory.

The folder holds an entry for each content of an annotation file, named by the file's length and digest, and a note for
each annotation file: its state when it was read, and the name of its entry.
"""
import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np

from data.output import no_room, reason_of
from data.shared import Damaged, checksum, padded, place, read_header, remove_old, take_lock, write_blocks

log = logging.getLogger("densekd")

VERSION = 1             # of what is stored; another one is another entry
MAGIC = b"dkd-ann\x01"
LEAST = 2 ** 20         # bytes; smaller annotation files are parsed in a few hundredths of a second
UNUSED = 30 * 86400.0   # seconds after which an entry that nobody has opened is removed
SETTLED = 2.0           # seconds; a file that was written later than this may change without a trace in its times
BLOCK = 2 ** 24
DTYPES = {"float64": 8, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}

Arrays = Mapping[str, np.ndarray]


def cache_folder() -> Path | None:
    """The folder: `annotations` in $DENSEKD_CACHE, $XDG_CACHE_HOME/densekd or ~/.cache/densekd; None if there is no
    home."""
    if given := os.environ.get("DENSEKD_CACHE"):
        return Path(given) / "annotations"
    with suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "densekd" / "annotations"


class Cache:
    """What is stored of an annotation file.

    Whatever goes wrong with the folder, training goes on without it: `write` then says so in one line of the log.
    """

    def __init__(self, file: Path):
        self.file, self.folder, self.stat = file, cache_folder(), None
        with suppress(OSError):
            self.stat = file.stat()
        self.used = self.folder is not None and self.stat is not None and file.is_file() and (
            self.stat.st_size >= LEAST)

    @property
    def note(self) -> Path:
        """The path of the file's note."""
        name = hashlib.sha256(os.path.abspath(self.file).encode(errors="surrogateescape")).hexdigest()[:32]
        return self.folder / f"{name}.json"

    def state(self) -> list[int]:
        """What changes when the file is written: not even a program that resets its time can hide that."""
        return [VERSION, self.stat.st_size, self.stat.st_mtime_ns, self.stat.st_ctime_ns, self.stat.st_ino]

    def entry(self, digest: str) -> Path:
        """The path of the entry for a content of the file's length."""
        return self.folder / f"{self.stat.st_size}-{digest}-v{VERSION}.bin"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While one process is in this context, others that read the same file wait: they will find its entry."""
        lock = nullcontext()
        if self.used:
            with suppress(OSError):
                (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
                lock = closing(take_lock(self.note.with_suffix(".lock"), wait=True))
        with lock:
            yield

    def find(self) -> tuple[dict, dict[str, np.ndarray], Path] | None:
        """The description and the arrays of the file's content, and the path of their entry; None if it is not stored.

        The file is read only if it has another state than in its note.
        """
        if not self.used:
            return None
        with suppress(OSError, ValueError, TypeError, KeyError, Damaged):
            note = json.loads(self.note.read_bytes())
            if note["state"] == self.state():
                return self._open(self.folder / Path(note["entry"]).name)
        with suppress(OSError, Damaged):
            if any(self.folder.glob(self.entry("*").name)):
                path = self.entry(file_digest(self.file))
                found = self._open(path)
                self._write_note(path)
                return found
        return None

    def _open(self, path: Path, check: bool = True) -> tuple[dict, dict[str, np.ndarray], Path]:
        found = open_entry(path, check)
        with suppress(OSError):
            os.utime(path)  # it is in use
        return *found, path

    def write(self, about: dict, arrays: Arrays, digest: str) -> tuple[dict, dict[str, np.ndarray], Path] | None:
        """Store a content, and return it as `find` does; None if it cannot be stored.

        Args:
            digest: of the bytes that were parsed.
        """
        if not self.used:
            return None
        path = self.entry(digest)
        try:
            (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
            remove_old(self.folder)
            remove_old(self.folder, "*.bin", UNUSED)
            remove_old(self.folder, "*.json", 12 * UNUSED)
            size = place(self.folder, path, lambda partial: write_entry(partial, about, arrays))
            self._write_note(path)
            found = self._open(path, check=False)
        except (OSError, Damaged) as error:
            why = reason_of(no_room(error) or error) if isinstance(error, OSError) else str(error)
            log.warning("%s cannot be written (%s): each start parses %s again; give a folder in DENSEKD_CACHE",
                        self.folder, why, self.file)
            return None
        log.info("the annotations of %s are stored in %s (%.0f MB), so that the next start is faster", self.file, path,
                 size / 1e6)
        return found

    def _write_note(self, path: Path) -> None:
        """Note which content the file has, unless it was only just written, or has changed since."""
        now = self.file.stat()
        if time.time() - max(now.st_mtime, now.st_ctime) > SETTLED and (
                [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino] == self.state()[1:]):
            text = json.dumps({"file": str(self.file), "state": self.state(), "entry": path.name})
            with suppress(OSError):
                place(self.folder, self.note, lambda partial: partial.write_text(text, encoding="utf-8"))


def file_digest(file: Path) -> str:
    """The digest of a file's content."""
    found = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(BLOCK):
            found.update(block)
    return found.hexdigest()[:32]


def write_entry(path: Path, about: dict, arrays: Arrays) -> int:
    """Write arrays and a description that JSON can hold; returns the length of the file."""
    layout = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
    header = json.dumps({"about": about, "arrays": layout}).encode()
    header = b"%08x" % zlib.crc32(header) + header
    contents = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays.values()]
    return write_blocks(path, MAGIC, header, contents, safe=True)


def open_entry(path: Path, check: bool = True) -> tuple[dict, dict[str, np.ndarray]]:
    """The description and the arrays of a file, which are read when they are used; OSError, Damaged.

    Args:
        check: read all of the file to compare its checksum.
    """
    with open(path, "rb") as file:
        header, at, total = read_header(file, MAGIC)
        size = os.fstat(file.fileno()).st_size
        content = np.memmap(file, np.uint8, "r") if size else np.zeros(0, np.uint8)
    content, arrays = content.view(np.ndarray), {}
    if check and checksum(content[at:]) != total:
        raise Damaged("its checksum is wrong")
    try:
        if int(header[:8], 16) != zlib.crc32(header[8:]):
            raise Damaged("the checksum of its header is wrong")
        found = json.loads(header[8:])
        for name, (dtype, shape) in found["arrays"].items():
            length = DTYPES[dtype] * int(np.prod(shape, dtype=np.int64))
            if min(shape) < 0 or at + length > size:
                raise Damaged("it ends too early")
            arrays[name] = content[at:at + length].view(dtype).reshape(shape)
            at += padded(length)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged("its header cannot be read") from None
    if at != size:
        raise Damaged("its length is wrong")
    return found["about"], arrays
