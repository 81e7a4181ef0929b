"""The weights in a checkpoint, without the containers and wrappers that training scripts put around them."""
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.errors import one_line

from .unpickler import CheckpointError

Weights = dict[str, Tensor]

MAX_ENTRIES = 100_000  # of a checkpoint's configuration and names
# mmdet; ours and detectron2; plain scripts; Detectron; DeepSpeed and other scripts; moving averages come last.
_CONTAINERS = ("state_dict", "model", "model_state_dict", "blobs", "module", "net", "network", "detector", "weights",
               "ema", "model_ema", "ema_state_dict", "state_dict_ema", "model_ema_state_dict")
# What DistributedDataParallel, AveragedModel, Lightning modules and the like put before names.
_WRAPPERS = {"module", "model", "net", "network", "detector", "_forward_module", "_model"}
# What torch.compile, FSDP and activation checkpointing put anywhere into names.
_INSIDE = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_MODELS = {"backbone", "neck", "bbox_head", "rpn_head", "head"}  # the first words of a detector's own names
_NOT_WEIGHTS = re.compile(r"pixel_(mean|std)|anchor_generator\.cell_anchors\.\d+|data_preprocessor\.(mean|std)")


def find_weights(content: dict) -> Weights:
    inner = content
    for _ in range(3):  # a container may hold another one
        inner = next((inner[name] for name in _CONTAINERS if isinstance(inner.get(name), dict)), inner)
    weights = {}
    for name, value in inner.items():
        if isinstance(name, str) and isinstance(value, (Tensor, np.ndarray)) and not name.endswith("_momentum"):
            weights[name] = _as_tensor(name, value)
    if not weights:
        raise CheckpointError("holds no weights")
    weights = _unwrap(weights)
    return {name: value for name, value in weights.items() if not _NOT_WEIGHTS.fullmatch(name)}


def _unwrap(weights: Weights) -> Weights:
    """The weights without the names that wrappers put before them, as often as they did, or inside."""
    weights = rename(weights, lambda name: re.sub(r"^((?:backbone|neck|bbox_head)\.)(?:module\.)+", r"\1",
                                                   _INSIDE.sub("", name)))
    while True:
        inner = {name: value for name, value in weights.items() if "." in name}  # n_averaged is a wrapper's own
        first = {name.partition(".")[0] for name in inner}
        wrappers = first & _WRAPPERS
        if len(wrappers) != 1 or first & _MODELS or first & {"student", "teacher"}:
            return weights
        prefix = f"{wrappers.pop()}."  # the rest belongs to the wrapper: a criterion, a moving average
        weights = {name.removeprefix(prefix): value for name, value in inner.items() if name.startswith(prefix)}


def _as_tensor(name: str, value: Tensor | np.ndarray) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if value.dtype.kind not in "biuf":
        raise CheckpointError(f"{one_line(name, 80)} is an array of {value.dtype}, not of numbers")
    return torch.from_numpy(np.array(value))


def rename(weights: Weights, new_name: Callable[[str], str]) -> Weights:
    renamed: Weights = {}
    for name, value in weights.items():
        target = new_name(name)
        if target in renamed:
            raise CheckpointError(f"two of its tensors have the same name {one_line(target, 80)} in this project")
        renamed[target] = value
    return renamed


def check_size(meta: Any) -> None:
    """Raise CheckpointError if a file's configuration or names, whose lists may occur again and again, are endless to
    walk."""
    known: dict[int, int] = {}

    def entries(value: Any) -> int:
        if id(value) not in known:
            known[id(value)] = 0  # for a list that holds itself, which is of a wrong type everywhere
            inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            known[id(value)] = 1 + sum(map(entries, inner))
        return known[id(value)]

    try:
        count = entries(meta)
    except RecursionError:
        count = MAX_ENTRIES + 1
    if count > MAX_ENTRIES:
        raise CheckpointError(f"its configuration or names have more than {MAX_ENTRIES} entries, or are nested too "
                              "deeply")
