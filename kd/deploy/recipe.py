"""What a program needs to know to run an exported file; the file contains it as JSON."""
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from data.ranges import Count, Number, Positive, Share, Some
from data.transforms import padded_size
from models import ConfigError, Detector
from models.build import read_section
from models.postprocess import TestConfig

from ..config import Config
from ..exceptions import ExportedFileError
from .options import DIVISOR

KEY = "densekd"         # of the JSON in the metadata of an ONNX file, and of its file in a pt2 archive
FORMAT = 1              # of the JSON; a later version may not be understood
INPUTS, OUTPUTS = ("images", "image_sizes"), ("boxes", "scores", "labels")
Form = Literal["inside", "outside", "end2end"]


@dataclass
class Recipe:
    """How to prepare the input of an exported file, and what its output means. See `DeployedDetector.forward`."""

    classes: Some[str]                  # names, by label
    scale: tuple[Count, Count]          # images are resized to fit it: longest long edge, longest short edge
    antialias: bool                     # smooth when shrinking
    divisor: Count                      # of the padded height and width
    least_size: Count                   # smallest padded height and width
    nms: Form                           # inside: the file suppresses; end2end: it also counts; outside: the caller must
    nms_iou_threshold: Share
    max_per_img: Count
    score_thr: Share = 0.0              # scores that are not above it are 0
    clip: Literal["before", "after"] = "before"  # whether boxes are clipped before suppression or after
    min_bbox_size: float = 0            # smaller boxes are left out after clipping; negative: none are
    batch: Count | None = None          # the number of images; null: any
    height: Count | None = None         # the padded height, and images are resized to fit it; null: any
    width: Count | None = None          # the padded width, in the same way
    input: str = "uint8 RGB (N, 3, H, W); the file normalises it"
    channel_order: Literal["rgb", "bgr"] | None = None  # of the detector inside the file, as the statistics
    mean: tuple[float, float, float] | None = None
    std: tuple[Positive, Positive, Positive] | None = None
    thresholds: Some[Share | None] | None = None  # lowest score to show of each class; null: no box of the class
    int8: bool = False                  # whether most convolutions compute with 8-bit integers
    densekd: str | None = None          # the version that wrote the file
    format: Number = FORMAT

    def __post_init__(self):
        if self.thresholds is not None and len(self.thresholds) != len(self.classes):
            raise ConfigError("thresholds", f"must have {len(self.classes)} entries, one for each class")

    @property
    def within(self) -> tuple[int | None, int | None]:
        """The largest height and width of a resized image."""
        return self.height, self.width

    @property
    def outputs(self) -> tuple[str, ...]:
        return (("num_dets",) if self.nms == "end2end" else ()) + OUTPUTS

    @property
    def test(self) -> TestConfig:
        """The settings for the work that is left to the caller."""
        return TestConfig(score_thr=self.score_thr, nms_iou_threshold=self.nms_iou_threshold, clip=self.clip,
                          max_per_img=self.max_per_img, min_bbox_size=self.min_bbox_size)

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that a batch with images up to this size is padded to."""
        height, width = padded_size((max(height, self.least_size), max(width, self.least_size)), self.divisor)
        return self.height or height, self.width or width

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def make_recipe(cfg: Config, detector: Detector, classes: Sequence[str], kind: str = "onnx", nms: Form = "inside",
                end2end: int | None = None, fixed: dict[str, int] | None = None,
                thresholds: Sequence[float | None] | None = None) -> Recipe:
    """The recipe of a detector's file.

    Args:
        kind: "onnx", "pt2" or "openvino".
        end2end: the number of entries, instead of `max_per_img`; the form is then "end2end".
        fixed: the sizes of the input that do not vary: "batch", "height", "width".
        thresholds: the lowest score to show of each class, see `load_thresholds`.
    """
    test, pixels = detector.test, detector.preprocess
    # torch.export assumes that no feature map has a single row or column, if its size may vary.
    least = max(detector.bbox_head.prior_generator.strides) + DIVISOR if kind == "pt2" else DIVISOR
    try:
        own = version("densekd")
    except PackageNotFoundError:  # a source tree that is not installed
        own = None
    return Recipe(list(classes), cfg.input.scale, cfg.input.antialias, DIVISOR, least,
                  nms if end2end is None else "end2end", test.nms_iou_threshold, end2end or test.max_per_img,
                  test.score_thr, test.clip, test.min_bbox_size, **fixed or {}, channel_order=pixels.channel_order,
                  mean=tuple(pixels.statistics[0]), std=tuple(pixels.statistics[1]),
                  thresholds=None if thresholds is None else list(thresholds), densekd=own)


def read_recipe(text: str | None, path: Path) -> Recipe:
    """The recipe from a file's metadata; ExportedFileError if there is none, or one that cannot be used."""
    again = "write it with scripts/export.py"
    if not text:
        raise ExportedFileError(f"{path} does not say how to use it: it lacks densekd's metadata; {again}")
    try:
        content = json.loads(text)
        if isinstance(content, dict) and isinstance(content.get("format"), int) and content["format"] > FORMAT:
            raise ExportedFileError(f"{path} was written by a later version of densekd "
                                    f"({str(content.get('densekd'))[:20]}): update densekd")
        return read_section(Recipe, content, "")
    except (ValueError, RecursionError) as error:
        if isinstance(error, ExportedFileError):
            raise
        reason = f"{error}" if isinstance(error, ConfigError) else "it is not JSON"
        raise ExportedFileError(f"the metadata of {path} cannot be used, {reason[:200]}: {again}") from None


def with_detections(detector: Detector, count: int | None) -> None:
    """Set the number of a detector's detections, if one is given."""
    if count is not None:
        detector.test = replace(detector.test, max_per_img=count)
