"""Data sets and loaders of a configuration."""
import gc
import os
import random
import signal
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing import get_all_start_methods

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.augment import build_augmentations
from data.coco.columns import Repeated
from data.coco.dataset import CocoDataset
from data.coco.joined import join, oversample, use_classes
from data.coco.unlabelled import unlabelled_images
from data.config import DataConfig
from data.digests import digest, mirror_batch
from data.errors import DataError
from data.samplers import EvalBatchSampler, TrainBatchSampler
from data.transforms import padded_size


def build_dataset(config: DataConfig, split: str, training: bool, seed: int = 0,
                  classes: Sequence[str] | None = None, epochs: int | None = None) -> CocoDataset:
    """Build one split of the `data` section of a configuration; several data sets in it are joined.

    Args:
        config: the section.
        split: "train" or "val", the key whose images and annotations are read.
        training: whether to augment them.
        seed: of the augmentation.
        classes: the names of data.train's classes, to number the labels of data.val in the same way.
        epochs: of the whole training, for augmentations that stop before its end.
    Raises DataError if the section has no such split, or for data that cannot be used.
    """
    datasets = []
    for source in config.parts(split):
        datasets.append(CocoDataset(
            source.images, source.annotations, training, scale=config.scale, multi_scale=config.multi_scale,
            flip=config.flip, skip_empty=config.skip_empty, antialias=config.antialias, first=source.first, seed=seed,
            skip_unreadable=config.skip_unreadable, augment=build_augmentations(config.train_augment), epochs=epochs))
        datasets[-1].repeats = Repeated(float(source.repeat), len(datasets[-1]))
    if not datasets:
        raise DataError(f"data.{split} is not set: give it images and annotations")
    dataset = join(datasets, f"data.{split}")
    if training and config.repeat_factor is not None:
        dataset.repeats = oversample(dataset.labels, dataset.repeats, config.repeat_factor)
    if training and split == "train" and config.unlabelled is not None:
        dataset.unlabelled = unlabelled_images(config.unlabelled.folders, dataset)
    if classes is not None:
        if not set(dataset.classes) <= set(classes):
            raise DataError(f"data.{split}: needs the classes of data.train, {list(classes)}, not {dataset.classes}")
        use_classes(dataset, classes)
    return dataset


def collate(samples: list[tuple[Tensor, dict]]) -> tuple[Tensor, list[dict]]:
    """Put samples together, images zero-padded at right and bottom to the largest, rounded up to a multiple of 32.

    Returns: images, uint8 (N, 3, H, W) in channels-last memory, and the list of N targets as they are.
    """
    sizes = [padded_size(image.shape[-2:]) for image, _ in samples]
    # Decoded images are (h, w, 3) in memory and stay so here: to separate the channels would cost a worker a sixth of
    # its time, and costs the device nothing.
    images = torch.zeros(len(samples), max(h for h, _ in sizes), max(w for _, w in sizes), 3, dtype=torch.uint8)
    images = images.permute(0, 3, 1, 2)
    for padded, (image, _) in zip(images, samples, strict=True):
        padded[:, : image.shape[1], : image.shape[2]] = image
    return images, [target for _, target in samples]


def collate_with_digests(samples: list[tuple[Tensor, Mapping]], views: int = 1) -> tuple[Tensor, list[dict]]:
    """`collate`, and each target gets the `digest` of its image; with two views also that of its mirror image,
    `mirrored`."""
    images, targets = collate(samples)
    for name in ("digest", "mirrored")[:views]:
        shown = images if name == "digest" else mirror_batch(images, targets)
        targets = [target | {name: digest(image, target["image_size"])} for image, target in zip(shown, targets)]
    return images, targets


def build_loader(dataset: CocoDataset, batch_size: int, training: bool, workers: int = 2, seed: int = 0,
                 group_by_aspect: bool = True, rank: int = 0, world: int = 1, worker_start: str | None = None,
                 unlabelled_ratio: float = 1.0, digests: int = 0) -> DataLoader:
    """Build the loader of `(images, targets)` batches, see `collate`.

    In training it yields the shuffled batches of `loader.batch_sampler.epoch`, from batch `loader.batch_sampler.start`
    on, each with `unlabelled_ratio` images of `dataset.unlabelled` for each of `batch_size` labelled images; otherwise
    every image once. What it yields depends on `seed`, but not on `workers` and `worker_start`
    (as in `DataConfig`) or on the global random state, which it does not change. `digests`: of how many views targets
    get a digest, see `collate_with_digests`; 0 for none.

    Raises DataError if the system cannot start workers in this way.
    """
    if training:
        sampler = TrainBatchSampler(dataset.sizes, batch_size, seed, group_by_aspect, rank, world, dataset.repeats,
                                    0 if dataset.unlabelled is None else len(dataset.unlabelled), unlabelled_ratio)
    else:
        sampler = EvalBatchSampler(dataset.eval_sizes(), batch_size, rank, world)
    start = start_method(worker_start)
    generator = torch.Generator().manual_seed(seed)  # else each epoch would draw a number from the global generator
    collate_fn = partial(collate_with_digests, views=digests) if digests else collate
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_fn, num_workers=workers,
                      persistent_workers=workers > 0, multiprocessing_context=start if workers else None,
                      generator=generator, pin_memory=torch.cuda.is_available(),
                      worker_init_fn=partial(_init_worker, seed=seed, rank=rank))


def start_method(worker_start: str | None) -> str:
    """How workers start, see `DataConfig`. Raises DataError if the system cannot start them in this way."""
    # On Linux they are forked, whatever Python's default is: then they start at once.
    worker_start = worker_start or ("fork" if sys.platform == "linux" else "spawn")
    if worker_start not in get_all_start_methods():
        raise DataError(f"data.worker_start={worker_start} does not exist on this system: remove it")
    return worker_start


def _init_worker(worker: int, seed: int, rank: int) -> None:
    """Seed a worker's global generators, for transforms that use them (ours do not), and keep it to one thread."""
    gc.freeze()  # a search for garbage writes to every object, which would copy the main process's memory
    leave_terminal()
    worker_seed = int(np.random.SeedSequence([seed, rank, worker]).generate_state(1)[0])
    random.seed(worker_seed)
    np.random.seed(worker_seed)
    torch.manual_seed(worker_seed)
    torch.set_num_threads(1)


def leave_terminal(worker: int = 0) -> None:
    """Let Ctrl-C reach only the main process, which needs a worker's items until it has saved.

    Where there are process groups, the worker leaves that of the terminal. If the main process dies, the worker notices
    and ends by itself.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
