"""The folder of a teacher's answers: one for each fingerprint, so that answers of other settings are never read."""
import hashlib
import json
import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from data.errors import differences, listed
from data.output import OutputError, naming, reason_of
from data.shared import place, remove_old

from .entry import Layout, write_entry

log = logging.getLogger("densekd")

SETTINGS = "settings.json"
WAITING = 16   # entries that may wait to be written; more make the step wait
WRITERS = 2    # threads


def fingerprint(settings: Mapping) -> str:
    """A short text that differs for different settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def read_settings(folder: Path) -> dict | None:
    """What `open_folder` wrote into a folder; None if there is nothing that can be read."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found.get("settings"), dict):
            return found
    return None


def open_folder(root: Path, settings: Mapping, machine: Mapping, write: bool) -> tuple[Path, list[str]]:
    """The folder for these settings in `root`, and lines about it for people.

    Args:
        machine: what computes the answers; another one's differ by rounding, and are used.
        write: create the folder.
    Raises:
        OutputError: it cannot be written.
    """
    folder = root / fingerprint(settings)
    found = read_settings(folder)
    if found is not None:
        return folder, [f"the answers in {folder} may differ from this machine's by rounding: {text}"
                        for text in [listed(differences(found.get("machine"), machine), ", ")] if text]
    if write:
        with naming(folder / SETTINGS):
            (folder / "tmp").mkdir(parents=True, exist_ok=True)
            text = json.dumps({"settings": settings, "machine": machine}, indent=1)
            place(folder, folder / SETTINGS, lambda path: path.write_text(text, encoding="utf-8"))
    return folder, []


def others(root: Path, settings: Mapping, own: Collection[str]) -> list[str]:
    """Lines about the folders in `root` whose answers are not used, because they are of other settings.

    Args:
        own: the names of the folders that this run uses, one for each of its teachers.
    """
    lines = []
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.name not in own and (found := read_settings(folder)) is not None:
            lines.append(f"{folder} holds answers of other settings and is not used "
                         f"({listed(differences(found['settings'], settings), ', ')}): delete it if no run needs it")
    return lines


class Store:
    """Writes the entries of a folder in threads.

    Attributes:
        entries, size: how many entries were written, and their bytes.
        stopped: whether nothing more is written, because the disk is full, for example.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries = self.size = 0
        self.stopped = self.warned_range = False
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(WAITING)
        self._threads = ThreadPoolExecutor(WRITERS, "answers-out")
        self._jobs: set[Future] = set()
        remove_old(folder)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.bin"

    def write(self, key: str, layout: Layout, tensors: Sequence[Tensor], ready: torch.cuda.Event | None) -> None:
        """Write an entry later, from tensors that nobody changes; `ready` tells when they are on the CPU."""
        self._room.acquire()
        job = self._threads.submit(self._write, key, layout, tensors, ready)
        self._jobs = {each for each in self._jobs if not each.done()} | {job}
        job.add_done_callback(lambda _: self._room.release())

    def flush(self) -> None:
        """Wait until all entries are written."""
        jobs, self._jobs = self._jobs, set()
        for job in jobs:
            job.result()

    def _write(self, key: str, layout: Layout, tensors: Sequence[Tensor], ready: torch.cuda.Event | None) -> None:
        if ready is not None:
            ready.synchronize()
        if self.stopped:
            return
        if any(part.stored != part.used and not tensor.isfinite().all() for part, tensor in zip(layout.parts, tensors)):
            with self._lock:
                if not self.warned_range:
                    log.warning("a teacher has values that fp16 cannot hold: such images are not stored, and the "
                                "teacher runs for them; set distill.cache.precision to fp32")
                self.warned_range = True
            return
        try:
            size = place(self.folder, self.path(key), lambda path: write_entry(path, layout, tensors))
        except (OSError, OutputError) as error:
            self._stop(error)
            return
        with self._lock:
            self.entries, self.size = self.entries + 1, self.size + size

    def _stop(self, error: OSError) -> None:
        with self._lock:
            if not self.stopped:
                log.warning("%s cannot be written (%s): the run goes on, and its teacher runs for images that are not "
                            "stored; make room, or give another distill.cache.dir", self.folder, reason_of(error))
            self.stopped = True
