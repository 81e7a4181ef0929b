"""Sequences with a value for each image that are no lists: of millions of images, a list would fill the memory of every
process. They are read like lists, and equal to lists with the same values."""
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np


class Column(Sequence):
    """Values that are computed when they are asked for.

    Args:
        read: gives the value of a place. What loader workers get must be quick to pickle, so it keeps no list.
        places: of each image.
        read_all: gives the values of many places at once: what `np.asarray` of the column is, or `flat`.
    """

    def __init__(self, read: Callable[[int], Any], places: Sequence[int] | np.ndarray,
                 read_all: Callable[[Any], Any] | None = None):
        self.read, self.places, self.read_all = read, places, read_all

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int | slice) -> Any:
        return list(map(self.read, self.places[index])) if isinstance(index, slice) else self.read(self.places[index])

    def __iter__(self) -> Iterator[Any]:
        return map(self.read, self.places)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(list(self) if self.read_all is None else self.read_all(self.places), dtype)

    def __eq__(self, other: object) -> bool:
        return same(self, other)


class Texts(Sequence):
    """Texts, one behind the other.

    Args:
        content: (B,) uint8, in UTF-8; bytes that are no UTF-8 in a file's name are kept.
        ends: (n + 1,) int64, where each text starts and the last one ends.
    """

    def __init__(self, content: np.ndarray, ends: np.ndarray):
        self.content, self.ends = content, ends

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Texts":
        parts = [text.encode("utf-8", "surrogateescape") for text in texts]
        ends = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(parts), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self.content[self.ends[index]:self.ends[index + 1]].tobytes().decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        return same(self, other)


class Repeated(Sequence):
    """The same value for each of so many images."""

    def __init__(self, value: Any, count: int):
        self.value, self.count = value, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int | slice) -> Any:
        places = range(self.count)[index]  # or IndexError
        return [self.value] * len(places) if isinstance(index, slice) else self.value

    def __iter__(self) -> Iterator[Any]:
        return repeat(self.value, self.count)

    def __eq__(self, other: object) -> bool:
        return same(self, other)


class Joined(Sequence):
    """The values of several sequences, one after the other."""

    def __init__(self, parts: Sequence[Sequence]):
        self.parts, self.ends = list(parts), np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        k = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[k][index - (int(self.ends[k - 1]) if k else 0)]

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self.parts)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate([np.asarray(part, dtype) for part in self.parts])

    def __eq__(self, other: object) -> bool:
        return same(self, other)


def same(one: Sequence, other: object) -> bool:
    """Whether two sequences have the same values."""
    return (isinstance(other, Sequence) and not isinstance(other, str) and len(one) == len(other)
            and all(a == b for a, b in zip(one, other)))


def flat(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of all images, one after the other, and the length of each, (n,)."""
    if isinstance(arrays, Joined):
        values, lengths = zip(*map(flat, arrays.parts))
        return np.concatenate(values), np.concatenate(lengths)
    if isinstance(arrays, Column) and arrays.read_all is not None:
        return arrays.read_all(arrays.places)
    return (np.concatenate(list(arrays)) if len(arrays) else np.zeros(0, np.int64),
            np.fromiter(map(len, arrays), np.int64, len(arrays)))
