"""Writes detections in common formats, image by image; a stopped program leaves complete files."""
from .coco import CocoWriter
from .csv_table import CsvWriter
from .shared import ImageDetections, Writer
from .voc import VocWriter
from .yolo import YoloWriter

__all__ = ["WRITERS", "ImageDetections", "Writer"]

WRITERS: dict[str, type[Writer]] = {"coco": CocoWriter, "yolo": YoloWriter, "voc": VocWriter, "csv": CsvWriter}
