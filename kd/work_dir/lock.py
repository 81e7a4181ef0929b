"""The lock on a work dir: two runs must not write into it at the same time."""
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from data.output import reason_of
from data.shared import take_lock

from ..exceptions import WorkDirError


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
        return take_lock(work_dir / "run.lock") if lock else nullcontext()
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
        take_lock(work_dir / "run.lock").close()
    except BlockingIOError:
        return True
    return False
