"""Marks for type hints: ranges of numbers, lengths of lists and tables of types.

For example `flip: Share = 0.5`, `strides: Some[Count]`. They are checked when a configuration or a command line is
read.
"""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Annotated, TypeVar

Table = Mapping[str, Callable]


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, without `low` itself if `open`."""

    low: float
    high: float = inf
    open: bool = False

    def __contains__(self, value: float) -> bool:
        return (value > self.low if self.open else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        if self.high != inf:
            return f"above {self.low} and up to {self.high}" if self.open else f"from {self.low} to {self.high}"
        return f"above {self.low}" if self.open else f"at least {self.low}"


class NotEmpty:
    """The lists with at least one entry."""

    def __contains__(self, value: list | tuple) -> bool:
        return len(value) > 0

    def __str__(self) -> str:
        return "a list with at least one entry"


Positive = Annotated[float, Range(0, open=True)]
Factor = Annotated[float, Range(0.001, 1000)]  # of a size, which must stay within an image's
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(1)]        # of things that there must be
Number = Annotated[int, Range(0)]       # of things that there may be, or the index of one
Few = Annotated[int, Range(1, 1000)]    # of things that are made at once: layers, levels, files
FewOrNone = Annotated[int, Range(0, 1000)]  # the same, and of processes
AllOr = Annotated[int, Range(-1)]       # a limit; -1 means none
Seed = Annotated[int, Range(0, 2**32 - 1)]  # NumPy takes no others
OrMinusOne = Annotated[float, Range(-1)]    # a number that -1 turns off
Temperature = Annotated[float, Range(1)]    # of distributions that are softened, never sharpened

Entry = TypeVar("Entry")
Some = Annotated[list[Entry], NotEmpty()]    # a list that must not be empty


class OneOf:
    """Marks a parameter that takes a `{type: ...}` mapping, whose type is in a table.

    Args:
        table: the classes by name.
        derived: arguments that the program gives, so that the configuration need not.
        common: a dataclass of options that every type has besides its own arguments.
        default: the type if none is given.
        takes: of a table of losses, what they are called with; only losses that take one of these may stand here.
        light: the classes hold no weights, so one is made at once to see whether its arguments fit each other.
    """

    def __init__(self, table: Table, *derived: str, common: type | None = None, default: str | None = None,
                 takes: Sequence[str] = (), light: bool = False):
        self.table, self.derived, self.common, self.default = table, derived, common, default
        self.takes, self.light = takes, light or bool(takes)
