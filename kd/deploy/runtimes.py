"""Opens exported files: ONNX with onnxruntime, torch.export archives with torch, OpenVINO's IR with openvino."""
import contextlib
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision  # noqa: F401  a torch.export archive needs its operators
from torch import Tensor

from data.errors import one_line
from data.extras import need

from ..exceptions import ExportedFileError, UsageError
from .recipe import INPUTS, KEY, OUTPUTS, Recipe, read_recipe

MOST_JSON = 2 ** 24  # bytes
# What runtimes write before the reason of an error: the places in their own code.
PLACES = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : |(Exception from \S+:\s+|Check '.*?' failed at \S+:\s+)+")
AGAIN = "write it again with scripts/export.py"
FEATURE = "running an exported file"

Run = Callable[[Tensor, Tensor], list[Tensor]]  # what `DeployedDetector.forward` takes, and boxes, scores and labels


@dataclass
class ExportedFile:
    """An exported file that is ready to run."""

    path: Path
    about: Recipe
    run: Run


def open_exported(path: Path, device: str = "cpu", openvino: bool = False) -> ExportedFile:
    """Open an exported file; what is in it decides on its kind, not its name.

    Args:
        device: "cpu", or "cuda" for an ONNX file.
        openvino: runs an ONNX file with OpenVINO, which reads it itself.
    Raises:
        ExportedFileError: it is damaged, or not a file of scripts/export.py, or its weights are missing.
        MissingExtra, UsageError: what would run it is not installed, or the device is not there.
    """
    kind = kind_of(path)
    if device != "cpu" and kind != "onnx":
        raise UsageError(f"--device {device}: only an ONNX file runs there, and {path} is another: use --device cpu")
    if kind == "onnx" and not openvino:
        return open_onnx(path, device)
    return open_pt2(path) if kind == "pt2" else open_openvino(path, kind)


def kind_of(path: Path) -> str:
    """The kind of an exported file, "pt2", "openvino" or "onnx"; ExportedFileError if it is empty."""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise ExportedFileError(f"{path} is empty: {AGAIN}")
    if start.startswith(b"PK"):
        return "pt2"
    return "openvino" if start.lstrip(b"\xef\xbb\xbf \r\n").startswith(b"<") else "onnx"


def bytes_of(path: Path) -> int:
    """Bytes of an exported file, with the files beside it that have its weights."""
    kind = kind_of(path)
    beside = check_weights(path) if kind == "onnx" else [path.with_suffix(".bin")] * (kind == "openvino")
    return sum(file.stat().st_size for file in (path, *beside))


def first_sentence(error: Exception) -> str:
    """The first sentence of an error's message, which may go on for pages; with the error's type if it is one word."""
    text = str(error).strip()
    if places := PLACES.match(text):
        text = text[places.end():] or text
    sentence = re.split(r"(?<=[.!?])\s|\n", text)[0].rstrip(" .!?:")[:200]
    return one_line(sentence) if " " in sentence else f"{type(error).__name__} {sentence}".strip()


@contextlib.contextmanager
def opening(path: Path, kind: str) -> Iterator[None]:
    """A context in which any error of a runtime means that the file is not of its kind."""
    try:
        yield
    except (ExportedFileError, MemoryError):
        raise
    except Exception as error:  # runtimes raise errors of all types
        raise ExportedFileError(f"{path} cannot be read as {kind} ({first_sentence(error)}): {AGAIN}") from None


def checked(path: Path, names: dict[str, list[str]]) -> None:
    """Raise ExportedFileError if the names of inputs or outputs are not ours."""
    for what, expected in (("inputs", INPUTS), ("outputs", OUTPUTS)):
        if absent := set(expected) - set(names[what]):
            raise ExportedFileError(f"{path} has no {what} {', '.join(sorted(absent))}: {AGAIN}")


