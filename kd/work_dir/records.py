"""Read runs from their work dirs, and group those that differ only in the seed."""
import copy
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data import DataError
from data.errors import counted

from ..config import TrainConfig

# The seed, and settings that change neither the weights nor the figures.
SILENT = {"data": ("workers", "worker_start"), "eval": ("every", "batch_size"),
          "train": ("seed", "log_every", "checkpoint_every", "keep", "check_images", "grad_norm_every", "tensorboard",
                    "vis_period")}


@dataclass
class RunRecord:
    """A run, read from its work dir or from its metrics.jsonl alone."""

    path: Path
    name: str = ""
    config: dict | None = None  # None for a metrics.jsonl alone, for which teachers is empty
    teachers: dict[str, str] = field(default_factory=dict)  # SHA-256 of the teachers' checkpoints by path
    init: dict[str, str] = field(default_factory=dict)      # likewise of train.init
    steps: list[dict] = field(default_factory=list)         # training lines of metrics.jsonl
    evaluations: list[dict] = field(default_factory=list)   # its evaluation lines

    @property
    def seed(self) -> int:
        """The configured seed; for a metrics file alone, the number after "seed" in its name, or 0."""
        if self.config is not None:
            return self.config.get("train", {}).get("seed", TrainConfig.seed)
        said = re.search(r"seed[_-]?(\d+)$", self.path.stem)
        return int(said[1]) if said else 0

    @property
    def epochs(self) -> int | None:
        """The configured number of epochs."""
        return None if self.config is None else self.config.get("train", {}).get("epochs", TrainConfig.epochs)

    @property
    def done(self) -> int:
        """The number of epochs up to the last evaluation."""
        return self.evaluations[-1]["epoch"] + 1 if self.evaluations else 0

    @property
    def finished(self) -> bool:
        """Whether training reached its end: the last epoch, or that of `train.patience`."""
        stopped = bool(self.evaluations) and self.evaluations[-1].get("out_of_patience", False)
        return self.epochs is None or self.done >= self.epochs or stopped

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps per epoch, from the evaluations; without any, an estimate from the training lines."""
        known = [line["step"] / (line["epoch"] + 1) for line in self.evaluations]
        return known[-1] if known else max(line["step"] / (line["epoch"] + 1) for line in self.steps)


def read_runs(paths: Sequence[Path]) -> tuple[list[RunRecord], list[str]]:
    """Read the runs among `paths`; each is named by its path below their common folder. Other paths give a note each.

    Raises:
        DataError: none of them is a run.
    """
    runs, notes = [], []
    for path in map(Path, paths):
        metrics = path if path.suffix == ".jsonl" else path / "metrics.jsonl"
        if metrics.is_file():
            runs.append(read_run(path, metrics))
        else:
            notes.append(f"{path} is left out: there is no metrics.jsonl in it")
    if not runs:
        raise DataError(f"no run among {', '.join(map(str, paths))}: give work dirs of train.py")
    folders = [run.path.resolve().parent for run in runs]
    common = Path(os.path.commonpath(folders))
    if any(re.fullmatch(r"seed[_-]?\d+", str(run.path.resolve().relative_to(common))) for run in runs):
        common = common.parent
    for run in runs:
        run.name = str(run.path.resolve().relative_to(common)).removesuffix(".jsonl")
    return runs, notes


def read_run(path: Path, metrics: Path) -> RunRecord:
    """Read one run; incomplete lines are left out."""
    run = RunRecord(path)
    for text in metrics.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "AP" in line:
            run.evaluations.append(line)
        elif "loss" in line:
            run.steps.append(line)
    provenance = path / "run.json"
    if provenance.is_file():
        try:
            content = json.loads(provenance.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{provenance} cannot be read ({error}): is the run still being started?") from None
        run.config, run.teachers = content["config"], content.get("teachers", {})
        run.init = content.get("init", {})
    return run


def setting(config: dict, files: dict[str, str] | None = None, distilled: bool = True) -> str:
    """What a configuration trains, apart from the seed, as a text that can be compared.

    Args:
        files: SHA-256 of checkpoints by path, which replaces the path where it is known.
        distilled: False leaves out teachers and methods, which gives the setting of the student alone.
    """
    config = copy.deepcopy(config)
    for section, names in SILENT.items():
        for name in names:
            (config.get(section) or {}).pop(name, None)
    data = config.get("data") or {}
    if isinstance(data.get("train"), list) and len(data["train"]) == 1:  # the same as without a list
        data["train"], = data["train"]
    if not distilled:
        config.pop("distill", None)
    named = [(entry, "checkpoint") for entry in teacher_entries(config)]
    named += [(config["train"], "init")] if (config.get("train") or {}).get("init") else []
    for entry, key in named:
        entry[key] = (files or {}).get(entry[key], entry[key])
    return json.dumps({key: value for key, value in config.items() if value not in ({}, None)}, sort_keys=True)


def group_runs(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs that differ only in the seed, by a common name, sorted by seed; each unfinished run is a group."""
    groups: dict[tuple, list[RunRecord]] = {}
    for run in runs:
        if run.config is None:
            key = (re.sub(r"[_-]?seed[_-]?\d+$", "", run.name),)
        elif run.finished:
            key = (setting(run.config, run.teachers | run.init),)
        else:
            key = (str(run.path),)
        if any(other.seed == run.seed for other in groups.get(key, ())):
            key = (*key, str(run.path))  # the same setting and seed again
        groups.setdefault(key, []).append(run)
    named = {}
    for members in groups.values():
        name = group_name(members)
        if not members[0].finished:
            name += f" ({members[0].done} of {counted(members[0].epochs, 'epoch')})"
        named[name if name not in named else members[0].name] = sorted(members, key=lambda run: run.seed)
    return named


def group_name(runs: Sequence[RunRecord]) -> str:
    """The common part of the runs' names, without the seed."""
    if len(runs) == 1:
        return runs[0].name
    common = os.path.commonprefix([run.name for run in runs])
    return re.sub(r"[_\-/ ]*(seed)?[_\-/ ]*$", "", common) or runs[0].name


def teacher_entries(config: dict) -> list[dict]:
    """The teachers of a recorded configuration; none without a `distill` section."""
    teachers = config["distill"]["teacher"] if config.get("distill") else []
    return teachers if isinstance(teachers, list) else [teachers]


def methods_of(config: dict | None) -> str:
    """The methods of a configuration, for example `CrossKD+FGD+init_student`; empty for plain training."""
    distill = (config or {}).get("distill")
    if not distill:
        return ""
    inherits = ["init_student"] if distill.get("init_student") else []
    return "+".join([*(entry["type"] for entry in distill["methods"]), *inherits])
