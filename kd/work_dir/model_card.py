"""A page about a trained detector for those who get its file: what it is, how good, and how it was made.

Everything comes from the checkpoint and from the records of its run. What these do not say is "not known".
"""
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from data import DataError, find_data
from data.coco.stream import parse
from data.errors import counted, listed, one_line
from data.tables import markdown_table, points
from models.checkpoints.sources import is_address
from models.checkpoints.zoo import published
from models.weights import read_checkpoint

from .records import methods_of, read_json, read_run, teacher_entries

NAME = "model_card.md"
UNKNOWN = "not known"
NOT_PARAMETERS = ("running_mean", "running_var", "num_batches_tracked", "loss_normalizer", "integral.project")

log = logging.getLogger("densekd")


@dataclass
class Origin:
    """What is known about the training of a checkpoint; empty where nothing is."""

    config: Mapping | None = None                   # the configuration that the checkpoint holds
    published_ap: float | None = None               # of `zoo:NAME`, in points
    provenance: dict = field(default_factory=dict)  # run.json
    figures: dict = field(default_factory=dict)     # the evaluation at the checkpoint's step


def find_origin(checkpoint: str, config: Mapping | None) -> Origin:
    """The records in a checkpoint's folder, if they are of this checkpoint: the configuration in run.json is its own,
    and the evaluation is that of its step. The log says why records in the folder are not used.

    Args:
        config: the configuration in the checkpoint, or None if it holds none.
    """
    entry, path = published(checkpoint), Path(checkpoint).expanduser()
    origin = Origin(config, None if entry is None else entry.ap)
    if is_address(checkpoint) or config is None or not (path.parent / "run.json").is_file():
        return origin
    try:
        provenance = read_json(path.parent / "run.json", "the model card does not use it")
        if provenance.get("config") != json.loads(json.dumps(config)):
            raise DataError(f"{path.parent / 'run.json'} is of another configuration than {path}: the model card does "
                            "not use it")
        metrics = path.parent / "metrics.jsonl"
        evaluations = read_run(path.parent, metrics).evaluations if metrics.is_file() else []
    except DataError as error:
        log.warning(str(error))
        return origin
    content = read_checkpoint(path)
    step = content.get("step") if isinstance(content, dict) else None
    return replace(origin, provenance=provenance,
                   figures=next((line for line in evaluations[::-1] if line["step"] == step), {}))


def model_card(file: Path, weights: Mapping[str, Tensor], config: Mapping | None, classes: Sequence[str] | None,
               origin: Origin) -> str:
    """The page, in Markdown.

    Args:
        file: the file with these weights, which exists.
        config: the configuration of this detector, or None if it is not known. It need not be what it was trained
            with: only `origin` says this.
        origin: see `find_origin`.
    """
    rows = [*detector_rows(file, weights, config, classes), ("AP", figures_text(origin)),
            *data_rows(origin.config), *training_rows(origin.config, origin.provenance)]
    table = markdown_table(["entry", "value"], [[name, one_line(value, 2000)] for name, value in rows])
    parts = [f"# {one_line(file.stem, 80)}",
             "An object detector from densekd. `scripts/convert.py` wrote this page from the checkpoint and from the "
             f"records of its run. What these do not say is \"{UNKNOWN}\".", table]
    parts.append("## Use\n\n```python\nfrom kd import load_detector\n\n"
                 + (f"detect = load_detector({file.name!r})" if config is not None else
                    f"detect = load_detector({file.name!r}, cfg=...)  # the configuration that it was trained with")
                 + "\nfound = detect(\"photo.jpg\")  # boxes, scores, labels, names\n```")
    if config is not None:
        trained = {"distill": (origin.config or {}).get("distill")}
        shown = {key: value for key, value in {"model": config["model"], **trained}.items() if value}
        text = yaml.safe_dump(json.loads(json.dumps(shown)), sort_keys=False, default_flow_style=None, width=100)
        parts.append(f"## Configuration\n\n```yaml\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


Row = tuple[str, str]


def detector_rows(file: Path, weights: Mapping[str, Tensor], config: Mapping | None, classes: Sequence[str] | None
                  ) -> list[Row]:
    """What the detector is, and its size."""
    count = sum(value.numel() for name, value in weights.items() if not name.endswith(NOT_PARAMETERS))
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in weights.values() if value.is_floating_point()})
    rows = [("detector", detector_text(config)), ("parameters", f"{count:,}"),
            ("file", f"{file.name}, {file.stat().st_size / 2 ** 20:.1f} MiB, {' and '.join(kinds)}")]
    scale = section(config, "data").get("scale")
    rows.append(("image size", f"scaled to fit {scale[0]} x {scale[1]}" if scale else UNKNOWN))
    return [*rows, (counted(len(classes), "class") if classes else "classes",
                    ", ".join(one_line(name, 60) for name in classes) if classes else UNKNOWN)]


