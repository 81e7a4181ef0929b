"""Writes YOLO's text files."""
from collections.abc import Sequence
from pathlib import Path

from data.output import write_bytes, write_text

from .shared import ImageDetections, new_place, own_file


class YoloWriter:
    """`labels/`, with a text file for each image, and `classes.txt`.

    A line is `class x y width height score`: centre and size in fractions of the image.
    """

    files = "labels/ and classes.txt"

    def __init__(self, folder: Path, classes: Sequence[str], category_ids: Sequence[int]):
        self.folder = folder
        for name in ("labels", "classes.txt"):
            new_place(folder / name)
        write_text(folder / "classes.txt", "".join(f"{name}\n" for name in classes))

    def add(self, image: ImageDetections) -> None:
        (h, w), lines = image.size, []
        for (x1, y1, x2, y2), score, label in zip(image.boxes, image.scores, image.labels):
            numbers = (x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h, score
            lines.append(" ".join([str(label), *(f"{number:.6f}" for number in numbers)]) + "\n")
        write_bytes(self.folder / "labels" / own_file(image.name, image.frame, ".txt"), "".join(lines).encode())

    def close(self) -> None:
        """Nothing is open."""

    @staticmethod
    def file_of(name: str) -> str:
        return f"labels/{own_file(name, None, '.txt')}"
