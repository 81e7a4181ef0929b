"""The lock on a work dir: two runs must not write into it at the same time."""
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO
from weakref import WeakSet

from data.output import reason_of

from ..exceptions import WorkDirError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

_held: WeakSet[IO] = WeakSet()


def open_work_dir(work_dir: Path, lock: bool = True) -> AbstractContextManager:
    """Create a work dir and take its lock, `run.lock`, which is released at the end of the context.

    The kernel releases the lock when this process ends, so a run that is killed leaves no lock behind.

    Args:
        lock: whether to take the lock; only one process of a run takes it.
    Raises:
        WorkDirError: the folder cannot be made or written, or another run has the lock.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        return _take(work_dir) if lock else nullcontext()
    except BlockingIOError:
        text = f"another run is at work in {work_dir}: wait until it ends, or give another --work-dir"
        raise WorkDirError(text) from None
    except OSError as error:
        text = f"work dir {work_dir} cannot be written ({reason_of(error)}): give another --work-dir"
        raise WorkDirError(text) from None


def in_use(work_dir: Path) -> bool:
    """Whether a run is at work in a work dir."""
    if not (work_dir / "run.lock").exists():
        return False
    try:
        _take(work_dir).close()
    except BlockingIOError:
        return True
    return False


def _take(work_dir: Path) -> IO:
    """Take the lock, and return its open file."""
    file = open(work_dir / "run.lock", "a")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(0)  # the lock is on one byte from here; the file may be shorter
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError) as error:  # the second on Windows
        file.close()
        raise BlockingIOError from error
    except OSError:  # a file system without locks, as on some clusters: the run goes on without one
        pass
    _held.add(file)
    return file


def _let_go() -> None:
    """Close a forked process's copies of the locks, so that a loader worker which outlives its run keeps none."""
    for file in _held:
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
