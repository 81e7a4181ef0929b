"""Builds student, teachers and methods from a configuration."""
from dataclasses import replace
from pathlib import Path

import torch

from models import ConfigError, Detector, build_detector, without_pretraining
from models.build import build, check_arguments, split_options
from models.weights import CheckpointError, load_weights, print_once, summary

from .config.load import load_config
from .config.sections import DistillConfig, teacher_entries
from .distiller import Distiller
from .methods import METHODS
from .methods.base.method import Method
from .methods.base.options import MethodOptions


def build_distiller(cfg: dict) -> Distiller:
    """Build student, teachers and methods from a configuration's `model` and `distill` sections.

    Raises:
        ConfigError: a bad key, or a pair of detectors that a method cannot work on.
        CheckpointError: a teacher whose weights do not load completely.
    """
    distill = cfg["distill"]
    check_arguments(DistillConfig, distill, "distill")
    student = build_detector(cfg["model"])
    entries = teacher_entries(cfg)
    teachers = [build_teacher(entry, student.bbox_head.num_classes) for entry in entries]
    methods = [build_methods(distill["methods"], student, teacher) for teacher in teachers]
    of_methods = unique_names(distill["methods"], "distill.methods", [entry["type"] for entry in distill["methods"]])
    of_teachers = unique_names(entries, "distill.teacher", ["teacher"] * len(entries))
    options = []
    for teacher, entry in zip(of_teachers, entries):
        common = [MethodOptions(**split_options(method, MethodOptions)[0]) for method in distill["methods"]]
        options.append([replace(own, name=name if len(entries) == 1 else f"{teacher}/{name}",
                                weight=own.weight * entry.get("weight", 1.0)) for own, name in zip(common, of_methods)])
    if distill.get("init_student"):
        inherit(student, teachers[0])
    return Distiller(student, teachers, methods, options, distill.get("eval_teacher", True))


@torch.no_grad()
def inherit(student: Detector, teacher: Detector) -> None:
    """FGD's inheriting strategy (arXiv:2111.11837, section 4.1): the student's neck and head start as the teacher's.

    What the teacher lacks or has in another shape is left as it is, and said.
    """
    wanted = {name: value for name, value in student.state_dict().items() if not name.startswith("backbone.")}
    given = teacher.state_dict()
    kept = []
    for name, value in wanted.items():
        if name in given and given[name].shape == value.shape:
            value.copy_(given[name])
        else:
            kept.append(name)
    line = f"the student's neck and head start from the teacher's weights: {len(wanted) - len(kept)} of {len(wanted)}"
    print_once(f"{line} tensors" + (f"; left as they were, of another shape: {summary(kept)}" if kept else ""))


def unique_names(entries: list[dict], key: str, kinds: list[str]) -> list[str]:
    """Each entry's `name`, or its kind and number.

    Raises:
        ConfigError: two are the same, so that one's losses would hide the other's.
    """
    names = [entry.get("name") or f"{kind}{i}" for i, (entry, kind) in enumerate(zip(entries, kinds))]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(f"{key}.{i}.name", f'"{name}" names two of them; give each its own')
    return names


def build_teacher(entry: dict, num_classes: int) -> Detector:
    """A teacher with its weights loaded; it has the student's classes unless its configuration says how many."""
    if (entry.get("cfg") is None) == (entry.get("model") is None):
        raise ConfigError("distill.teacher", "needs either cfg, a configuration file, or model, the section itself")
    model = entry["model"] if entry.get("cfg") is None else teacher_model(entry["cfg"])
    class_map = entry.get("class_map")
    if class_map is not None:
        if len(class_map) != num_classes:
            raise ConfigError("distill.teacher.class_map", f"has {len(class_map)} entries for the student's "
                                                           f"{num_classes} classes")
        if model["head"].get("num_classes") is None and sorted(class_map) != list(range(num_classes)):
            raise ConfigError("distill.teacher.class_map", "needs the teacher's own class count: say "
                                                           "model.head.num_classes in its configuration")
    model = model | {"head": {"num_classes": num_classes} | model["head"]}
    teacher = build_detector(without_pretraining(model))
    if entry["checkpoint"] is not None:
        load_teacher(teacher, entry)
    if class_map is not None:
        try:
            teacher.bbox_head.select_classes(class_map)
        except ConfigError as error:
            raise ConfigError("distill.teacher.class_map", error.problem) from None
    teacher.precision = entry.get("precision")
    return teacher


def load_teacher(teacher: Detector, entry: dict) -> None:
    """Its weights.

    Raises:
        CheckpointError: they do not load completely, or are not there: then it says what to train first.
    """
    path = entry["checkpoint"]
    if entry.get("cfg") and Path(path).name in ("last.pth", "best.pth") and not Path(path).exists():
        raise CheckpointError(f"distill.teacher.checkpoint: {path} does not exist. Train the teacher first (python "
                              f"scripts/train.py --cfg {entry['cfg']} --work-dir {Path(path).parent}), or give the "
                              "checkpoint that you have")
    load_weights(teacher, path, entry.get("part"))


def teacher_model(path: str) -> dict:
    """The `model` section of a teacher's configuration file, looked up from here and from the project's folder."""
    project = Path(__file__).resolve().parents[1]
    try:
        return load_config(path if Path(path).exists() else project / path)["model"]
    except ConfigError as error:
        raise ConfigError("distill.teacher.cfg", str(error)) from None


def build_methods(entries: list[dict], student: Detector, teacher: Detector) -> list[Method]:
    """The methods of one student-teacher pair."""
    methods = []
    for i, entry in enumerate(entries):
        own = {"type": entry["type"]} | split_options(entry, MethodOptions)[1]
        methods.append(build(own, METHODS, f"distill.methods.{i}", student=student, teacher=teacher))
    return methods
