"""Reads and writes frames of videos with PyAV, which the extra `video` installs."""
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.extras import need


def load_av() -> ModuleType:
    """Import PyAV. Raises MissingExtra if it is not installed."""
    return need("av", "video", "reading videos")


class Video:
    """A video to read.

    Attributes: `rate`, frames per second; `num_frames`, from the file, or None if the file does not state it.
    Raises DataError if the video cannot be opened, or during reading, if it is damaged.
    """

    def __init__(self, path: Path):
        self.path, self._av = path, load_av()
        try:
            self._container = self._av.open(str(path))
            self._stream = self._container.streams.video[0]
        except (OSError, IndexError, self._av.FFmpegError) as error:
            raise self._wrong(error) from None
        self._stream.thread_type = "AUTO"
        self.rate = self._stream.average_rate or Fraction(25)
        self.num_frames = self._stream.frames or None

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the frames, uint8 (3, h, w), RGB, turned upright."""
        try:
            with self._container:
                for frame in self._container.decode(self._stream):
                    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                    yield torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        except self._av.FFmpegError as error:
            raise self._wrong(error) from None

    def _wrong(self, error: Exception) -> DataError:
        reason = getattr(error, "strerror", None) or "it holds no video"
        return DataError(f"video {self.path} cannot be read ({reason}): replace the file")


class VideoWriter:
    """A video to write, H.264 in MP4, with frames of one size; a context manager.

    Args:
        rate: frames per second.
    """

    def __init__(self, path: Path, rate: Fraction):
        self._av = load_av()
        self._container = self._av.open(str(path), "w", format="mp4")  # the name may say something else
        self._stream = self._container.add_stream("libx264", rate=rate)
        self._stream.pix_fmt = "yuv420p"
        self._size: tuple[int, int] | None = None

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._size is not None:
            self._container.mux(self._stream.encode())
        self._container.close()

    def write(self, image: Tensor) -> None:
        """Add a frame, uint8 (3, h, w). The format needs even sizes: an odd last row or column is left out."""
        pixels = image.permute(1, 2, 0).numpy()[: image.shape[1] // 2 * 2, : image.shape[2] // 2 * 2]
        if self._size is None:
            self._stream.height, self._stream.width = self._size = pixels.shape[:2]
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        self._container.mux(self._stream.encode(frame))
