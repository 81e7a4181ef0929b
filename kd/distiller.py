"""Student, frozen teachers and any list of methods."""
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from models import ConfigError, Detector, ModelConfig, build_detector, without_pretraining
from models.build import OneOf, build, check_arguments, split_options
from models.weights import load_weights

from .crosskd import CrossKD
from .fgd import FGD
from .ld import LD
from .mimic import Mimic
from .pkd import PKD

METHODS = {"CrossKD": CrossKD, "FGD": FGD, "LD": LD, "Mimic": Mimic, "PKD": PKD}


@dataclass
class TeacherConfig:
    """A teacher: its model, from a configuration file or said here, and its weights."""

    checkpoint: str | None     # path or URL; null only where an untrained teacher is meant
    cfg: str | None = None     # a configuration file whose `model` section is the teacher's
    model: ModelConfig | None = None
    part: Literal["student", "teacher"] | None = None  # which model of an FGD checkpoint
    name: str | None = None    # tells its losses from another teacher's


@dataclass
class MethodOptions:
    """What every entry of `methods` may say beside its own arguments."""

    name: str | None = None    # tells its losses from another method's of the same kind


@dataclass
class DistillConfig:
    """The `distill` section."""

    teacher: TeacherConfig | list[TeacherConfig]
    methods: list[Annotated[dict, OneOf(METHODS, "student", "teacher", common=MethodOptions)]]
    eval_teacher: bool = True  # false lets the teacher's norm layers use batch statistics


class Distiller(nn.Module):
    """Runs the student and each teacher once per batch and sums the methods' losses onto the student's.

    Teachers are frozen and no part of `parameters()` or `state_dict()`, but they follow `.to()` and its kin.
    """

    def __init__(self, student: Detector, teachers: list[Detector], methods: list[list[nn.Module]],
                 names: list[list[str]], eval_teacher: bool = True):
        """`methods` and their `names` are listed for each teacher."""
        super().__init__()
        self.student = student
        self.methods = nn.ModuleList(nn.ModuleList(of_teacher) for of_teacher in methods)
        self.names = names
        self.eval_teacher = eval_teacher
        object.__setattr__(self, "teachers", teachers)  # past nn.Module's registration
        for teacher in teachers:
            teacher.requires_grad_(False)
        self.train(self.training)

    @property
    def teacher(self) -> Detector:
        """The first teacher."""
        return self.teachers[0]

    def _apply(self, fn, recurse: bool = True):
        for teacher in self.teachers:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> "Distiller":
        for teacher in self.teachers:
            teacher.train(mode and not self.eval_teacher)
        return super().train(mode)

    def loss(self, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """The student's losses plus every method's, scalars.

        Args:
            images: (N, 3, H, W), normalised by the student's `preprocess`.
            targets: a dict per image.
        """
        wanted = [method for methods in self.methods for method in methods]
        student = self.student.run(images, targets, cuts=union(wanted, "student_cuts"),
                                   modules=union(wanted, "student_modules"))
        losses = self.student.losses(student)
        found = []
        for teacher, methods, names in zip(self.teachers, self.methods, self.names):
            seen = self._run_teacher(teacher, methods, images, targets)
            for method, name in zip(methods, names):
                found += [(key, name, value) for key, value in method(student, seen).items()]
        times = Counter(key for key, _, _ in found)
        return losses | {key if times[key] == 1 else f"{key}/{name}": value for key, name, value in found}

    @torch.no_grad()
    def _run_teacher(self, teacher: Detector, methods: nn.ModuleList, images: Tensor, targets: list[dict]):
        images = teacher.preprocess.convert(images, targets, self.student.preprocess)
        return teacher.run(images, targets, cuts=union(methods, "teacher_cuts"),
                           modules=union(methods, "teacher_modules"), with_head=any(m.teacher_head for m in methods))

    def predict(self, images: Tensor, targets: list[dict]) -> list[dict]:
        """The student's detections, see `Detector.predict`."""
        return self.student.predict(images, targets)

    def forward(self, images: Tensor, targets: list[dict]) -> dict[str, Tensor] | list[dict]:
        return self.loss(images, targets) if self.training else self.predict(images, targets)


def union(methods, attribute: str) -> tuple:
    """What any of the methods asks for, each once."""
    return tuple(dict.fromkeys(item for method in methods for item in getattr(method, attribute)))


def build_distiller(cfg: dict) -> Distiller:
    """Build student, teachers and methods from a configuration's `model` and `distill` sections.

    Raises:
        ConfigError: a bad key, or a pair of detectors that a method cannot work on.
        CheckpointError: a teacher whose weights do not load completely.
    """
    distill = cfg["distill"]
    check_arguments(DistillConfig, distill, "distill")
    student = build_detector(cfg["model"])
    entries = distill["teacher"] if isinstance(distill["teacher"], list) else [distill["teacher"]]
    teachers = [build_teacher(entry, student.bbox_head.num_classes) for entry in entries]
    methods = [build_methods(distill["methods"], student, teacher) for teacher in teachers]
    of_methods = unique_names(distill["methods"], "distill.methods", [entry["type"] for entry in distill["methods"]])
    of_teachers = unique_names(entries, "distill.teacher", ["teacher"] * len(entries))
    names = [of_methods if len(entries) == 1 else [f"{teacher}/{method}" for method in of_methods]
             for teacher in of_teachers]
    return Distiller(student, teachers, methods, names, distill.get("eval_teacher", True))


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
    model = model | {"head": {"num_classes": num_classes} | model["head"]}
    teacher = build_detector(without_pretraining(model))
    if entry["checkpoint"] is not None:
        load_weights(teacher, entry["checkpoint"], entry.get("part"))
    return teacher


def teacher_model(path: str) -> dict:
    """The `model` section of a teacher's configuration file, looked up from here and from the project's folder."""
    from .engine.config import load_config  # which checks `distill` sections against this module
    project = Path(__file__).resolve().parents[1]
    try:
        return load_config(path if Path(path).exists() else project / path)["model"]
    except ConfigError as error:
        raise ConfigError("distill.teacher.cfg", str(error)) from None


def build_methods(entries: list[dict], student: Detector, teacher: Detector) -> list[nn.Module]:
    """The methods of one student-teacher pair."""
    methods = []
    for i, entry in enumerate(entries):
        own = {"type": entry["type"]} | split_options(entry, MethodOptions)[1]
        methods.append(build(own, METHODS, f"distill.methods.{i}", student=student, teacher=teacher))
    return methods
