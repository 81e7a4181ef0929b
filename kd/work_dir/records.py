"""Read runs from their work dirs, and group those that differ only in the seed."""
import copy
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from sys import float_info

from data import DataConfig, DataError
from data.errors import counted, one_line, shown
from models import ConfigError
from models.build import check_value

from ..config import TrainConfig, parse_config

# The seed, and settings that change neither the weights nor the figures.
SILENT = {"data": ("workers", "worker_start"), "eval": ("every", "batch_size"),
          "train": ("seed", "log_every", "checkpoint_every", "keep", "check_images", "grad_norm_every", "loggers",
                    "tensorboard", "vis_period")}
LENGTH = {"train": ("epochs", "patience"), "schedule": ("warmup_steps", "milestones")}
COSTS = ("images_per_second", "training_seconds", "peak_memory_bytes")


@dataclass
class RunRecord:
    """A run, read from its work dir or from its metrics.jsonl alone."""

    path: Path
    name: str = ""
    config: dict | None = None  # None for a metrics.jsonl alone, for which teachers is empty
    teachers: dict[str, str] = field(default_factory=dict)  # SHA-256 of the teachers' checkpoints by path
    init: dict[str, str] = field(default_factory=dict)      # likewise of train.init
    teacher_models: list = field(default_factory=list)      # what they are built from; None: a network of others
    machine: dict = field(default_factory=dict)             # system, threads, device, and processes since they are kept
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
    def training_seconds(self) -> float | None:
        """The time of all steps up to the last evaluation."""
        return self.evaluations[-1].get("training_seconds") if self.evaluations else None

    @property
    def estimated_seconds(self) -> float | None:
        """The same for runs that did not record it: the images of all steps, by the median of images per second."""
        speeds = [speed for line in self.steps if (speed := line.get("images_per_second"))]
        if self.config is None or not self.evaluations or not speeds:
            return None
        return self.evaluations[-1]["step"] * self.images_per_step / median(speeds)

    @property
    def images_per_step(self) -> int:
        """Labelled images of an optimiser step, of all processes; runs that did not record their number had one."""
        data, train = (self.config.get(section) or {} for section in ("data", "train"))
        processes = self.machine.get("processes", 1)
        return (data.get("batch_size", DataConfig.batch_size) * train.get("accumulate", TrainConfig.accumulate)
                * (processes if isinstance(processes, int) else 1))

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
    """Read one run; incomplete lines are left out.

    Raises:
        DataError: a file that is not JSON, or whose values are not those of a run.
    """
    run = RunRecord(path)
    for i, text in enumerate(metrics.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if not is_record(line):
            raise DataError(f"{metrics}, line {i} is not a record of a run: {one_line(text)}; correct or remove it")
        if "AP" in line:
            run.evaluations.append(line)
        elif "loss" in line:
            run.steps.append(line)
    provenance = path / "run.json"
    if provenance.is_file():
        content = read_json(provenance, "is the run still being started?")
        run.config, run.teachers = content.get("config"), content.get("teachers", {})
        try:
            parse_config(check_value(run.config, dict, "config"))
        except (ConfigError, DataError) as error:
            raise DataError(f"{provenance} has no configuration that can be read ({error})") from None
        if not isinstance(run.teachers, dict) or not all(isinstance(digest, str) for digest in run.teachers.values()):
            raise DataError(f"{provenance}: teachers must be SHA-256 by path, not {shown(run.teachers)}")
        run.init = content.get("init", {})
        models = content.get("teacher_models")
        run.teacher_models = models if isinstance(models, list) else []
        run.machine = content.get("machine") if isinstance(content.get("machine"), dict) else {}
    return run


def with_figures(runs: Sequence[RunRecord], name: str | Path) -> tuple[list[RunRecord], list[str]]:
    """The same runs with the figures that the file `name` in each work dir has, as `eval.py --out` writes it, in place
    of those of training. Runs without the file are left out, and give a note each.

    Raises:
        DataError: a file that has no figures.
    """
    found, notes = [], []
    for run in runs:
        path = run.path / name
        if not path.is_file():
            notes.append(f"{run.path} is left out: there is no {name} in it; eval.py --out writes it")
            continue
        if not run.evaluations or run.config is None:
            notes.append(f"{run.path} is left out: training has not ended, or there is no run.json in it")
            continue
        advice = f"write it with eval.py --out {path}"
        figures = read_json(path, advice)
        line = run.evaluations[-1] | figures
        if "AP" not in figures or not is_record(line):
            raise DataError(f"{path} has no figures of an evaluation: {advice}")
        # A teacher's AP on data.val must not be taken for one on these images, so data.val is not that any more.
        config = run.config | {"data": run.config["data"] | {"val": str(name)}}
        found.append(replace(run, config=config, evaluations=[line]))
    return found, notes


def read_json(path: Path, advice: str, kind: type = dict) -> dict | list:
    """The mapping, or another kind, in a JSON file; DataError with advice if it has none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also for text that is not UTF-8
        raise DataError(f"{path} cannot be read ({error}): {advice}") from None
    if not isinstance(content, kind):
        wanted = "mapping" if kind is dict else "list"
        raise DataError(f"{path} cannot be read (it must hold a {wanted}, not {shown(content)}): {advice}")
    return content


def is_record(line: object) -> bool:
    """Whether a line of metrics.jsonl has a place in the run, and numbers or null for the losses and figures."""
    if not isinstance(line, dict) or not isinstance(line.get("per_class", {}), dict):
        return False
    named = [value for name, value in line.items() if "loss" in name or name[:2] in ("AP", "AR")]
    values = [*named, *line.get("per_class", {}).values(), *(line.get(name) for name in COSTS)]
    return (all(is_number(line.get(key)) and line[key] >= 0 for key in ("epoch", "step"))
            and all(value is None or is_number(value) for value in values))


def is_number(value: object) -> bool:
    """Whether a value from JSON is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= float_info.max


def setting(config: dict, files: dict[str, str] | None = None, distilled: bool = True, length: bool = True) -> str:
    """What a configuration trains, apart from the seed, as a text that can be compared.

    Args:
        files: SHA-256 of checkpoints by path, which replaces the path where it is known.
        distilled: False leaves out teachers and methods, which gives the setting of the student alone.
        length: False leaves out the number of epochs, and the warm-up and milestones, which change with it.
    """
    config = copy.deepcopy(config)
    for section, names in SILENT.items():
        for name in names:
            (config.get(section) or {}).pop(name, None)
    if not length:
        for section, names in LENGTH.items():
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
