"""The table of all methods, with what each of them needs."""
from collections.abc import Sequence
from typing import get_args

from . import METHODS
from .base import Method
from .base.method import Need

COLUMNS = {"features": "feature maps", "scores": "class scores", "boxes": "predicted boxes",
           "same heads": "heads that fit", "same classes": "same classes"}


def method_table() -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table for people; "?" where a method does not say what it needs."""
    rows = []
    for name, method in METHODS.items():
        rows.append([name, *needed(method, method.needs)])
        rows += [[f"{name}, {setting}", *needed(method, needs)] for setting, needs in method.needs_with.items()]
    return ["method", "labels", *(COLUMNS[need] for need in get_args(Need))], rows


def needed(method: type[Method], needs: Sequence[Need]) -> list[str]:
    """Which of labels and the columns after them a method needs."""
    return [yes_or_no(method.needs_labels), *(yes_or_no(need in needs) if needs else "?" for need in get_args(Need))]


def yes_or_no(value: bool) -> str:
    return "yes" if value else "no"
