"""An ONNX file whose convolutions compute with 8-bit integers: post-training quantisation, judged by its AP."""
import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import CocoDataset, DataError, build_dataset
from data.errors import counted
from data.extras import need
from data.output import naming, writing
from data.tables import points, text_table
from models import ConfigError

from ..config import Config
from ..deploy.export import printing_to
from ..deploy.recipe import KEY, Recipe
from ..deploy.runtimes import bytes_of, first_sentence, open_exported
from ..exceptions import ExportError
from .evaluate import evaluate_exported

FEATURE = "--int8"
LARGEST = 2 ** 31                       # bytes of an ONNX file that has its weights inside
LEVELS = 255                            # steps of an 8-bit range
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the convolutions that are left in float, in turn, until AP is kept
RANKED_BATCHES = 4                      # on which it is found which of them cost most

log = logging.getLogger("densekd")


@dataclass
class Comparison:
    """A float file and its int8 file, by their figures on data.val (`coco_figures`)."""

    paths: tuple[Path, Path]
    figures: tuple[dict, dict]
    in_float: str       # how many convolutions are left in float, in words
    max_drop: float

    @property
    def drop(self) -> float:
        """By how much AP is lower, a fraction."""
        return self.figures[0]["AP"] - self.figures[1]["AP"]

    def __str__(self) -> str:
        values = [["AP", *(points(one["AP"]) for one in self.figures)],
                  ["AP50", *(points(one["AP50"]) for one in self.figures)]]
        values += [[f"AP of {name}", *(points(one["per_class"][name]) for one in self.figures)]
                   for name in self.figures[0]["per_class"]]
        values += [["MB", *(f"{bytes_of(path) / 1e6:.1f}" for path in self.paths)]]
        return text_table(["", "float", "int8"], values)

    def check(self) -> None:
        """Raise ExportError if AP is lower by more than what is allowed."""
        if self.drop > self.max_drop:
            raise ExportError(f"int8 lowers AP by {self.drop:.4f}, more than --max-drop {self.max_drop:g}, also with "
                              f"{self.in_float} in float: {self.paths[1]} is for inspection only. Raise --calibrate or "
                              "--max-drop, or use the float file")


def int8_name(path: Path) -> Path:
    """The int8 file's name: student.int8.onnx for student.onnx."""
    return path.with_name(f"{path.stem}.int8{path.suffix}")


def check_data(cfg: Config) -> None:
    """Raise ConfigError if a configuration lacks the images to calibrate or to evaluate on."""
    for split, use in (("train", "calibrates on its images"), ("val", "compares AP on it")):
        if cfg.data is None or not cfg.data.parts(split):
            raise ConfigError(f"data.{split}", f"missing: --int8 {use}")