def open_onnx(path: Path, device: str) -> ExportedFile:
    runtime = need("onnxruntime", "export", FEATURE)
    here = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device, device)
    if here not in runtime.get_available_providers():
        raise UsageError(f"--device {device}: this onnxruntime does not run there: use --device cpu"
                         + (", or install onnxruntime-gpu" if device == "cuda" else ""))
    check_weights(path)
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4  # errors come as exceptions
    with opening(path, "ONNX"):
        session = runtime.InferenceSession(str(path), options, providers=[here])
    about = read_recipe(session.get_modelmeta().custom_metadata_map.get(KEY), path)
    checked(path, {"inputs": [one.name for one in session.get_inputs()],
                   "outputs": [one.name for one in session.get_outputs()]})

    def run(images: Tensor, sizes: Tensor) -> list[Tensor]:
        found = session.run(list(OUTPUTS), {"images": images.numpy(), "image_sizes": sizes.numpy()})
        return [torch.from_numpy(one) for one in found]
    return ExportedFile(path, about, run)


def check_weights(path: Path) -> list[Path]:
    """The files beside an ONNX file that have its weights; ExportedFileError if one is missing or too short."""
    onnx = need("onnx", "export", FEATURE)
    with opening(path, "ONNX"):
        tensors = onnx.load(str(path), load_external_data=False).graph.initializer
        places = [{entry.key: entry.value for entry in one.external_data} for one in tensors
                  if one.data_location == onnx.TensorProto.EXTERNAL]
        ends: dict[str, int] = {}
        for place in places:
            end = int(place.get("offset", 0)) + int(place.get("length", 0))
            ends[place["location"]] = max(end, ends.get(place["location"], 0))
    for name, end in ends.items():
        beside = path.parent / name
        if not beside.is_file():
            raise ExportedFileError(f"the weights of {path} are in {one_line(beside)}, which is missing: keep both "
                                    "files in one folder")
        if beside.stat().st_size < end:
            raise ExportedFileError(f"the weights of {path} are in {one_line(beside)}, which is too short: copy it "
                                    "again")
    return [path.parent / name for name in ends]


def open_pt2(path: Path) -> ExportedFile:
    with opening(path, "a torch.export file"):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            inside = [name for name in names if name.endswith(f"/extra/{KEY}.json")]
            if inside and archive.getinfo(inside[0]).file_size > MOST_JSON:
                raise ExportedFileError(f"the metadata of {path} is too large: {AGAIN}")
            text = archive.read(inside[0]).decode() if inside else None
            if not any(name.endswith("archive_format") for name in names):
                raise ExportedFileError(f"{path} is not a torch.export file: give one that scripts/export.py wrote; "
                                        "--checkpoint takes checkpoints")
    about = read_recipe(text, path)
    with opening(path, "a torch.export file"), quiet("torch.export"):
        module = torch.export.load(str(path)).module()

    def run(images: Tensor, sizes: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(module(images, sizes))[-len(OUTPUTS):]
    return ExportedFile(path, about, run)


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """A context in which a logger is silent: torch logs a traceback for a file that it then refuses."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def open_openvino(path: Path, kind: str) -> ExportedFile:
    openvino = need("openvino", "openvino", "running a file with OpenVINO")
    weights = path.with_suffix(".bin")
    if kind == "onnx":
        check_weights(path)
    elif not weights.is_file():
        raise ExportedFileError(f"the weights of {path} are in {weights}, which is missing: keep both files in one "
                                "folder")
    with opening(path, "an OpenVINO file"):
        core = openvino.Core()
        model = core.read_model(str(path))
        place = ["framework", KEY]  # where OpenVINO's converter puts the metadata of an ONNX file
        text = model.get_rt_info(place).value if model.has_rt_info(place) else None
    about = read_recipe(text, path)
    with opening(path, "an OpenVINO file"):
        names = {"inputs": [name for port in model.inputs for name in port.names],
                 "outputs": [name for port in model.outputs for name in port.names]}
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32",
                                                     "INFERENCE_NUM_THREADS": torch.get_num_threads()})
    checked(path, names)

    def run(images: Tensor, sizes: Tensor) -> list[Tensor]:
        found = compiled({"images": images.numpy(), "image_sizes": sizes.numpy()})
        return [torch.from_numpy(found[name].copy()) for name in OUTPUTS]
    return ExportedFile(path, about, run)
