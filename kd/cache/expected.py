"""How many answers a run will store, and how often its teachers will still run."""
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.samplers import TrainBatchSampler
from data.transforms import padded_size

MOST = 5_000_000  # images that are counted one by one; the epochs after them are taken to be like the last of these
SIDES = 2 ** 12   # more than the multiples of 32 in the side of an image
BATCH = 2 ** 10   # more than the images of a batch
MIRROR = SIDES ** 2 * BATCH  # the bit of a key that says whether the image is flipped


class Expected(NamedTuple):
    """What is to be expected of a run that starts with an empty cache."""

    entries: int     # views that are stored
    pixels: int      # of all stored views, with padding
    common: tuple[int, int]  # (h, w), the most frequent padded size
    computed: float  # images that the teacher runs on, as a share of those that are shown


def expect(sampler: TrainBatchSampler, sizes: Sequence[tuple[int, int]], flip: float, epochs: int, views: int
           ) -> Expected:
    """Go through the batches of all epochs. Flips are drawn, but not as the run will draw them.

    Args:
        sizes: (h, w) of each image after the resize.
        flip: the probability of a flip.
        views: how many views are stored when the first one is met, see `stored_views`.
    """
    sides = np.array([padded_size(size) for size in sizes]) // 32
    draws, seen, computed, counted = np.random.default_rng(0), np.zeros(0, np.int64), [], 0
    for epoch in range(epochs):
        batches = sampler.batches_of_all(epoch)
        lengths = np.array([len(batch) for batch in batches])
        images, starts = np.concatenate(batches).astype(np.int64), np.cumsum(lengths) - lengths
        padded = np.repeat(np.maximum.reduceat(sides[images], starts), lengths, axis=0)
        shown = images * 2 + (draws.random(len(images)) < flip)
        keys = ((shown * SIDES + padded[:, 0]) * SIDES + padded[:, 1]) * BATCH + np.minimum(
            np.repeat(lengths, lengths), BATCH - 1)
        passes = np.logical_or.reduceat(~np.isin(keys, seen), starts).astype(int)
        if views == 2:
            mirrored = keys ^ MIRROR
            new, keys = np.repeat(passes, lengths) > 0, np.concatenate([keys, mirrored])
            passes = passes * (1 + np.logical_or.reduceat(~np.isin(mirrored, seen), starts))
            keys = keys[np.tile(new, 2)]
        computed.append((passes * lengths).sum() / lengths.sum())
        seen = np.union1d(seen, keys)
        counted += len(images)
        if counted > MOST:
            break
    computed += computed[-1:] * (epochs - len(computed))
    height, width = seen >> 22 & SIDES - 1, seen >> 10 & SIDES - 1
    found, times = np.unique(np.stack([height, width]), axis=1, return_counts=True)
    common = tuple(int(side) * 32 for side in found[:, times.argmax()])
    return Expected(len(seen), int((height * width).sum()) * 32 ** 2, common, float(np.mean(computed)))
