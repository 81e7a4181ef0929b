"""Writes the files that commands produce: completely or not at all, and every failure is one line with the path."""
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Errors of the operating system about a path that the user gave.
BAD_PATHS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
REASONS = {errno.ENOSPC: "disk full", errno.EDQUOT: "disk quota used up", errno.EFBIG: "larger than files may be here"}


class OutputError(OSError):
    """A path that cannot be written. The message is one line."""

    @property
    def exit_code(self) -> int:
        """2 if another path would help."""
        return 2 if isinstance(self.__cause__, BAD_PATHS) else 1


def no_room(error: BaseException | None) -> OSError | None:
    """The full disk behind an error, if there is one: torch.save hides it in a RuntimeError."""
    while error is not None and not (isinstance(error, OSError) and error.errno in REASONS):
        error = error.__cause__ or error.__context__
    return error


def reason_of(error: OSError) -> str:
    """Why the operating system refused something, in a few words."""
    return REASONS.get(error.errno) or error.strerror or str(error)


def check_output(path: Path, folder: bool = False) -> None:
    """Raise OutputError for a file, or a folder, that cannot be written: before the work whose result it is to hold."""
    target = Path(os.path.realpath(path))  # of a link
    there = next(each for each in (target, *target.parents) if each.exists())
    wanted_folder = folder or there != target
    error: type[OSError] | None = None
    if wanted_folder and not there.is_dir():
        error, number = NotADirectoryError, errno.ENOTDIR
    elif not wanted_folder and there.is_dir():
        error, number = IsADirectoryError, errno.EISDIR
    elif not os.access(there.parent if there.is_file() and not folder else there, os.W_OK):
        error, number = PermissionError, errno.EACCES
    if error is not None:
        raise cannot_write(path, os.strerror(number)) from error(number, os.strerror(number))


def cannot_write(path: Path, reason: str) -> OutputError:
    """The error for a path that the operating system refuses."""
    return OutputError(f"{path} cannot be written ({reason}): give another path, or make room")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A context in which `path` is written in place, for example a log; its folder is made first.

    Raises OutputError for what the operating system refuses: no permission, a full disk, a folder in its place.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OutputError:
        raise
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else no_room(error)
        if cause is None:
            raise
        raise cannot_write(path, reason_of(cause)) from cause


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A context that gives a temporary file beside `path` to write to, and renames it to `path` at the end.

    After any error `path` is what it was before. What is no regular file, for example a pipe, is written in place.
    Raises as `naming`.
    """
    with naming(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            yield path
            return
        target = Path(os.path.realpath(path))  # a link stays one
        partial = target.with_name(f"{target.name}.tmp")
        try:
            yield partial
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, and its folder where there is none; raises as `naming`."""
    with writing(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file, and its folder where there is none; raises as `naming`."""
    write_bytes(path, text.encode())
