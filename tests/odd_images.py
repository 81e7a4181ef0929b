"""Functions that write unusual image files, as they occur in real data sets."""
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    """(h, w, 3) uint8, smooth enough to survive JPEG, different in every corner and channel."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    shift = np.random.default_rng(seed).uniform(0, 0.2, 3)
    return (255 * np.stack([(0.2 + 0.5 * x + s, 0.7 - 0.5 * y + s, 0.3 + 0.3 * x * y + s)[k]
                            for k, s in enumerate(shift)], axis=-1)).clip(0, 255).astype(np.uint8)


def write_png16(path: Path, values: np.ndarray) -> None:
    """Write a PNG with 16 bits per channel, which Pillow cannot write: (h, w) grey or (h, w, 3) RGB, uint16."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))


def write_rotated(path: Path, stored: np.ndarray, orientation: int) -> None:
    """Write the `stored` pixels with an EXIF orientation, which tells how to turn them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(path, exif=exif, **({"quality": 100} if path.suffix == ".jpg" else {}))


# How to turn (h, w, 3) arrays for each EXIF orientation.
UPRIGHT = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
           5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
           8: lambda a: np.rot90(a)}
