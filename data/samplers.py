"""Batch samplers. A batch is a list of the keys that CocoDataset takes: (epoch, index), with a third number for an
image that the epoch has shown before."""
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice

import numpy as np
from torch.utils.data import Sampler

from data.transforms import padded_size

Batch = list[tuple[int, ...]]


class TrainBatchSampler(Sampler[Batch]):
    """Shuffled batches of images, with landscape and portrait in separate batches, sharded over processes.

    A global batch has `world * batch_size` images and is divided between the processes: step k of N processes with
    batch size B has the same images as step k of one process with batch size N * B. Every image occurs once per epoch,
    or as often as `repeats` says. Of a repeat like 2.3, each epoch draws whether the image occurs two or three times.
    The draws are systematic: the number of images is the same in each epoch, so that an epoch has a fixed number of
    steps for the schedule, for several processes and to resume.

    All processes get the same number of batches, with equal sizes in each step. For this, the last batch is filled up
    to a multiple of `world` with up to `world - 1` images from the start of the epoch.

    Args:
        sizes: (h, w) of each image.
        batch_size: images per process and step; the last step of an epoch may have fewer.
        seed: seed of the permutation, together with the epoch.
        group_by_aspect: put landscape (w >= h) and portrait images into separate batches; at the end of an epoch, the
            remaining images are mixed.
        rank, world: the index of this process and the number of processes.
        repeats: for each image, how often it occurs in an epoch, on average; at least 1.
        unlabelled: number of unlabelled images; their indices come after those of the others. Each batch ends with some
            of them: they are shown in a random order, and in another one when all have been shown. An epoch ends when
            all labelled images have been shown, and the next epoch goes on with the unlabelled ones that follow.
        unlabelled_ratio: unlabelled images in a batch for each labelled one, rounded up to a whole number per process.
    Attributes: `shown`, the number of images in an epoch. To set before iterating:
        epoch: number of the epoch, for the permutation and the keys.
        start: first batch to yield, to continue in the middle of an epoch; it applies once and is 0 afterwards.
    """

    def __init__(self, sizes: list[tuple[int, int]], batch_size: int, seed: int, group_by_aspect: bool = True,
                 rank: int = 0, world: int = 1, repeats: Sequence[float] | None = None, unlabelled: int = 0,
                 unlabelled_ratio: float = 1.0):
        self.images = len(sizes)
        heights, widths = np.asarray(sizes).reshape(-1, 2).T
        self.portrait = widths < heights
        self.repeats = np.ones(self.images) if repeats is None else np.array(repeats)
        self.shown = int(np.floor(self.repeats).sum()) + round((self.repeats % 1).sum())
        self.batch_size = batch_size
        self.seed = seed
        self.group_by_aspect = group_by_aspect
        self.rank = rank
        self.world = world
        self.unlabelled, self.unlabelled_ratio = unlabelled, unlabelled_ratio
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        """Number of batches of this process in a whole epoch, for any `start`."""
        return math.ceil(self.shown / (self.batch_size * self.world))

    def __iter__(self) -> Iterator[Batch]:
        # This is a generator because DataLoader first creates an iterator that it never advances, and then the one that
        # it uses. Only the second may reset `start`.
        epoch, start, self.start = self.epoch, self.start, 0
        full, last = self._global_batches()
        more = self._unlabelled_images(epoch, [self.batch_size * self.world] * len(full) + list(map(len, last)))
        for batch, others in islice(zip(chain(full, last), more), start, None):
            own = batch[self.rank :: self.world].tolist()
            yield [(epoch, index, again) if again else (epoch, index)
                   for index, again in own + others[self.rank :: self.world]]

    def unlabelled_in(self, images: int) -> int:
        """The number of unlabelled images that come to a global batch of so many labelled ones."""
        if not self.unlabelled:
            return 0
        per_process = math.ceil(round(images / self.world * self.unlabelled_ratio, 6))
        return self.world * max(1, per_process)

    def _unlabelled_images(self, epoch: int, sizes: list[int]) -> Iterator[list[tuple[int, int]]]:
        """The unlabelled images of the epoch's global batches, which have so many labelled ones: as in `_images`."""
        numbers = list(map(self.unlabelled_in, sizes))
        position = epoch * sum(numbers)
        orders: dict[int, np.ndarray] = {}  # of each time that all images are shown
        seen = Counter()
        for number in numbers:
            found = []
            for place in range(position, position + number):
                times, place = divmod(place, self.unlabelled)
                if times not in orders:
                    seeds = np.random.SeedSequence([self.seed, times], spawn_key=(2,))
                    orders[times] = np.random.default_rng(seeds).permutation(self.unlabelled)
                index = self.images + int(orders[times][place])
                found.append((index, seen[index]))
                seen[index] += 1
            position += number
            yield found

    def batches_of_all(self, epoch: int) -> list[list[int]]:
        """The indices of the images in every batch of every process, in one epoch."""
        before, self.epoch = self.epoch, epoch
        full, last = self._global_batches()
        self.epoch = before
        batches = chain(full, last)
        return [batch[rank :: self.world, 0].tolist() for batch in batches for rank in range(self.world)]

    def _images(self) -> np.ndarray:
        """The images of the epoch in the data set's order: (n, 2) index and k, how often it has been shown before."""
        times = np.floor(self.repeats).astype(int)
        rest = self.repeats % 1
        if extra := self.shown - times.sum():
            # Along a line, each image in a random order has a piece as long as the rest of its repeats. It occurs once
            # more for each of `extra` marks at equal distances that lie in its piece.
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, self.epoch], spawn_key=(1,)))
            order = rng.permutation(len(times))
            marks = np.minimum(np.cumsum(rest[order]) * (extra / rest.sum()) + rng.random(), extra).astype(int)
            marks[-1] = extra  # whatever rounding has made of the sum
            times[order] += np.diff(marks, prepend=0)
        index = np.repeat(np.arange(len(times)), times)
        return np.column_stack([index, np.arange(len(index)) - np.repeat(np.cumsum(times) - times, times)])

    def _global_batches(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """The global batches of the epoch, of rows of `_images`: the full ones, (b, size, 2), and the last ones."""
        images = self._images()
        order = images[np.random.default_rng([self.seed, self.epoch]).permutation(len(images))]
        global_size = self.batch_size * self.world
        portrait = self.portrait[order[:, 0]] & self.group_by_aspect
        groups = [np.flatnonzero(portrait == group) for group in (False, True)]
        whole = [len(group) // global_size * global_size for group in groups]
        full = np.concatenate([group[:end].reshape(-1, global_size) for group, end in zip(groups, whole)])
        full = full[full[:, -1].argsort()]  # a batch comes when its last image has come
        rest = np.concatenate([group[end:] for group, end in zip(groups[::-1], whole[::-1])])
        more = -len(rest) % self.world
        rest = np.append(rest, np.resize(np.arange(len(order)), more))  # there may be fewer images than processes
        last = [rest[i : i + global_size] for i in range(0, len(rest), global_size)]
        return order[full], [order[batch] for batch in last]


class EvalBatchSampler(Sampler[Batch]):
    """Every image once, in batches whose images have the same padded size, sharded over processes.

    No image gets more padding than it would get alone, so the detections do not depend on the batch size or on the
    number of processes. Processes may get different numbers of batches.

    Args:
        sizes: (h, w) of each image after the resize, as the detector gets it.
        batch_size: images per batch, at most.
        rank, world: the index of this process and the number of processes.
    Attributes:
        most: the largest number of batches of any process.
    """

    def __init__(self, sizes: list[tuple[int, int]], batch_size: int, rank: int = 0, world: int = 1):
        groups: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            groups.setdefault(padded_size(size), []).append(index)
        batches = [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
        self.batches: list[Batch] = [[(0, index) for index in batch] for batch in batches[rank::world]]
        self.most = math.ceil(len(batches) / world)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)
