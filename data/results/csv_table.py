"""Writes one CSV table."""
from collections.abc import Sequence
from pathlib import Path

from data.tables import csv_table

from .shared import Growing, ImageDetections

HEADER = ("file", "x1", "y1", "x2", "y2", "class", "score", "frame")


class CsvWriter:
    """`predictions.csv`, a row for each detection; an image without detections has a row with only its name."""

    files = "predictions.csv"

    def __init__(self, folder: Path, classes: Sequence[str], category_ids: Sequence[int]):
        self.classes = list(classes)
        self.table = Growing(folder / "predictions.csv", f"{','.join(HEADER)}\n")

    def add(self, image: ImageDetections) -> None:
        frame = "" if image.frame is None else str(image.frame)
        rows = [[image.name, *(f"{edge:.2f}" for edge in box), self.classes[label], f"{score:.4f}", frame]
                for box, score, label in zip(image.boxes, image.scores, image.labels)]
        rows = rows or [[image.name, *[""] * 6, frame]]
        self.table.add([csv_table(rows[0], rows[1:]) + "\n"])

    def close(self) -> None:
        self.table.close()

    @staticmethod
    def file_of(name: str) -> None:
        """All images share the file."""
