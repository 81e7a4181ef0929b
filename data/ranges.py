"""Marks for the type hints of a configuration: ranges of numbers, `flip: Share = 0.5`, and tables of types.

They are checked when a configuration is read (`models/build.py`).
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Annotated

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
            return f"from {self.low} to {self.high}"
        return f"above {self.low}" if self.open else f"at least {self.low}"


Positive = Annotated[float, Range(0, open=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(1)]        # of things that there must be
Number = Annotated[int, Range(0)]       # of things that there may be, or the index of one
AllOr = Annotated[int, Range(-1)]       # a limit; -1 means none
Seed = Annotated[int, Range(0, 2**32 - 1)]  # NumPy takes no others


class OneOf:
    """Marks a parameter that takes a `{type: ...}` mapping, whose type is in a table.

    Args:
        table: the classes by name.
        derived: arguments that the program gives, so that the configuration need not.
        common: a dataclass of options that every type has besides its own arguments.
        default: the type if none is given.
    """

    def __init__(self, table: Table, *derived: str, common: type | None = None, default: str | None = None):
        self.table, self.derived, self.common, self.default = table, derived, common, default
