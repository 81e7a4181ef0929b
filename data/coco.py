"""A COCO-format data set."""
import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.annotations import read_annotations
from data.config import check_there, find_data
from data.errors import DataError, UnreadableImage, counted
from data.inputs.images import read_image
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
    Attributes: `annotation_file`; `num_classes`, `classes` (names) and `category_ids` (the file's ids), by label;
    `image_ids`, `file_names`, `sizes` (original (h, w)), `boxes` (n, 4) xyxy in original pixels, `labels` (n,) and
    `ignored_boxes` (m, 4), by index; `num_dropped_boxes` and `num_skipped_images`.
    Raises DataError (one line) if the annotations cannot be used (see `read_annotations`), the image folder is missing,
    or no image is left after `skip_empty`. `dataset[...]` raises it if an image cannot be read (UnreadableImage) or has
    another size than in the annotations.

    The annotations cannot name a file outside the image folder: absolute paths and ".." are refused. Symbolic links are
    followed, the folder itself and links in it, because only people who may write to the folder can create them.
    """

    def __init__(self, images: str | Path, annotations: str | Path, training: bool,
                 scale: tuple[int, int] = (1333, 800), multi_scale: list[tuple[int, int]] | None = None,
                 flip: float = 0.5, skip_empty: bool = False, antialias: bool = False, first: int | None = None,
                 seed: int = 0, skip_unreadable: bool = False):
        self.image_folder = find_data(images)
        self.annotation_file = find_data(annotations)
        self.training = training
        self.scale = tuple(scale)
        self.multi_scale = [tuple(choice) for choice in multi_scale] if multi_scale else [self.scale]
        self.flip = flip
        self.antialias = antialias
        self.seed = seed
        self.skip_unreadable = skip_unreadable

        read = read_annotations(self.annotation_file)
        check_there("image folder", self.image_folder, folder=True)
        self.classes, self.category_ids = read.classes, read.category_ids
        self.num_classes = len(self.classes)
        self.num_dropped_boxes = read.num_dropped_boxes

        kept = [i for i, labels in enumerate(read.labels) if len(labels) or not (training and skip_empty)][:first]
        if not kept:
            raise DataError(f"annotation file {self.annotation_file} has no image with a usable box: add boxes")
        self.num_skipped_images = len(read.image_ids) - len(kept)
        self.image_ids = [read.image_ids[i] for i in kept]
        self.file_names = [read.file_names[i] for i in kept]
        self.sizes = [read.sizes[i] for i in kept]
        self.boxes = [read.boxes[i] for i in kept]
        self.labels = [read.labels[i] for i in kept]
        self.ignored_boxes = [read.ignored_boxes[i] for i in kept]

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, dict]:
        """Return the image and target that belong to `key`: (epoch, index), or only an index for epoch 0.

        The key contains the epoch because loader workers live longer than an epoch and are not told about a new one.
        Returns: the image, uint8 (3, h, w), and a dict of `boxes` (n, 4) float32 xyxy and `ignored_boxes` (m, 4) in
            the image's pixels, `labels` (n,) int64, `image_size` (h, w), `pad_size` (h, w) rounded up to a multiple of
            32, `original_size` (h, w) and `image_id`; with `skip_unreadable`, if other images could not be read,
            also `skipped`, a list with one line per problem. All other entries belong to the replacement image.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, index, skipped = self._read_image_or_next(index)
        scale, flip = self._draw_augmentation(epoch, index)
        original_size = self.sizes[index]
        size = resized_size(original_size, scale)
        image = resize_image(image, size, self.antialias)
        boxes = resize_boxes(torch.from_numpy(self.boxes[index]), original_size, size)
        ignored_boxes = resize_boxes(torch.from_numpy(self.ignored_boxes[index]), original_size, size)
        if flip:
            image = flip_image(image)
            boxes = flip_boxes(boxes, size[1])
            ignored_boxes = flip_boxes(ignored_boxes, size[1])
        left = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # rounding may remove a thin box at the border
        target = {
            # copies, so that a change of the target does not change the data set
            "boxes": boxes[left],
            "labels": torch.from_numpy(self.labels[index])[left],
            "image_size": size,
            "pad_size": padded_size(size),
            "original_size": original_size,
            "image_id": self.image_ids[index],
            "ignored_boxes": ignored_boxes,
        }
        return image, target | ({"skipped": skipped} if skipped else {})

    def _draw_augmentation(self, epoch: int, index: int) -> tuple[tuple[int, int], bool]:
        """Draw the scale and the flip only from (seed, epoch, image), so that worker and order have no effect."""
        if not self.training:
            return self.scale, False
        image_id = self.image_ids[index]
        # The seeds of a generator must be natural numbers.
        image_key = image_id if isinstance(image_id, int) and image_id >= 0 else index
        rng = np.random.default_rng([self.seed, epoch, image_key])
        flip = rng.random() < self.flip
        return self.multi_scale[rng.integers(len(self.multi_scale))], flip

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
        path = self.image_folder / self.file_names[index]
        return read_annotated_image(path, self.sizes[index], self.annotation_file)

    def at_scale(self, scale: tuple[int, int]) -> "CocoDataset":
        """The same images, but evaluation resizes them to fit another scale (long edge, short edge)."""
        other = copy.copy(self)
        other.scale = tuple(scale)
        return other

    def eval_sizes(self) -> list[tuple[int, int]]:
        """The (h, w) of each image after the resize of evaluation, without reading the images."""
        return [resized_size(size, self.scale) for size in self.sizes]
