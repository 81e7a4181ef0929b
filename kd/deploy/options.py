"""The options of export.py, checked before PyTorch is imported."""
from pathlib import Path

from data.extras import need

from ..exceptions import UsageError

DIVISOR = 32
SUFFIXES = {".pt2": "pt2", ".xml": "openvino"}  # all other names mean onnx
PACKAGES = {"onnx": [(name, "export") for name in ("onnx", "onnxscript", "onnxruntime")]}
PACKAGES["openvino"] = [*PACKAGES["onnx"][:2], ("openvino", "openvino")]


def check_options(path: Path, given: str | None, opset: int | None, beside: bool, nms: str, end2end: int | None,
                  fixed: dict[str, int]) -> str:
    """The kind of the file at `path`: what is given, or what its name says. See export.py for the options.

    Raises:
        UsageError: options that contradict each other, or a size that cannot be.
        MissingExtra: a package that it needs is not installed.
    """
    kind = given or SUFFIXES.get(path.suffix, "onnx")
    if kind == "openvino" and path.suffix != ".xml":
        raise UsageError(f"--out {path}: an OpenVINO file must be called .xml, and its weights are in a .bin beside it")
    if kind != "onnx" and (beside or opset is not None):
        raise UsageError(f"{'--weights beside' if beside else '--opset'} is for ONNX files, and {path} is to be {kind}")
    if end2end is not None and nms == "outside":
        raise UsageError("--end2end suppresses overlaps inside the file, and --nms outside does not: remove one")
    for name, size in fixed.items():
        if name not in ("batch", "height", "width"):
            raise UsageError(f"--fixed {name}={size}: there are batch, height and width")
        if name != "batch" and size % DIVISOR:
            raise UsageError(f"--fixed {name}={size}: must be a multiple of {DIVISOR}")
    for package, extra in PACKAGES.get(kind, ()):
        need(package, extra, f"{'OpenVINO' if kind == 'openvino' else 'ONNX'} export")
    return kind


def check_int8(path: Path, kind: str, int8: bool, calibrate: int | None, max_drop: float | None) -> None:
    """Raise UsageError for options of --int8 without it, or for a file that has no such form."""
    for name, value in (("--calibrate", calibrate), ("--max-drop", max_drop)):
        if value is not None and not int8:
            raise UsageError(f"{name} is for --int8: add --int8, or remove {name}")
    if int8 and kind != "onnx":
        raise UsageError(f"--int8 writes ONNX files, and {path} is to be {kind}: give a name that ends in .onnx")
