"""Locks on files, between processes. The kernel releases them when a process ends."""
import os
from pathlib import Path
from typing import IO
from weakref import WeakSet

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

_held: WeakSet[IO] = WeakSet()


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
