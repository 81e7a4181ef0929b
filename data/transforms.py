"""Reading, resizing and flipping images with their boxes. Images are uint8 tensors (3, h, w), RGB."""
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.errors import DataError, UnreadableImage

MAX_PIXELS = 2 ** 28  # of an image, which then takes 768 MiB
PNG = b"\x89PNG\r\n\x1a\n"  # how PNG files begin
ORIENTATION = 0x0112  # EXIF's number of this entry
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
         8: "ROTATE_90"}  # EXIF's orientations, and what Pillow calls the way back


def read_image(path: Path, upright: bool = True) -> Tensor:
    """Decode a JPEG, PNG, WebP, BMP, TIFF (its first page) or still GIF to RGB.

    The pixels are those of OpenCV's IMREAD_COLOR, which mmdet uses. The EXIF orientation of a JPEG or PNG turns the
    image upright, so width, height and boxes refer to the upright image (`upright=False` returns the pixels as they are
    stored). Alpha is dropped, not blended. Grey and CMYK are converted. For 16-bit images, the upper eight bits are
    kept.
    Raises UnreadableImage if the file is missing, damaged, in another format, not a regular file, or if its header says
    more than `$DENSEKD_MAX_PIXELS` pixels (by default 2^28).
    """
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):  # a pipe could wait forever
            raise UnreadableImage(f"image {path} cannot be read (it is not a regular file): replace it with a file")
        content = np.fromfile(path, dtype=np.uint8)
        if not len(content):
            raise UnreadableImage(f"image {path} cannot be read (it is empty): replace the file")
        if _read_header(path) in ("BMP", "TIFF") or content[:8].tobytes() == PNG:
            return _read_with_pillow(path, upright)
        image = decode_image(torch.from_numpy(content), mode=ImageReadMode.RGB, apply_exif_orientation=upright)
    except FileNotFoundError:
        text = f"image {path} does not exist: correct the images folder or the file_name"
        raise UnreadableImage(text) from None
    except OSError as error:
        raise UnreadableImage(f"image {path} cannot be read ({error.strerror}): make it a readable file") from error
    except RuntimeError as error:
        # torchvision's message starts with a position in its source code, and a C++ backtrace may follow
        reason = re.sub(r".*\.cpp:\d+, ", "", str(error).splitlines()[0])
        raise UnreadableImage(f"image {path} cannot be read ({reason}): replace the file") from error
    if image.ndim != 3:
        raise UnreadableImage(f"image {path} cannot be read (it is animated): replace the file with a still image")
    if image.dtype == torch.uint16:  # a PNG of 16 bits per channel
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return image


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image opened with Pillow, whose own limit on pixels cannot be raised for one call, without its warnings."""
    own, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                yield image
    finally:
        Image.MAX_IMAGE_PIXELS = own


def _read_header(path: Path) -> str | None:
    """The format that a file's header states; None for a header that Pillow cannot read.

    Compares the size in the header with the limit, before decoding takes the memory for it.
    """
    limit = os.environ.get("DENSEKD_MAX_PIXELS") or str(MAX_PIXELS)
    if not limit.isdecimal():
        raise DataError(f"DENSEKD_MAX_PIXELS={limit} is not a whole number: set how many pixels an image may have")
    try:
        with _opened(path) as header:
            (width, height), form = header.size, header.format
    except (OSError, ValueError, SyntaxError):  # the decoder will say what is wrong
        return None
    if width * height > int(limit):
        raise UnreadableImage(f"image {path} cannot be read (it has {width} x {height} pixels, more than {limit}): "
                              "make it smaller, or set DENSEKD_MAX_PIXELS to a larger number")
    return form


def _read_with_pillow(path: Path, upright: bool) -> Tensor:
    """Decode a format that torchvision has no decoder for, or PNG: damaged files end the process in torchvision 0.29.
    """
    try:
        with _opened(path) as image:
            is_png = image.format == "PNG"
            if image.mode in ("I", "F") and not is_png:
                raise ValueError("its values have 32 bits")
            if upright and is_png:
                image.load()
                image = _turned(image)
            values = np.array(image if image.mode.startswith("I") else image.convert("RGB"))
    except Exception as error:  # Pillow raises many types for a damaged file
        reason = " ".join(str(error).split())
        raise UnreadableImage(f"image {path} cannot be read ({reason}): replace the file") from error
    if values.ndim == 2:  # grey, 16 bits
        values = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()


def _turned(image: Image.Image) -> Image.Image:
    """The image, upright by its EXIF entry; one that cannot be read turns nothing."""
    exif = Image.Exif()
    with suppress(Exception):  # damaged EXIF raises many types
        exif.load(image.info.get("exif"))
    turn = TURNS.get(exif.get(ORIENTATION))
    return image.transpose(Image.Transpose[turn]) if turn else image


def resized_size(size: tuple[int, int], scale: tuple[int, int]) -> tuple[int, int]:
    """The largest size (h, w) for an image of `size` (h, w) that fits `scale` and keeps the proportions.

    `scale` bounds the long and the short edge, in either order: (1333, 800) means a long edge of at most 1333 pixels
    and a short one of at most 800.
    """
    h, w = size
    factor = min(max(scale) / max(h, w), min(scale) / min(h, w))
    # A very thin image keeps at least one pixel.
    return max(1, int(h * factor + 0.5)), max(1, int(w * factor + 0.5))


def padded_size(size: tuple[int, int], divisor: int = 32) -> tuple[int, int]:
    """`size` (h, w) with each edge rounded up to a multiple of `divisor`."""
    h, w = size
    return -(-h // divisor) * divisor, -(-w // divisor) * divisor


def resize_image(image: Tensor, size: tuple[int, int], antialias: bool = False) -> Tensor:
    """Bilinear resize of an image (3, h, w) to `size` (h, w)."""
    return F.resize(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=antialias)


def resize_boxes(boxes: Tensor, old_size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Scale boxes (n, 4) from an image of `old_size` (h, w) to one of `new_size`, and clip them to the new image."""
    (old_h, old_w), (new_h, new_w) = old_size, new_size
    ratios = boxes.new_tensor([new_w / old_w, new_h / old_h, new_w / old_w, new_h / old_h])
    return (boxes * ratios).clamp(min=boxes.new_zeros(4), max=boxes.new_tensor([new_w, new_h, new_w, new_h]))


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Mirror boxes (n, 4) left to right in an image of `width` pixels."""
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=1)


def flip_image(image: Tensor) -> Tensor:
    """Mirror an image (3, h, w) left to right."""
    return F.horizontal_flip(image)
