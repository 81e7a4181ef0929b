"""Reads and writes image files with Pillow. Images are uint8 tensors (3, h, w), RGB."""
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data.errors import DataError, UnreadableImage
from data.output import write_bytes

try:
    import simplejpeg  # decodes JPEG faster than Pillow, to the same pixels
except ImportError:
    simplejpeg = None

MAX_PIXELS = 2 ** 28  # of an image, which then takes 768 MiB
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow has more; some of them run other programs
TURNED = (None, None, *(Image.Transpose[name] for name in (  # by EXIF orientation
    "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")))


def read_image(path: Path, upright: bool = True) -> Tensor:
    """Decode a JPEG, PNG, still WebP, BMP, TIFF (its first page) or still GIF to RGB.

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
        content = Path(path).read_bytes()
    except FileNotFoundError:
        text = f"image {path} does not exist: correct the images folder or the file_name"
        raise UnreadableImage(text) from None
    except OSError as error:
        raise UnreadableImage(f"image {path} cannot be read ({error.strerror}): make it a readable file") from error
    try:
        return _decode(content, upright)
    except DataError:
        raise
    except _TooLarge as error:
        raise UnreadableImage(f"image {path} cannot be read (it has {error}): make it smaller, or set "
                              "DENSEKD_MAX_PIXELS to a larger number") from None
    except Exception as error:  # Pillow raises many types for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "it is damaged, or not a JPEG, PNG, WebP, BMP, TIFF or GIF"
        raise UnreadableImage(f"image {path} cannot be read ({reason}): replace the file") from error


class _TooLarge(ValueError):
    """More pixels than the limit."""


def _decode(content: bytes, upright: bool) -> Tensor:
    if not content:
        raise ValueError("it is empty")
    with _opened(content) as image:
        kind = "JPEG" if image.format == "MPO" else image.format  # some cameras put several JPEGs into a file
        if kind in ("GIF", "WEBP") and image.is_animated:
            raise ValueError("it is animated")
        turn = None
        if kind == "PNG":
            image.load()  # EXIF data may stand behind the pixels, and an error in these must not pass for one in those
        if upright and kind in ("JPEG", "PNG"):
            with suppress(Exception):  # with wrong EXIF data an image is still readable
                turn = TURNED[image.getexif().get(0x0112, 1)]
        pixels = _decode_jpeg(content) if kind == "JPEG" and image.mode == "RGB" and turn is None else None
        if pixels is None:
            pixels = _pixels(image if turn is None else image.transpose(turn))
    return torch.from_numpy(pixels).permute(2, 0, 1)


@contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """An image opened with Pillow, of which only the header is read, and compared with the limit on pixels."""
    limit = os.environ.get("DENSEKD_MAX_PIXELS") or str(MAX_PIXELS)
    if not limit.isdecimal():
        raise DataError(f"DENSEKD_MAX_PIXELS={limit} is not a whole number: set how many pixels an image may have")
    own, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # Pillow's own limit cannot be raised for one call
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about EXIF data, and transparency that is dropped
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
                if width * height > int(limit):
                    raise _TooLarge(f"{width} x {height} pixels, more than {limit}")
                yield image
    finally:
        Image.MAX_IMAGE_PIXELS = own


def _decode_jpeg(content: bytes) -> np.ndarray | None:
    """(h, w, 3) of a JPEG by simplejpeg; None without it, or if it finds anything wrong: Pillow then decides."""
    with suppress(ValueError):
        return simplejpeg and simplejpeg.decode_jpeg(content, "RGB", fastdct=False, fastupsample=False)
    return None


def _pixels(image: Image.Image) -> np.ndarray:
    """(h, w, 3) of an image of Pillow, of any mode."""
    if image.mode in ("I", "F"):
        raise ValueError("its values have 32 bits")
    if image.mode.startswith("I;16"):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def write_picture(path: Path, image: Tensor, quality: int = 95) -> None:
    """Write uint8 (3, h, w) as PNG, or as JPEG of this quality, as the name says; raises as `data.output.naming`."""
    write_bytes(path, encode_picture(image, "PNG" if path.suffix.lower() == ".png" else "JPEG", quality))


def encode_picture(image: Tensor, kind: str = "JPEG", quality: int = 95) -> bytes:
    """The content of a file with uint8 (3, h, w), of a `kind` that Pillow knows."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, kind, quality=quality)
    return file.getvalue()