def detector_text(config: Mapping | None) -> str:
    """The parts of a detector, for example `GFLHead, FPN, ResNet (depth 18, base_channels 16)`."""
    if config is None:
        return UNKNOWN
    model = config["model"]
    backbone = model["backbone"]
    shown = [f"{key} {backbone[key]}" for key in ("depth", "name", "base_channels") if key in backbone]
    parts = [model["head"]["type"], (model.get("neck") or {}).get("type"),
             backbone["type"] + (f" ({', '.join(shown)})" if shown else "")]
    return ", ".join(filter(None, parts))


def figures_text(origin: Origin) -> str:
    """AP at the checkpoint's step, in points, or that of a published checkpoint."""
    figures = origin.figures
    if origin.published_ap is not None:
        return f"{origin.published_ap:.1f} on COCO val2017, as its authors publish it"
    if figures.get("AP") is None:
        return UNKNOWN
    more = ", ".join(f"{name} {points(figures[name])}" for name in ("AP50", "AP75") if figures.get(name) is not None)
    return (f"{points(figures['AP'])} on the evaluation data after {counted(int(figures['epoch']) + 1, 'epoch')}"
            + (f" ({more})" if more else ""))


def data_rows(config: Mapping | None) -> list[Row]:
    """The data by their annotation files, and the licences that these name."""
    rows, licences = [], []
    for split, name in (("train", "training data"), ("val", "evaluation data")):
        found = section(config, "data").get(split)
        parts = found if isinstance(found, list) else [found] if found else []
        shown = []
        for part in parts:
            text, named = annotations_text(part)
            shown.append(text)
            licences += named
        rows.append((name, "; ".join(shown) or UNKNOWN))
    return [*rows, ("licence of the data", listed(list(dict.fromkeys(licences)), ", ") or UNKNOWN)]


def annotations_text(part: Mapping) -> tuple[str, list[str]]:
    """The annotation file of a data set with its number of images, and the licences that it names."""
    path, first = str(part["annotations"]), part.get("first")
    try:
        content = parse(find_data(path))  # a large list in it is not in memory
        images, named = len(content["images"]), content.get("licenses")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # moved since, or not COCO's
        return path, []
    names = [one_line(each.get("name") or each.get("url") or "", 80) for each in named or [] if isinstance(each, dict)]
    return f"{path} ({counted(min(first or images, images), 'image')})", [name for name in names if name]


def training_rows(config: Mapping | None, provenance: Mapping) -> list[Row]:
    """How the detector was trained."""
    if config is None:
        return [(name, UNKNOWN) for name in ("teacher", "methods", "training", "command", "commit", "date", "versions")]
    hashes = provenance.get("teachers") if isinstance(provenance.get("teachers"), dict) else {}
    teachers = []
    for entry in teacher_entries(dict(config)):
        path, digest = entry.get("checkpoint"), hashes.get(entry.get("checkpoint"))
        teachers.append(f"{entry.get('cfg') or 'a model in the configuration'}, {path or 'untrained'}"
                        + (f" (SHA-256 {one_line(digest, 64)})" if digest else ""))
    train = section(config, "train")
    training = [f"{key} {train[key]}" for key in ("epochs", "seed", "init") if train.get(key) is not None]
    command, versions = provenance.get("command"), provenance.get("versions")
    known = isinstance(command, list) and all(isinstance(word, str) for word in command)
    return [("teacher", "; ".join(teachers) or "none"), ("methods", methods_of(dict(config)) or "none"),
            ("training", ", ".join(training) or UNKNOWN),
            ("command", f"`python {shlex.join(command)}`" if known and command else UNKNOWN),
            ("commit", str(provenance.get("commit") or UNKNOWN)), ("date", str(provenance.get("date") or UNKNOWN)),
            ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())
             if isinstance(versions, dict) and versions else UNKNOWN)]


def section(config: Mapping | None, name: str) -> dict[str, Any]:
    """A section of a configuration; empty if there is none."""
    return dict((config or {}).get(name) or {})
