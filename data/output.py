"""Writes the files that commands produce."""
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Errors of the operating system about a path that the user gave.
BAD_PATHS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class OutputError(OSError):
    """A path that cannot be written. The message is one line."""

    @property
    def exit_code(self) -> int:
        """2 if another path would help."""
        return 2 if isinstance(self.__cause__, BAD_PATHS) else 1


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context in which `path` is written; its folder is made first.

    Raises OutputError for what the operating system refuses: no permission, a full disk, a folder in its place.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror or error}): give another path, or make room"
                          ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, and its folder where there is none; raises as `writing`."""
    with writing(path):
        path.write_text(text, encoding="utf-8")
