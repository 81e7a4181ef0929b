"""Detectors for other runtimes: ONNX and torch.export files, checked against PyTorch."""
import contextlib
import io
import json
import os
import re
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.export import Dim

from data import build_dataset
from data.extras import MissingExtra, need
from data.inputs.files import Sample, make_sample
from data.inputs.images import read_image
from data.output import write_text, writing
from models import ConfigError, Detector
from models.deploy import DeployedDetector, suppress

from ..config import Config
from ..exceptions import ExportError
from .agreement import Agreement, ExportedDetector, check_export

OPSET = 18
DIVISOR = 32
INPUTS, OUTPUTS = ("images", "image_sizes"), ("boxes", "scores", "labels")
CHECKED_IMAGES = 2          # of data.val, where none are given


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
        ExportError: the file differs from the detector, or cannot be made. No file is left then, but a `.log` beside it
            has what an exporter reported.
    """
    log = path.with_name(f"{path.name}.log")
    side = 2 * about.least_size if kind == "onnx" else about.least_size
    example = torch.zeros(2, 3, side, side + DIVISOR, dtype=torch.uint8), torch.tensor([[side, side], [side - 1, side]])
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        try:
            with writing(path) as partial, printing_to(printed):
                with torch.no_grad():
                    partial.write_bytes((to_onnx if kind == "onnx" else to_pt2)(detector, example, about))
                return check_export(load_exported(partial, kind), detector, samples, about.least_size, about.nms)
        except (ConfigError, MissingExtra, ExportError, OSError):
            raise
        except Exception as error:  # torch's exporters and runtimes raise errors of all types
            printed.seek(0)
            write_text(log, f"{printed.read()}\n{traceback.format_exc()}")
            raise ExportError(f"this detector cannot be exported as {kind}: {first_sentence(error)}. Try --format "
                              f"{'pt2' if kind == 'onnx' else 'onnx'}, or change the layer; {log} has the whole report"
                              ) from error


@contextlib.contextmanager
def printing_to(file: TextIO) -> Iterator[None]:
    """A context in which everything that is printed goes to a file, also by compiled code: exporters print much."""
    streams = [(number, os.dup(number)) for number in (1, 2)]
    for number, _ in streams:
        os.dup2(file.fileno(), number)
    try:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield
    finally:
        file.flush()
        for number, copy in streams:
            os.dup2(copy, number)
            os.close(copy)


def first_sentence(error: Exception) -> str:
    """The first sentence of an error's message, which may go on for pages; with the error's type if it is one word."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    sentence = re.split(r"(?<=[.!?])\s|\n", text)[0].rstrip(" .!?:")[:200]
    return sentence if " " in sentence else f"{type(error).__name__} {sentence}".strip()


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
