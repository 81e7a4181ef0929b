"""The errors that bad data raises."""
import json
from collections.abc import Mapping, Sequence
from typing import Any

MAX_LISTED = 10  # problems named in an error; the rest are counted


class DataError(ValueError):
    """Data that cannot be used. The message is one line: what is wrong, in which file, what to do about it."""

    exit_code = 2

    def __init__(self, message: str):
        # An error from a DataLoader worker is raised again in the main process with its whole traceback as the
        # message; the last line of that is the original message.
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f"{__name__}.{type(self).__name__}: "))


class UnreadableImage(DataError):
    """An image file that is missing, damaged or of an unknown format: the one error that training may skip."""


def listed(problems: Sequence[str], separator: str = "; ") -> str:
    """Problems in one line; beyond the first MAX_LISTED they are only counted."""
    rest = [f"and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    return separator.join([*problems[:MAX_LISTED], *rest])


def counted(count: int, one: str, many: str | None = None) -> str:
    """`1 problem`, `2 boxes`; `many` is given where an ending does not do: "image is", "images are"."""
    many = many or f"{one}{'es' if one.endswith(('s', 'x', 'tch')) else 's'}"
    return f"{count} {one if count == 1 else many}"


def one_line(text: object, limit: int = 200) -> str:
    """Text on one line and cut to `limit` characters, because what a file holds may be any text."""
    words = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return words if len(words) <= limit else words[: limit - 3] + "..."


def shown(value: object) -> str:
    """A value for a message, see `one_line`."""
    return one_line(repr(value))


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """What differs between two trees of settings, as `key was old and is new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [text for name in dict.fromkeys([*old, *new])
                for text in differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))]
    return [] if old == new else [f"{key} was {one_line(json.dumps(old), 60)} and is {one_line(json.dumps(new), 60)}"]
