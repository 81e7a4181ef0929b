"""Detectors for other runtimes: ONNX and torch.export files, checked against PyTorch."""
import io
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from data import build_dataset
from data.extras import MissingExtra, need
from data.inputs.files import Sample, make_sample
from data.output import writing
from data.transforms import padded_size, read_image
from models import ConfigError, Detector
from models.deploy import DeployedDetector, suppress
from models.postprocess import class_nms

from ..config import Config
from ..exceptions import ExportError

OPSET = 18
DIVISOR = 32
INPUTS, OUTPUTS = ("images", "image_sizes"), ("boxes", "scores", "labels")
TOLERANCE = 1e-3            # of scores, and of boxes in pixels
RELATIVE_TOLERANCE = 1e-5   # added for boxes: the precision of large coordinates in float32
CHECKED_IMAGES = 2          # of data.val, where none are given

ExportedDetector = Callable[[Tensor, Tensor], list[Tensor]]  # what `DeployedDetector.forward` takes and gives


@dataclass
class Recipe:
    """What a program needs to know to run an exported file; the file contains it as JSON."""

    classes: list[str]
    scale: tuple[int, int]      # images are resized to fit it: longest long edge, longest short edge
    antialias: bool             # smooth when shrinking
    divisor: int                # of the padded height and width
    least_size: int             # smallest padded height and width
    nms: str                    # inside: the file suppresses; outside: the caller must
    nms_iou_threshold: float
    max_per_img: int


@dataclass
class Agreement:
    """How far an exported file differs from PyTorch."""

    images: int = 0
    detections: int = 0  # compared
    box: float = 0.0    # largest difference of a coordinate, in pixels
    score: float = 0.0  # largest difference of a score
    agrees: bool = True

    def __str__(self) -> str:
        line = (f"{self.detections} detections on {self.images} images: boxes differ from PyTorch's by at most "
                f"{self.box:.1g} pixels, scores by {self.score:.1g}")
        return line if self.detections else f"{line}; without detections this says little: give others with --check"


def recipe(cfg: Config, detector: Detector, classes: Sequence[str], kind: str, nms: str) -> Recipe:
    # torch.export assumes that no feature map has a single row or column.
    least = DIVISOR if kind == "onnx" else max(detector.bbox_head.prior_generator.strides) + DIVISOR
    return Recipe(list(classes), cfg.input.scale, cfg.input.antialias, DIVISOR, least, nms,
                  detector.test.nms_iou_threshold, detector.test.max_per_img)


def export(detector: Detector, path: Path, kind: str, about: Recipe, samples: Sequence[Sample]) -> Agreement:
    """Write a detector, in evaluation mode on the CPU, as a file of `kind` "onnx" or "pt2", and check it on samples.

    See `DeployedDetector.forward` for inputs and outputs. The number of images, their height and width may vary; both
    edges are multiples of 32, and in a pt2 file at least `about.least_size`.
    Raises:
        ConfigError: model.test leaves the number of detections open.
        MissingExtra: a package that it needs is not installed.
        ExportError: the file differs from the detector, or cannot be made. No file is left then.
    """
    side = 2 * about.least_size if kind == "onnx" else about.least_size
    example = torch.zeros(2, 3, side, side + DIVISOR, dtype=torch.uint8), torch.tensor([[side, side], [side - 1, side]])
    try:
        with writing(path) as partial:
            with torch.no_grad():
                partial.write_bytes((to_onnx if kind == "onnx" else to_pt2)(detector, example, about))
            found = check_export(load_exported(partial, kind), detector, about, samples)
    except (ConfigError, MissingExtra, ExportError, OSError):
        raise
    except Exception as error:  # torch's exporters and runtimes raise errors of all types
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"this detector cannot be exported as {kind}: {reason}") from error
    return found