@contextlib.contextmanager
def quantising(path: Path) -> Iterator[None]:
    """A context in which an unknown error of onnx or onnxruntime is one line."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # they raise errors of all types
        if hasattr(error, "exit_code"):
            raise
        raise ExportError(f"{path} cannot be made int8: {first_sentence(error)}. Use the float file") from error


def write_int8(cfg: Config, path: Path, calibrate: int = 128, max_drop: float = 0.01) -> Comparison:
    """Quantise the convolutions of an exported ONNX file, and write the result beside it.

    Weights have a scale per channel and are symmetric; activations have one per tensor, from percentiles on images of
    data.train. The convolutions that see the image, and those that give the head's outputs, stay in float, as does
    everything else. If AP on data.val drops too much, those with the largest errors are left in float, too: at most
    four more files are tried, see `SHARES`. If this is not enough, the last one is named `.rejected`.

    Args:
        calibrate: the number of images.
        max_drop: of AP, a fraction.
    Raises:
        ConfigError, DataError, OutputError: bad input, or no room for the files.
        ExportError: there is nothing to quantise, or the file is too large.
    """
    check_data(cfg)
    if bytes_of(path) >= LARGEST:
        raise ExportError(f"{path} cannot be made int8: with its weights it is larger than 2 GB. Use the float file")
    about = replace(open_exported(path).about, int8=True)
    dataset = build_dataset(cfg.data, "train", training=False).at_scale(about.scale, about.within)
    dataset.antialias = about.antialias
    if calibrate > len(dataset):
        log.info(f"--calibrate {calibrate}: data.train has {counted(len(dataset), 'image')}, and all are used")
    cpu = torch.device("cpu")
    before = evaluate_exported(cfg, path, cpu)
    if before["AP"] is None:
        raise DataError("data.val has no boxes, so that AP cannot be compared: give --int8 a data.val with boxes")
    target = int8_name(path)
    with naming(target), quantising(path), TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as name:
        folder = Path(name)
        plain, made = folder / "plain.onnx", folder / target.name
        prepare(path, plain)
        convs = inner_convolutions(plain)
        if not convs:
            raise ExportError(f"{path} has no convolutions that can be int8: use the float file")
        ranges = activation_ranges(plain, folder, feeds(dataset, about, calibrate), min(calibrate, len(dataset)))
        order: list[str] = []
        for share in (0, *SHARES):
            if share and not order:
                order = by_error(plain, folder, convs, ranges, feeds(dataset, about, RANKED_BATCHES))
            left = order[:round(share * len(convs))]
            if share and not left:
                continue
            write(plain, made, ranges, [one for one in convs if one not in left], about)
            after = evaluate_exported(cfg, made, cpu)
            found = Comparison((path, made), (before, after), f"{len(left)} of {counted(len(convs), 'convolution')}",
                               max_drop)
            log.info(f"int8, {found.in_float} in float: AP {points(after['AP'])}, float {points(before['AP'])}")
            if found.drop <= max_drop:
                break
        else:
            target = target.with_name(f"{target.name}.rejected")
        with writing(target) as partial:
            os.replace(made, partial)
    return replace(found, paths=(path, target))


def prepare(path: Path, plain: Path) -> None:
    """Write a file with the shapes of all tensors and with constants and batch norms folded, weights inside."""
    onnx = need("onnx", "export", FEATURE)
    pre_process = need("onnxruntime", "export", FEATURE, "onnxruntime.quantization.shape_inference").quant_pre_process
    whole = plain.with_name("whole.onnx")
    with naming(whole):
        onnx.save(onnx.load(str(path)), str(whole))
    with TemporaryFile("w+") as printed, printing_to(printed):
        pre_process(str(whole), str(plain), skip_symbolic_shape=True)
    whole.unlink()


def inner_convolutions(plain: Path) -> list[str]:
    """Names of the convolutions that have another one before and another one after them."""
    nodes = need("onnx", "export", FEATURE).load(str(plain)).graph.node

    def with_one(nodes: Sequence[Any], before: bool) -> set[str]:
        reached, found = set(), set()
        for node in nodes:
            sources, results = (node.input, node.output) if before else (node.output, node.input)
            is_conv, hit = node.op_type == "Conv", not reached.isdisjoint(sources)
            if is_conv and hit:
                found.add(node.name)
            if is_conv or hit:
                reached.update(name for name in results if name)
        return found

    both = with_one(nodes, True) & with_one(nodes[::-1], False)
    return [node.name for node in nodes if node.name in both]


def feeds(dataset: CocoDataset, about: Recipe, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Inputs of the file from `count` images, spread over the data set: one image at a time, or as many as it takes."""
    count, step = min(count, len(dataset)), about.batch or 1
    places = [i * len(dataset) // count for i in range(count)]
    for start in range(0, count, step):
        images = [dataset[places[min(i, count - 1)]][0] for i in range(start, start + step)]
        height, width = about.padded(*(max(image.shape[axis] for image in images) for axis in (1, 2)))
        batch = torch.zeros(step, 3, height, width, dtype=torch.uint8)
        for padded, image in zip(batch, images):
            padded[:, :image.shape[1], :image.shape[2]] = image
        yield {"images": batch.numpy(), "image_sizes": np.array([image.shape[1:] for image in images], np.int64)}


def activation_ranges(plain: Path, folder: Path, batches: Iterator[dict], count: int) -> Any:
    """onnxruntime's ranges of the inputs and outputs of convolutions: percentiles over all batches."""
    calibration = need("onnxruntime", "export", FEATURE, "onnxruntime.quantization.calibrate")

    class One(calibration.CalibrationDataReader):  # one batch at a time: onnxruntime keeps what one reader gives
        def __init__(self, batch: dict):
            self.left = [batch]

        def get_next(self) -> dict | None:
            return self.left.pop() if self.left else None

    with TemporaryFile("w+") as printed:
        with printing_to(printed):
            calibrator = calibration.create_calibrator(str(plain), ["Conv"], str(folder / "calibrated.onnx"),
                                                       calibration.CalibrationMethod.Percentile)
        for batch in tqdm(batches, "calibrate", count, leave=False, disable=None):
            with printing_to(printed):
                calibrator.collect_data(One(batch))
        with printing_to(printed):
            return calibrator.compute_data()


def write(plain: Path, made: Path, ranges: Any, convs: Sequence[str], about: Recipe) -> None:
    """Write a file in which these convolutions are int8."""
    onnx = need("onnx", "export", FEATURE)
    quantization = need("onnxruntime", "export", FEATURE, "onnxruntime.quantization")
    quantizer = need("onnxruntime", "export", FEATURE, "onnxruntime.quantization.qdq_quantizer").QDQQuantizer
    with TemporaryFile("w+") as printed, printing_to(printed):
        model = onnx.shape_inference.infer_shapes(onnx.load(str(plain)))
        work = quantizer(model, per_channel=True, reduce_range=False, weight_qType=quantization.QuantType.QInt8,
                         activation_qType=quantization.QuantType.QUInt8, tensors_range=ranges,
                         nodes_to_quantize=list(convs), nodes_to_exclude=[], op_types_to_quantize=["Conv"],
                         extra_options={})
        work.quantize_model()
    work.model.clean_initializers()
    work.model.topological_sort()
    model = work.model.model
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {KEY: about.to_json()})
    used = {node.domain for node in model.graph.node}
    for entry in [entry for entry in model.opset_import if entry.domain not in used | {""}]:
        model.opset_import.remove(entry)  # onnxruntime names all that it knows
    onnx.checker.check_model(model)
    with naming(made):
        onnx.save(model, str(made))


