"""A detector as an ONNX graph, with torch's exporter that is based on torch.export."""
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.extras import need
from models import Detector
from models.deploy import DeployedDetector, suppress

from ..exceptions import ExportError
from .recipe import INPUTS, KEY, Recipe

FEATURE = "ONNX export"


@torch.library.custom_op("densekd::suppress", mutates_args=())
def one_operator(boxes: Tensor, scores: Tensor, labels: Tensor, num_classes: int, iou_threshold: float,
                 max_per_class: int) -> Tensor:
    """`suppress` as one operator of torch, which ONNX's own replaces in the file, see `suppress_in_onnx`."""
    return suppress(boxes, scores, labels, num_classes, iou_threshold, max_per_class)


@one_operator.register_fake
def _(boxes: Tensor, scores: Tensor, *more: object) -> Tensor:
    return torch.empty_like(scores)


def suppress_in_onnx(boxes: Any, scores: Any, labels: Any, num_classes: int, iou_threshold: float,
                     max_per_class: int) -> Any:
    """`suppress` in ONNX's operators; the arguments are values of the graph."""
    import numpy as np
    from onnx.numpy_helper import from_array
    from onnxscript import opset18 as op

    def constant(value: list | float, dtype: type = np.int64) -> Any:
        return op.Constant(value=from_array(np.array(value, dtype)))

    # (N, classes, K): a box's score in its class, 0 in the others, where the operator then leaves it out
    own = op.Equal(op.Unsqueeze(labels, constant([1])), constant([[[k] for k in range(num_classes)]]))
    per_class = op.Where(own, op.Unsqueeze(scores, constant([1])), constant(0, np.float32))
    kept = op.NonMaxSuppression(boxes, per_class, constant([max_per_class]), constant([iou_threshold], np.float32),
                                constant([0], np.float32))  # rows of image, class, box
    index = op.Gather(kept, constant([0, 2]), axis=1)
    return op.ScatterND(op.Mul(scores, constant(0, np.float32)), index, op.GatherND(scores, index))


def first_best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`best` in ONNX: by its definition, TopK takes the first of equal scores."""
    return scores.topk(k)


def write_onnx(detector: Detector, path: Path, example: tuple[Tensor, Tensor], shapes: tuple[dict, dict],
               about: Recipe, opset: int = 18, beside: bool = False) -> None:
    """Write a detector as an ONNX file, and check it with ONNX's own checker.

    Args:
        example, shapes: inputs, and their sizes that vary, as `torch.export.export` takes them.
        beside: write the weights to `<path>.data`; always so if the file would be larger than ONNX allows, 2 GB.
    Raises:
        MissingExtra: a package that it needs is not installed.
        ExportError: the operators of this opset do not suffice.
    """
    onnx = need("onnx", "export", FEATURE)
    need("onnxscript", "export", FEATURE)
    model = DeployedDetector(detector, about.nms == "inside", about.nms == "end2end", one_operator, first_best)
    program = torch.onnx.export(model, example, dynamo=True, dynamic_shapes=shapes, opset_version=opset, verbose=False,
                                input_names=list(INPUTS), output_names=list(about.outputs),
                                custom_translation_table={torch.ops.densekd.suppress.default: suppress_in_onnx})
    got = program.model.opset_imports.get("")
    if got != opset:  # torch then only warns
        raise ExportError(f"this detector cannot be exported with opset {opset}: use --opset {got}")
    describe(program.model, about)
    program.save(path, external_data=beside or None)
    onnx.checker.check_model(str(path), full_check=True)  # by its path: it may be larger than 2 GB


def describe(model: Any, about: Recipe) -> None:
    """Name the sizes that vary, add the recipe, and remove what the exporter notes: it holds paths of this machine."""
    edges = [about.batch or "batch", 3, about.height or "height", about.width or "width"]
    images, sizes = model.graph.inputs
    images.shape, sizes.shape = type(images.shape)(edges), type(sizes.shape)([edges[0], 2])
    for node in model.graph.all_nodes():
        for part in (node, *node.outputs):
            part.metadata_props.clear()
            part.doc_string = None
    for part in (model.graph, *model.graph.inputs, *model.graph.initializers.values()):
        part.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props[KEY] = about.to_json()