def to_onnx(detector: Detector, example: tuple[Tensor, Tensor], about: Recipe) -> bytes:
    """Trace with the older of torch's two exporters: it takes a second, the newer one half a minute."""
    onnx = need("onnx", "export", "ONNX export")
    model = DeployedDetector(detector, about.nms == "inside", OnnxSuppress.apply)
    file = io.BytesIO()
    free = {"images": {0: "batch", 2: "height", 3: "width"}} | {name: {0: "batch"} for name in INPUTS[1:] + OUTPUTS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings that it is the older one, and about constants
        # Inlining would trace `suppress` as well, which is not needed, and fails for a single class.
        torch.onnx.export(model, example, file, dynamo=False, autograd_inlining=False, opset_version=OPSET,
                          input_names=list(INPUTS), output_names=list(OUTPUTS), dynamic_axes=free)
    content = onnx.load_model_from_string(file.getvalue())
    onnx.checker.check_model(content)
    onnx.helper.set_model_props(content, {"densekd": json.dumps(asdict(about))})
    return content.SerializeToString()


class OnnxSuppress(torch.autograd.Function):
    """`suppress`, which ONNX's own operator replaces in the file."""

    @staticmethod
    def forward(ctx: object, boxes: Tensor, scores: Tensor, labels: Tensor, num_classes: int, iou_threshold: float,
                max_per_class: int) -> tuple[Tensor, ...]:
        return suppress(boxes, scores, labels, num_classes, iou_threshold, max_per_class)

    @staticmethod
    def symbolic(graph: Any, boxes: Any, scores: Any, labels: Any, num_classes: int, iou_threshold: float,
                 max_per_class: int) -> Any:
        def constant(value: list | float) -> object:
            return graph.op("Constant", value_t=torch.tensor(value))

        # (N, classes, K): a box's score in its class, 0 in the others, where the operator then leaves it out
        own = graph.op("Equal", graph.op("Unsqueeze", labels, constant([1])),
                       constant([[[k] for k in range(num_classes)]]))
        per_class = graph.op("Where", own, graph.op("Unsqueeze", scores, constant([1])), constant(0.0))
        kept = graph.op("NonMaxSuppression", boxes, per_class, constant([max_per_class]),
                        constant([float(iou_threshold)]), constant([0.0]))  # rows of image, class, box
        index = graph.op("Gather", kept, constant([0, 2]), axis_i=1)
        zeros = graph.op("Mul", scores, constant(0.0))
        return graph.op("ScatterND", zeros, index, graph.op("GatherND", scores, index)).setType(scores.type())


def to_pt2(detector: Detector, example: tuple[Tensor, Tensor], about: Recipe) -> bytes:
    """Use torch.export. A program must import torchvision, for its suppression, before it loads the file."""
    batch = Dim("batch")
    edges = {i: about.divisor * Dim(name, min=about.least_size // about.divisor) for i, name in ((2, "h"), (3, "w"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about torchvision's own code
        program = torch.export.export(DeployedDetector(detector, about.nms == "inside"), example,
                                      dynamic_shapes=({0: batch} | edges, {0: batch}))
    file = io.BytesIO()  # because PyTorch's writer ends the whole process if the disk is full
    torch.export.save(program, file, extra_files={"densekd.json": json.dumps(asdict(about))})
    return file.getvalue()


def load_exported(path: Path, kind: str) -> ExportedDetector:
    """A function that runs an exported file."""
    if kind == "pt2":
        module = torch.export.load(str(path)).module()
        return lambda images, sizes: list(module(images, sizes))
    runtime = need("onnxruntime", "export", "ONNX export")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor, sizes: Tensor) -> list[Tensor]:
        return [torch.from_numpy(out) for out in session.run(None, {"images": images.numpy(),
                                                                    "image_sizes": sizes.numpy()})]
    return run


# --- checks ---

def check_samples(cfg: Config, about: Recipe, paths: Sequence[Path]) -> list[Sample]:
    """The images to check on: those at `paths`; if there are none, the first of data.val; without data, noise.

    Raises:
        UnreadableImage: one of them cannot be read.
    """
    images = [read_image(path) for path in paths]
    if not images and cfg.data and cfg.data.val:
        try:
            dataset = build_dataset(cfg.data, "val", training=False)
            images = [read_image(dataset.image_folder / name) for name in dataset.file_names[:CHECKED_IMAGES]]
        except ValueError:  # an export needs no data
            images = []
    if not images:
        long, short = max(about.scale), min(about.scale)
        generator = torch.Generator().manual_seed(0)
        images = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
                  for size in ((short, long), (long, short))]
    return [make_sample(image, i, [about.scale], about.antialias) for i, image in enumerate(images)]


def check_export(run: ExportedDetector, detector: Detector, about: Recipe, samples: Sequence[Sample]) -> Agreement:
    """Compare an exported file with the detector on each image and on one batch of all; ExportError if they differ."""
    found = Agreement(images=len(samples))
    batches = [[sample] for sample in samples] + ([list(samples)] if len(samples) > 1 else [])
    for number, batch in enumerate(batches):
        images, targets = pad_together(batch, about.least_size)
        outputs = run(images, torch.tensor([target["image_size"] for target in targets]))
        with torch.no_grad():
            expected = detector.predict(detector.preprocess(images, targets), targets, rescale=False)
        for i, (mine, target) in enumerate(zip(expected, targets)):
            theirs = finish(*(output[i] for output in outputs), about, target["image_size"])
            compared = compare(mine, theirs, detector, found)
            found.detections += compared * (number < len(samples))
    if not found.agrees:
        raise ExportError(f"the exported file does not agree with PyTorch ({found}): is there a layer that "
                          "depends on the image's size, as Swin's windows do?")
    return found


def pad_together(samples: Sequence[Sample], least: int) -> tuple[Tensor, list[dict]]:
    """Pad images to the largest, and at least to `least`; returns the batch (N, 3, H, W) and its targets."""
    targets = [sample.targets[0] for sample in samples]
    height, width = (max(least, *(target["pad_size"][axis] for target in targets)) for axis in (0, 1))
    images = torch.zeros(len(samples), 3, *padded_size((height, width)), dtype=torch.uint8)
    for image, sample in zip(images, samples):
        h, w = sample.targets[0]["image_size"]
        image[:, :h, :w] = sample.views[0]
    return images, targets


def finish(boxes: Tensor, scores: Tensor, labels: Tensor, about: Recipe, size: tuple[int, int]) -> dict:
    """The work on one image's outputs that is left to the caller."""
    real = scores > 0
    boxes, scores, labels = boxes[real], scores[real], labels[real]
    if about.nms == "outside":
        keep = class_nms(boxes, scores, labels, about.nms_iou_threshold)[:about.max_per_img]
        boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
        height, width = size
        boxes = boxes.clamp(min=boxes.new_zeros(4), max=boxes.new_tensor([width, height, width, height]))
    return {"boxes": boxes, "scores": scores, "labels": labels}


def compare(mine: dict, theirs: dict, detector: Detector, found: Agreement) -> int:
    """Note how far each detection is from the nearest of its class in the other set; returns the number compared.

    Detections that one set may lack are not compared: their scores are near the threshold, or near the cut at the cap.
    """
    test, compared = detector.test, 0
    least = test.score_thr
    capped = len(mine["scores"]) and (len(mine["scores"]) == test.max_per_img or test.clip == "after")
    if capped:  # detectron2 drops boxes after the cap, so fewer boxes do not show that nothing was cut
        least = max(least, mine["scores"].min().item())
    for one, other in ((mine, theirs), (theirs, mine)):
        for box, score, label in zip(one["boxes"], one["scores"], one["labels"]):
            if score <= least + TOLERANCE:
                continue
            compared += one is mine
            same = (other["labels"] == label) & ((other["scores"] - score).abs() <= TOLERANCE)
            if not same.any():
                found.agrees, found.score = False, max(found.score, float(score))
                continue
            distances = (other["boxes"][same] - box).abs()
            nearest = distances.amax(1).argmin()
            found.box = max(found.box, distances[nearest].max().item())
            found.score = max(found.score, (other["scores"][same][nearest] - score).abs().item())
            found.agrees &= bool((distances[nearest] <= TOLERANCE + RELATIVE_TOLERANCE * box.abs()).all())
    return compared
