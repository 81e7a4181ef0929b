"""Writes Pascal VOC's XML files."""
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from data.output import write_bytes

from .shared import ImageDetections, new_place, own_file


class VocWriter:
    """`Annotations/`, with an XML file for each image. Its corners count from 1, and `score` stands in each object."""

    files = "Annotations/"

    def __init__(self, folder: Path, classes: Sequence[str], category_ids: Sequence[int]):
        self.folder, self.classes = new_place(folder / "Annotations"), list(classes)

    def add(self, image: ImageDetections) -> None:
        root = Element("annotation")
        SubElement(root, "filename").text = PurePosixPath(image.name).name
        size = SubElement(root, "size")
        for key, value in zip(("width", "height", "depth"), (image.size[1], image.size[0], 3)):
            SubElement(size, key).text = str(value)
        for (x1, y1, x2, y2), score, label in zip(image.boxes, image.scores, image.labels):
            found = SubElement(root, "object")
            SubElement(found, "name").text = self.classes[label]
            SubElement(found, "difficult").text = "0"
            SubElement(found, "score").text = f"{score:.4f}"
            # Corners are pixels that belong to the object, so a box has at least one pixel.
            corners = x1 + 1, y1 + 1, max(x2, x1 + 1), max(y2, y1 + 1)
            box = SubElement(found, "bndbox")
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners):
                SubElement(box, key).text = f"{value:.2f}"
        ElementTree.indent(root)
        text = ElementTree.tostring(root, encoding="unicode") + "\n"
        path = self.folder / own_file(image.name, image.frame, ".xml")
        write_bytes(path, text.encode(errors="replace"))  # XML has no place for names that are not in UTF-8

    def close(self) -> None:
        """Nothing is open."""

    @staticmethod
    def file_of(name: str) -> str:
        return f"Annotations/{own_file(name, None, '.xml')}"
