"""The work dir of a run, which no other run may write into at the same time."""
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO
from weakref import WeakSet

from ..exceptions import WorkDirError

try:
    import fcntl
except ImportError:  # Windows, where runs are not kept apart
    fcntl = None

_held: WeakSet[IO] = WeakSet()


def open_work_dir(work_dir: Path, lock: bool = True) -> AbstractContextManager:
    """Make a work dir and take its lock, `run.lock`, which is given back at the end of the context.

    The kernel holds the lock for this process alone, so that a run which was killed leaves none behind.

    Args:
        lock: whether to take it; one process of a run does.
    Raises:
        WorkDirError: the folder cannot be made or written, or another run has the lock.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        return _take(work_dir) if lock else nullcontext()
    except BlockingIOError:
        text = f"another run is at work in {work_dir}: wait for its end, or give another --work-dir"
        raise WorkDirError(text) from None
    except OSError as error:
        text = f"work dir {work_dir} cannot be written ({error.strerror}): give another --work-dir"
        raise WorkDirError(text) from None


def _take(work_dir: Path) -> IO:
    """The open lock file."""
    file = open(work_dir / "run.lock", "a")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except OSError:  # a file system that knows no locks, as clusters have them: the run goes on without
        pass
    _held.add(file)
    return file


def _let_go() -> None:
    """Close a forked process's copies of the locks: a loader's worker that outlives its run must not keep it."""
    for file in _held:
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
