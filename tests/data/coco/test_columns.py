"""Sequences with a value for each image."""
import pickle

import numpy as np
import pytest

from data.coco.columns import Column, Joined, Repeated, Texts, flat

TABLE = np.arange(12).reshape(6, 2)


def row(place):
    return tuple(TABLE[place].tolist())


def rows(places):
    return TABLE[np.asarray(places)]


COLUMNS = [(Column(row, range(6), rows), [row(i) for i in range(6)]),
           (Column(row, np.array([4, 1]), rows), [row(4), row(1)]),
           (Repeated("x", 3), ["x"] * 3),
           (Texts.of(["a", "", "é\udcff", "b/c.jpg"]), ["a", "", "é\udcff", "b/c.jpg"]),
           (Joined([Texts.of(["a"]), Repeated("b", 2), ["c", "d"]]), ["a", "b", "b", "c", "d"])]


@pytest.mark.parametrize(("column", "values"), COLUMNS)
def test_they_read_like_lists(column, values):
    for one in (column, pickle.loads(pickle.dumps(column))):
        assert len(one) == len(values) and list(one) == values and one == values and not one != values
        assert [one[i] for i in range(-len(values), len(values))] == values * 2
        assert one[1:] == values[1:] and one[:-1] == values[:-1] and one[::-1] == values[::-1]
        assert one != [*values[:-1], "other"] and one != values[:-1] and values[1] in one
        assert np.asarray(one).tolist() == np.asarray(values).tolist()
        for index in (len(values), -len(values) - 1):
            with pytest.raises(IndexError):
                one[index]


def test_arrays_of_all_images():
    parts = [np.array([3, 1]), np.zeros(0, np.int64), np.array([2])]
    for column in (parts, Column(parts.__getitem__, range(3)), Joined([parts[:1], parts[1:]])):
        values, lengths = flat(column)
        assert values.tolist() == [3, 1, 2] and lengths.tolist() == [2, 0, 1]
    assert flat([])[0].tolist() == flat([])[1].tolist() == []