@torch.no_grad()
def by_error(plain: Path, folder: Path, convs: Sequence[str], ranges: Any, batches: Iterator[dict]) -> list[str]:
    """The convolutions, those first whose outputs int8 changes most: by the squared error over the squared output.

    Each is judged alone, on the inputs that it has in float.
    """
    onnx, runtime = need("onnx", "export", FEATURE), need("onnxruntime", "export", FEATURE)
    graph = onnx.load(str(plain)).graph
    weights = {one.name: torch.from_numpy(onnx.numpy_helper.to_array(one).copy()) for one in graph.initializer}
    nodes = [node for node in graph.node if node.name in set(convs)]
    session = runtime.InferenceSession(str(folder / "calibrated.onnx"), providers=["CPUExecutionProvider"])
    inputs = sorted({node.input[0] for node in nodes})
    errors = {node.name: [0.0, 1e-12] for node in nodes}
    for batch in batches:
        seen = dict(zip(inputs, map(torch.from_numpy, session.run(inputs, batch))))
        for node in nodes:
            x, w, *bias = (seen[node.input[0]], *(weights[name] for name in node.input[1:]))
            expected = convolve(node, x, w, bias)
            high = w.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
            rounded = (w / high * (LEVELS // 2)).round() * high / (LEVELS // 2)
            got = convolve(node, as_int8(x, ranges[node.input[0]]), rounded, bias)
            got = as_int8(got, ranges[node.output[0]])
            errors[node.name][0] += (got - expected).square().sum().item()
            errors[node.name][1] += expected.square().sum().item()
    return sorted(convs, key=lambda name: -errors[name][0] / errors[name][1])


def convolve(node: Any, x: Tensor, w: Tensor, bias: Sequence[Tensor]) -> Tensor:
    """What an ONNX node of two dimensions computes."""
    given = {one.name: list(one.ints) or one.i for one in node.attribute}
    top, left, bottom, right = given.get("pads", [0] * 4)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), w, *bias, stride=given.get("strides", 1),
                    dilation=given.get("dilations", 1), groups=given.get("group", 1))


def as_int8(x: Tensor, known: Any) -> Tensor:
    """Activations as 8 bits keep them, in a range that onnxruntime found."""
    low, high = (float(np.asarray(edge).reshape(-1)[0]) for edge in known.range_value)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, 1e-12) / LEVELS
    zero = round(-low / scale)
    return ((x / scale).round().add(zero).clamp(0, LEVELS) - zero) * scale
