"""Loads weights of any known format into a model, and reports on every tensor.

    report = load_weights(detector, "runs/teacher/last.pth")
    report = load_weights(student, "fgd.pth", part="student", allow_missing=["bbox_head.gfl_cls.*"])
    report = load_backbone_weights(detector.backbone, "torchvision://resnet50")

A load that does not fill the whole model is an error unless the caller names what may stay as it is. Files are read
in `checkpoints/reader.py`; formats are in `checkpoints/formats.py`, and addresses in `checkpoints/sources.py`.
"""
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from data.errors import one_line

from .checkpoints.formats import Checkpoint, Weights, foreign, parse_checkpoint
from .checkpoints.reader import read_checkpoint
from .checkpoints.sources import is_address, local_path
from .checkpoints.unpickler import CheckpointError

__all__ = ["CheckpointError", "LoadReport", "load_backbone_weights", "load_weights", "open_checkpoint",
           "read_checkpoint", "summary"]

# State that a checkpoint may lack: counters, detectron2's running normaliser, GFL's constant bin positions, and
# the places in Swin's tables, which follow from the window's size.
_OPTIONAL = re.compile(r"(.*\.)?(num_batches_tracked|loss_normalizer|integral\.project|relative_position_index)")
_SUBMODULES = ("backbone.", "neck.", "bbox_head.")
_SHOWN = 4  # names in a message

log = logging.getLogger("densekd")

Shape = tuple[int, ...]


@dataclass
class LoadReport:
    """What a checkpoint gave to a model. `matched` and `total` count parameters and running statistics."""

    format: str
    source: str
    matched: int
    total: int
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, Shape, Shape]] = field(default_factory=list)  # name, model's shape, file's shape

    def __str__(self) -> str:
        line = f"loaded {self.format} checkpoint {self.source}: {self.matched} of {self.total} tensors"
        kept = self.missing + [name for name, _, _ in self.mismatched]
        if kept:
            line += f"; left as they were: {summary(kept)}"
        if self.unexpected:
            line += f"; in the file only: {summary(self.unexpected)}"
        return line


def load_weights(model: nn.Module, source: str | os.PathLike | Mapping, part: str | None = None,
                 allow_missing: str | Iterable[str] = (), names: Callable[[str], str] | None = None) -> LoadReport:
    """Copies the weights of a checkpoint into `model`, in the model's own precision; logs and returns a report.

    Args:
        model: a detector, or one of its parts (backbone, neck, head), which then takes its own share of the file.
        source: a path, a URL or name (see `checkpoints.sources.local_path`), or the content of a checkpoint.
        part: `student` or `teacher` of an FGD checkpoint.
        allow_missing: patterns (as in fnmatch) for names of the model that may be missing from the file, or have
            another shape there.
        names: for a model that is not of this project: translates the names in the file to the model's; the file's
            format is then not looked for.

    The format is detected automatically. A backbone's file fills the backbone of a detector; the rest of it is then
    missing. Raises `CheckpointError`, in one line and before the model is changed, if the file cannot be read, if
    it asks for anything that weights do not need, or if a parameter or running statistic of the model is missing or has
    another shape and no pattern covers it.
    """
    label, checkpoint = open_checkpoint(source, part, names=names)
    wanted = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    weights = align(checkpoint.weights, wanted)
    report = _compare(checkpoint.format, label, weights, wanted)
    _check(report, [allow_missing] if isinstance(allow_missing, str) else list(allow_missing))
    refused = {name for name, _, _ in report.mismatched}
    taken = {name: weights[name].to(value.dtype) for name, value in wanted.items()
             if name in weights and name not in refused}
    check_finite(f"{checkpoint.format} checkpoint {label}", taken, taken)
    with torch.no_grad():
        for name, value in taken.items():
            wanted[name].copy_(value)
    log.info(str(report))
    return report


def load_backbone_weights(backbone: nn.Module, source: str | os.PathLike | Mapping,
                          allow_missing: str | Iterable[str] = ()) -> LoadReport:
    """Loads a backbone's weights, all of them: what `backbone.weights` in a configuration names.

    `source` is as in `load_weights`, or the bare name of a torchvision model (`resnet18`), meaning its ImageNet
    weights; `allow_missing` as there.
    """
    if isinstance(source, str) and re.fullmatch(r"\w+", source) and not os.path.exists(source):
        source = f"torchvision://{source}"
    return load_weights(backbone, source, allow_missing=allow_missing)


