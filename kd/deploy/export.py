"""Detectors for other runtimes: ONNX, torch.export and OpenVINO files, checked against PyTorch."""
import contextlib
import io
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from torch.export import Dim

from data import build_dataset
from data.extras import MissingExtra, need
from data.images import read_image
from data.inputs.files import Sample, make_sample
from data.output import naming, write_text, writing
from models import ConfigError, Detector
from models.deploy import DeployedDetector

from ..config import Config
from ..exceptions import ExportError
from .agreement import Agreement, check_export
from .onnx_graph import write_onnx
from .recipe import DIVISOR, KEY, Recipe
from .runtimes import first_sentence, open_exported

OTHERS = {"onnx": "pt2", "pt2": "onnx", "openvino": "pt2"}    # what may work where a kind does not
CHECKED_IMAGES = 2          # of data.val, where none are given


def export(detector: Detector, path: Path, kind: str, about: Recipe, samples: Sequence[Sample], opset: int = 18,
           beside: bool = False) -> tuple[Agreement, list[Path]]:
    """Write a detector, in evaluation mode on the CPU, as an "onnx", "pt2" or "openvino" file, and check it on samples.

    See `DeployedDetector.forward` for inputs and outputs. The number of images, their height and width may vary, unless
    `about` has them; both edges are multiples of 32, and in a pt2 file at least `about.least_size`.
    Args:
        opset, beside: see `write_onnx`.
    Returns:
        How well they agree, and the files: with weights beside it, there are two.
    Raises:
        ConfigError: model.test leaves the number of detections open.
        MissingExtra: a package that it needs is not installed.
        ExportError: the file differs from the detector, or cannot be made. No file is left then, but a `.log` beside it
            has what an exporter reported.
    """
    log = path.with_name(f"{path.name}.log")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        try:
            with naming(path), tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as folder:
                made = Path(folder) / path.name  # the name is in the file that has its weights beside it
                with printing_to(printed):
                    with torch.no_grad():
                        write(detector, made, kind, about, opset, beside)
                    agreement = check_export(open_exported(made).run, detector, samples, about)
                return agreement, put_in_place(Path(folder), path)
        except (ConfigError, MissingExtra, ExportError, OSError):
            raise
        except Exception as error:  # torch's exporters and runtimes raise errors of all types
            printed.seek(0)
            write_text(log, f"{printed.read()}\n{traceback.format_exc()}")
            raise ExportError(f"this detector cannot be exported as {kind}: {reason(error)}. Try --format "
                              f"{OTHERS[kind]}, or change the layer; {log} has the whole report") from error


def put_in_place(folder: Path, path: Path) -> list[Path]:
    """Move what was written into a temporary folder beside `path` to where it belongs, the file itself last."""
    files = sorted(folder.iterdir(), key=lambda file: (file.name == path.name, file.name))
    for file in files:
        with writing(path.with_name(file.name)) as partial:
            shutil.copyfile(file, partial) if partial.exists() else os.replace(file, partial)  # a pipe stays one
    return [path.with_name(file.name) for file in reversed(files)]


def reason(error: Exception) -> str:
    """Why an exporter failed: its own message, which torch hides below a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_sentence(error)


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


def write(detector: Detector, partial: Path, kind: str, about: Recipe, opset: int, beside: bool) -> None:
    """Write a file of a kind, without a check."""
    # torch.export takes no example whose feature maps have a single row or column, if their size may vary.
    side = max(detector.bbox_head.prior_generator.strides) + DIVISOR
    height, width = about.height or side, about.width or side + DIVISOR
    example = (torch.zeros(about.batch or 2, 3, height, width, dtype=torch.uint8),
               torch.tensor([[height, width], [height - 1, width]]).repeat(about.batch or 1, 1)[:about.batch or 2])
    batch = {} if about.batch else {0: Dim("batch")}
    edges = {i: DIVISOR * Dim(name, min=side // DIVISOR)
             for i, name, fixed in ((2, "h", about.height), (3, "w", about.width)) if not fixed}
    shapes = batch | edges, batch
    if kind == "pt2":
        partial.write_bytes(to_pt2(detector, example, shapes, about))
    elif kind == "onnx":
        write_onnx(detector, partial, example, shapes, about, opset, beside)
    else:
        openvino = need("openvino", "openvino", "OpenVINO export")
        with tempfile.TemporaryDirectory() as folder:
            onnx = Path(folder) / "model.onnx"
            write_onnx(detector, onnx, example, shapes, about, opset)
            openvino.save_model(openvino.Core().read_model(str(onnx)), str(partial), compress_to_fp16=False)


def to_pt2(detector: Detector, example: tuple[Tensor, Tensor], shapes: tuple[dict, dict], about: Recipe) -> bytes:
    """Use torch.export. A program must import torchvision, for its suppression, before it loads the file."""
    model = DeployedDetector(detector, about.nms == "inside", about.nms == "end2end")
    program = torch.export.export(model, example, dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it holds paths of this machine
    file = io.BytesIO()  # because PyTorch's writer ends the whole process if the disk is full
    torch.export.save(program, file, extra_files={f"{KEY}.json": about.to_json()})
    return file.getvalue()


def check_samples(cfg: Config, about: Recipe, paths: Sequence[Path], count: int = CHECKED_IMAGES) -> list[Sample]:
    """The images to check on: those at `paths`; if there are none, the first `count` of data.val; without data, noise.

    Raises:
        UnreadableImage: one of them cannot be read.
    """
    images = [read_image(path) for path in paths]
    if not images and cfg.data and cfg.data.val:
        try:
            dataset = build_dataset(cfg.data, "val", training=False)
            images = [read_image(dataset.image_folder / name) for name in dataset.file_names[:count]]
        except ValueError:  # an export needs no data
            images = []
    if not images:
        long, short = max(about.scale), min(about.scale)
        generator = torch.Generator().manual_seed(0)
        images = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
                  for size in ((short, long), (long, short))]
    return [make_sample(image, i, [about.scale], about.antialias, about.within) for i, image in enumerate(images)]
