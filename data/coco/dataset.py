"""A COCO-format data set."""
import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.augment import at_epoch
from data.augment.sample import IGNORED, Sample, apply, random_draws
from data.coco.annotations import read_annotations
from data.coco.columns import Column, Repeated
from data.config import check_there, find_data
from data.errors import DataError, UnreadableImage, counted
from data.images import read_image
from data.transforms import flip_boxes, flip_image, padded_size, resize_boxes, resize_image, resized_size

MAX_SKIPPED_IN_A_ROW = 100  # more unreadable images in a row have a common cause


def read_annotated_image(path: Path, size: tuple[int, int], annotation_file: Path) -> Tensor:
    """Read an image, uint8 (3, h, w), that has `size` (h, w) in the annotations.

    Raises UnreadableImage if it cannot be read, and DataError if its size is different.
    """
    image = read_image(path)
    (h, w), (stated_h, stated_w) = image.shape[1:], size
    if (h, w) != (stated_h, stated_w):
        raise DataError(f"image {path} is {w} x {h} pixels (EXIF orientation applied) but {stated_w} x {stated_h} in "
                        f"{annotation_file}: correct the annotations' width, height and boxes")
    return image


class CocoDataset(Dataset):
    """Images with their boxes, resized; in training also randomly flipped and scaled.

    Args:
        images: folder of the images. `find_data` resolves a relative path, also for `annotations`.
        annotations: COCO-format JSON file.
        training: whether to augment, and to apply `skip_empty`.
        scale: images are resized to fit it; (long edge, short edge) in pixels.
        multi_scale: in training, one of these scales is drawn per image and epoch, instead of `scale`.
        flip: probability of a horizontal flip in training.
        skip_empty: in training, leave out images without a usable box; a crowd is not a usable box.
        antialias: smooth images when they become smaller.
        first: use only this many images, the first ones in the file.
        seed: seed of the augmentation.
        skip_unreadable: in training, replace an image that cannot be read by the next readable image. Evaluation never
            does this: results on fewer images would not be comparable.
        augment: in training, augmentations from `data.augment`. Those before the resize come first, then the resize
            and the flip, then the others in their order.
        epochs: of the whole training, for augmentations that stop before its end.
    Attributes: `annotation_file`; `num_classes`, `classes` (names) and `category_ids` (the file's ids), by label;
    `image_ids`, `file_names`, `origins` (image folder, annotation file), `sizes` (original (h, w)), `boxes` (n, 4) xyxy
    in original pixels, `labels` (n,), `ignored_boxes` (m, 4), `truth` (all annotations for evaluation, see
    `Annotations.truth_of`) and `repeats` (how often training shows the image in an epoch), by index: sequences that
    compute a value when it is asked for; `num_dropped_boxes` and `num_skipped_images`; `labelled`, whether the images
    have annotations; `unlabelled`, more images without them or None: `unlabelled_images`, whose indices count on from
    the last image's.
    Raises DataError (one line) if the annotations cannot be used (see `read_annotations`), the image folder is missing,
    or no image is left after `skip_empty`. `dataset[...]` raises it if an image cannot be read (UnreadableImage) or has
    another size than in the annotations.

    The annotations cannot name a file outside the image folder: absolute paths and ".." are refused. Symbolic links are
    followed, the folder itself and links in it, because only people who may write to the folder can create them.
    """

    def __init__(self, images: str | Path, annotations: str | Path, training: bool,
                 scale: tuple[int, int] = (1333, 800), multi_scale: list[tuple[int, int]] | None = None,
                 flip: float = 0.5, skip_empty: bool = False, antialias: bool = False, first: int | None = None,
                 seed: int = 0, skip_unreadable: bool = False, augment: Sequence[Any] = (), epochs: int | None = None):
        self.image_folder = find_data(images)
        self.annotation_file = find_data(annotations)
        self.training = training
        self.scale, self.within = tuple(scale), (None, None)
        self.multi_scale = [tuple(choice) for choice in multi_scale] if multi_scale else [self.scale]
        self.flip = flip
        self.antialias = antialias
        self.seed = seed
        self.labelled, self.unlabelled = True, None
        self.skip_unreadable = skip_unreadable
        self.augment, self.epochs = list(augment) if training else [], epochs

        read = read_annotations(self.annotation_file)
        check_there("image folder", self.image_folder, folder=True)
        self.classes, self.category_ids = read.classes, read.category_ids
        self.num_classes = len(self.classes)
        self.num_dropped_boxes = read.num_dropped_boxes

        some = read.arrays["learnable"] > 0 if training and skip_empty else None
        kept = range(len(read)) if some is None or some.all() else np.flatnonzero(some)
        kept = kept[:first]
        if not len(kept):
            raise DataError(f"annotation file {self.annotation_file} has no image with a usable box: add boxes")
        self.num_skipped_images = len(read) - len(kept)
        self.image_ids = Column(read.image_id, kept)
        self.file_names = Column(read.file_name, kept)
        self.origins = Repeated((self.image_folder, self.annotation_file), len(kept))
        self.repeats = Repeated(1.0, len(kept))
        self.sizes = Column(read.size, kept, read.all_sizes)
        self.boxes = Column(read.boxes_of, kept)
        self.labels = Column(read.labels_of, kept, read.all_labels)
        self.ignored_boxes = Column(read.ignored_of, kept)
        self.truth = Column(read.truth_of, kept)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: int | tuple[int, ...]) -> tuple[Tensor, dict]:
        """Return the image and target that belong to `key`: (epoch, index), or only an index for epoch 0.

        The key contains the epoch because loader workers live longer than an epoch and are not told about a new one. A
        third number in it counts, from 1, how often the epoch has shown the image before; each time has its own draws.
        Returns: the image, uint8 (3, h, w), and a dict of `boxes` (n, 4) float32 xyxy and `ignored_boxes` (m, 4) in
            the image's pixels, `labels` (n,) int64, `image_size` (h, w), `pad_size` (h, w) rounded up to a multiple of
            32, `original_size` (h, w) and `image_id`; with `skip_unreadable`, if other images could not be read,
            also `skipped`, a list with one line per problem; if the augmentation has left none of the image's boxes,
            also `emptied`. All other entries belong to the replacement image. An image without annotations has no
            boxes, and `unlabelled`, which is true.
        """
        epoch, index, *again = key if isinstance(key, tuple) else (0, key)
        if self.unlabelled is not None and index >= len(self):
            return self.unlabelled[(epoch, index - len(self), *again)]
        image, index, skipped = self._read_image_or_next(index)
        scale, flip = self._draw_augmentation(epoch, index, *again)
        original_size = tuple(image.shape[1:])
        sample = self._sample(image, index)
        before_resize, after_resize = at_epoch(self.augment, epoch, self.epochs)

        def another(size: tuple[int, int]) -> Sample:
            other = int(torch.randint(len(self), ()))
            image, other, problems = self._read_image_or_next(other)
            skipped.extend(problems)
            factor = min(size[0] / image.shape[1], size[1] / image.shape[2])
            fitting = tuple(max(1, int(edge * factor + 0.5)) for edge in image.shape[1:])
            return self._resized(self._sample(image, other), fitting, bool(torch.rand(()) < self.flip))

        with random_draws(self.seed, epoch, self._image_key(index), *again):
            sample = apply(before_resize, sample, another)
            sample = self._resized(sample, resized_size(sample.size, scale, self.within), flip)
            sample = apply(after_resize, sample, another)
        objects = sample.labels != IGNORED
        left = (sample.boxes[:, 2:] > sample.boxes[:, :2]).all(dim=1)  # rounding may remove a thin box at the border
        target = {
            # copies, so that a change of the target does not change the data set
            "boxes": sample.boxes[objects & left],
            "labels": sample.labels[objects & left],
            "image_size": sample.size,
            "pad_size": padded_size(sample.size),
            "original_size": original_size,
            "image_id": self.image_ids[index],
            "ignored_boxes": sample.boxes[~objects],
        }
        if self.augment and len(self.labels[index]) and not len(target["boxes"]):
            target["emptied"] = True
        if not self.labelled:
            target["unlabelled"] = True
        return sample.image, target | ({"skipped": skipped} if skipped else {})

    def _sample(self, image: Tensor, index: int) -> Sample:
        """An image with its boxes, as annotated."""
        boxes = torch.from_numpy(np.concatenate([self.boxes[index], self.ignored_boxes[index]]))
        ignored = torch.full((len(self.ignored_boxes[index]),), IGNORED)
        labels = torch.cat([torch.from_numpy(self.labels[index]), ignored])
        return Sample(image, boxes, labels, torch.ones(len(boxes)))

    def _resized(self, sample: Sample, size: tuple[int, int], flip: bool) -> Sample:
        """The sample resized to `size` (h, w), and mirrored if `flip`."""
        image = resize_image(sample.image, size, self.antialias)
        boxes = resize_boxes(sample.boxes, sample.size, size)
        if flip:
            image, boxes = flip_image(image), flip_boxes(boxes, size[1])
        return sample._replace(image=image, boxes=boxes)

    def _draw_augmentation(self, epoch: int, index: int, *again: int) -> tuple[tuple[int, int], bool]:
        """Draw the scale and the flip only from (seed, epoch, image), so that worker and order have no effect."""
        if not self.training:
            return self.scale, False
        rng = np.random.default_rng([self.seed, epoch, self._image_key(index), *again])
        flip = rng.random() < self.flip
        return self.multi_scale[rng.integers(len(self.multi_scale))], flip

    def _image_key(self, index: int) -> int:
        """A number that stands for an image in seeds, which must be natural numbers."""
        image_id = self.image_ids[index]
        if not self.labelled:  # its name, so that an image more or less in the folder changes no other image
            return int.from_bytes(hashlib.sha256(image_id.encode(errors="surrogateescape")).digest()[:8], "big")
        return image_id if isinstance(image_id, int) and image_id >= 0 else index

    def _read_image_or_next(self, index: int) -> tuple[Tensor, int, list[str]]:
        """Return an image, its index, and the problems of the unreadable images before it.

        The replacement for an unreadable image depends only on the files.
        """
        if not self.training:
            return self._read_image(index), index, []
        skipped: list[str] = []
        for _ in range(min(len(self), MAX_SKIPPED_IN_A_ROW)):
            try:
                return self._read_image(index), index, skipped
            except UnreadableImage as error:
                if not self.skip_unreadable:
                    raise UnreadableImage(f"{error}, or set data.skip_unreadable=true to train without it") from error
                skipped.append(str(error))
                index = (index + 1) % len(self)
        raise DataError(f"{counted(len(skipped), 'image')} in a row cannot be read; the last one: {skipped[-1]}")

    def _read_image(self, index: int) -> Tensor:
        folder, annotation_file = self.origins[index]
        if not self.labelled:
            return read_image(folder / self.file_names[index])
        return read_annotated_image(folder / self.file_names[index], self.sizes[index], annotation_file)

    def original(self, index: int) -> Tensor:
        """An image as it is in its file, uint8 (3, h, w); raises as `dataset[...]`."""
        return self._read_image(index)

    def at_scale(self, scale: tuple[int, int], within: tuple[int | None, int | None] | None = None) -> "CocoDataset":
        """The same images, but evaluation resizes them to fit another scale (long edge, short edge); and `within`
        (height, width), which further calls keep."""
        other = copy.copy(self)
        other.scale, other.within = tuple(scale), within or self.within
        return other

    def as_annotated(self) -> "CocoDataset":
        """The same images as evaluation would read them: not augmented, and at `scale`."""
        other = copy.copy(self)
        other.training, other.augment = False, []
        return other

    def eval_sizes(self) -> list[tuple[int, int]]:
        """The (h, w) of each image after the resize of evaluation, without reading the images."""
        found = {size: resized_size(size, self.scale, self.within) for size in set(self.sizes)}
        return [found[size] for size in self.sizes]