def check_finite(label: str, weights: Weights, names: Iterable[str]) -> None:
    """Raise CheckpointError if one of the named weights has a value that is not finite, or a variance below zero."""
    broken = sorted(name for name in names if not torch.isfinite(weights[name]).all())
    negative = sorted(name for name in names if name.endswith("running_var") and (weights[name] < 0).any())
    if broken or negative:
        what = "NaN or infinite values" if broken else "variances below zero"
        raise CheckpointError(f"{label} has {what} in {summary(broken or negative)}: its training diverged, take an "
                              "earlier checkpoint")


def open_checkpoint(source: str | os.PathLike | Mapping, part: str | None = None,
                    preferred: str | None = None, names: Callable[[str], str] | None = None
                    ) -> tuple[str, Checkpoint]:
    """A label for messages, and the checkpoint behind `source` with its weights under our names. Errors and `names` are
    as in `load_weights`; `preferred` is the part of a file that has two if `part` chooses none."""
    if isinstance(source, Mapping):
        label, content = "(given as a dict)", dict(source)
    else:
        label = os.fspath(source)
        path = local_path(source)
        try:
            content = read_checkpoint(path)
        except CheckpointError as error:
            if not is_address(label):
                raise
            text = f"{error}; it was downloaded from {label}: delete the file to download it again"
            raise CheckpointError(text) from None
    try:
        return label, parse_checkpoint(content, part, preferred) if names is None else foreign(content, names)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {label}: {error}") from None


def align(weights: Weights, wanted: Mapping[str, Tensor]) -> Weights:
    """Renames a part's weights as in a whole model, or a whole model's as in a part, so that most names match."""

    def matches(candidate: Weights) -> int:
        return len(candidate.keys() & wanted.keys())

    def renamed(new_name: Callable[[str], str]) -> Weights:
        return {new_name(name): value for name, value in weights.items()}

    candidates = [weights, renamed(lambda name: f"backbone.{name}")]
    candidates += [renamed(lambda name, prefix=prefix: name.removeprefix(prefix)) for prefix in _SUBMODULES]
    first = {name.partition(".")[0] for name in wanted}
    if len(first) == 1:  # a model in a wrapper, whose name the reader takes away
        candidates.append(renamed(lambda name: f"{next(iter(first))}.{name}"))
    return max(candidates, key=matches)  # the first of equals: the names as they are


def is_optional(name: str) -> bool:
    """Whether a checkpoint may lack this tensor of a model."""
    return _OPTIONAL.fullmatch(name) is not None


def _compare(format_name: str, label: str, weights: Weights, wanted: Mapping[str, Tensor]) -> LoadReport:
    required = [name for name in wanted if not is_optional(name)]
    mismatched = [(name, tuple(value.shape), tuple(weights[name].shape)) for name, value in wanted.items()
                  if name in weights and weights[name].shape != value.shape]
    wrong = {name for name, _, _ in mismatched}
    return LoadReport(format=format_name, source=label,
                      matched=sum(name in weights and name not in wrong for name in required), total=len(required),
                      missing=[name for name in required if name not in weights],
                      unexpected=[name for name in weights if name not in wanted and not is_optional(name)],
                      mismatched=mismatched)


def _check(report: LoadReport, allow_missing: list[str]) -> None:
    def is_allowed(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in allow_missing)

    missing = [name for name in report.missing if not is_allowed(name)]
    mismatched = [item for item in report.mismatched if not is_allowed(item[0])]
    if not missing and not mismatched:
        return
    shapes = [f"{name} (model {ours}, file {theirs})" for name, ours, theirs in mismatched]
    groups = {"missing": missing, "other shapes for": shapes, "in the file only": report.unexpected}
    problems = "; ".join(f"{what} {summary(names)}" for what, names in groups.items() if names)
    raise CheckpointError(f"{report.format} checkpoint {report.source} does not fit the model, {report.matched} of "
                          f"{report.total} tensors match: {problems}. Use the configuration that it was trained with; "
                          "in Python, allow_missing names what may stay as it is")


def summary(names: list[str]) -> str:
    """`3 (a, b, c)`, cut after a few; names come from files, so each is kept to one line."""
    shown = ", ".join(one_line(name, 120) for name in names[:_SHOWN])
    return f"{len(names)} ({shown}{', ...' if len(names) > _SHOWN else ''})"
