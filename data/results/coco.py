"""Writes COCO's format of results."""
import json
from collections.abc import Sequence
from pathlib import Path

from .shared import Growing, ImageDetections


class CocoWriter:
    """`predictions.json`, a list of results, and `images.json`, the images and categories that its ids mean."""

    files = "predictions.json and images.json"

    def __init__(self, folder: Path, classes: Sequence[str], category_ids: Sequence[int]):
        self.ids = list(category_ids)
        categories = [{"id": number, "name": name} for number, name in zip(self.ids, classes)]
        after = f'], "annotations": [], "categories": {json.dumps(categories)}}}'
        self.images = Growing(folder / "images.json", '{"images": [', after, ", ")
        self.results = Growing(folder / "predictions.json", "[", "]", ", ")

    def add(self, image: ImageDetections) -> None:
        (h, w), frame = image.size, {} if image.frame is None else {"frame": image.frame}
        entry = {"id": image.image_id, "file_name": image.name, "width": w, "height": h, **frame}
        self.images.add([json.dumps(entry)])
        self.results.add([json.dumps({"image_id": image.image_id, "category_id": self.ids[label],
                                      "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score})
                          for (x1, y1, x2, y2), score, label in zip(image.boxes, image.scores, image.labels)])

    def close(self) -> None:
        self.images.close()
        self.results.close()

    @staticmethod
    def file_of(name: str) -> None:
        """All images share the files."""
