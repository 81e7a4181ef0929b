"""Student, frozen teachers and any list of methods."""
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from models import (
    ConfigError,
    Detector,
    DetectorPass,
    ModelConfig,
    Precision,
    build_detector,
    without_pretraining,
)
from models.build import OneOf, build, check_arguments, split_options
from models.weights import CheckpointError, load_weights, print_once, summary

from .methods.base.method import Method
from .methods.base.options import MethodOptions
from .methods.crosskd import CrossKD
from .methods.cwd import CWD
from .methods.fgd import FGD
from .methods.fitnet import FitNet
from .methods.ld import LD
from .methods.logits import DKD, KD
from .methods.mgd import MGD
from .methods.mimic import Mimic
from .methods.pkd import PKD

METHODS = {method.__name__: method for method in (CrossKD, Mimic, LD, KD, DKD, FGD, PKD, MGD, CWD, FitNet)}


@dataclass
class TeacherConfig:
    """A teacher: its model, from a configuration file or said here, and its weights."""

    checkpoint: str | None     # path or URL; null only where an untrained teacher is meant
    cfg: str | None = None     # a configuration file whose `model` section is the teacher's
    model: ModelConfig | None = None
    part: Literal["student", "teacher"] | None = None  # which model of an FGD checkpoint
    name: str | None = None    # tells its losses from another teacher's
    weight: float = 1.0        # multiplies the losses of all methods with this teacher
    class_map: list[int] | None = None  # the teacher's class for each of the student's; null: they have the same
    precision: Precision | None = None  # of its convolutions; null is the student's
    shard: bool = False        # for one too large for a device: in training its weights are spread over the processes


@dataclass
class DistillConfig:
    """The `distill` section."""

    teacher: TeacherConfig | list[TeacherConfig]
    methods: list[Annotated[dict, OneOf(METHODS, "student", "teacher", common=MethodOptions)]]
    eval_teacher: bool = True  # false lets the teacher's norm layers use batch statistics
    init_student: bool = False  # the student's neck and head start from the first teacher's weights, as in FGD


class Distiller(nn.Module):
    """Runs the student and each teacher once per batch and sums the methods' losses onto the student's.

    Teachers are frozen and no part of `parameters()` or `state_dict()`, but they follow `.to()` and its kin.
    """

    def __init__(self, student: Detector, teachers: list[Detector], methods: list[list[Method]],
                 options: list[list[MethodOptions]], eval_teacher: bool = True):
        """`methods` and their `options` are listed for each teacher; every option has a name of its own."""
        super().__init__()
        self.student = student
        self.methods = nn.ModuleList(nn.ModuleList(of_teacher) for of_teacher in methods)
        self.options = options
        self.eval_teacher = eval_teacher
        self.step, self.epoch, self.epochs = 0, 0.0, float("inf")
        self.reported: set[tuple[str, str]] = set()  # which method has ever reported which loss
        self.features: list[Tensor] | None = None    # the student's neck outputs, where `keep_features` asks for them
        self.keep_features = False
        object.__setattr__(self, "teachers", teachers)  # past nn.Module's registration
        for teacher in teachers:
            teacher.requires_grad_(False)
        self.train(self.training)

    @property
    def teacher(self) -> Detector:
        """The first teacher."""
        return self.teachers[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distiller":
        for teacher in self.teachers:
            if not teacher.sharded:
                teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> "Distiller":
        for teacher in self.teachers:
            teacher.train(mode and not self.eval_teacher)
        return super().train(mode)

    def compile(self, *args: object, **kwargs: object) -> None:
        """Let `torch.compile` have the student and all teachers that are not sharded, see `Detector.compile`.

        Raises:
            ConfigError: a method needs outputs of modules by name.
        """
        for method in (method for methods in self.methods for method in methods):
            if method.student_modules or method.teacher_modules:
                raise ConfigError("train.compile", f"{type(method).__name__} takes outputs of modules by name, which "
                                                   "compiled code does not give: distil levels, or do not compile")
        for detector in (self.student, *(teacher for teacher in self.teachers if not teacher.sharded)):
            detector.compile(*args, **kwargs)

    def advance(self, step: int, steps_per_epoch: int, epochs: int) -> None:
        """Say where training stands, for the methods' schedules: steps done, of `epochs` epochs."""
        self.step, self.epoch, self.epochs = step, step / steps_per_epoch, epochs

    def scheduled(self) -> list[tuple[Detector, list[tuple[Method, str, float]]]]:
        """What runs now: each teacher with its methods, their names and what their losses are multiplied by."""
        plan = [(teacher, [(method, option.name, option.factor(self.epoch, self.epochs))
                           for method, option in zip(methods, options) if option.runs(self.step, self.epoch)])
                for teacher, methods, options in zip(self.teachers, self.methods, self.options)]
        return [(teacher, entries) for teacher, entries in plan if entries]

    @property
    def all_methods_always_run(self) -> bool:
        """Whether every method runs at every step."""
        return all(option.every == 1 and option.stop_epoch is None for options in self.options for option in options)

    def passes(self, images: Tensor, targets: list[dict]) -> tuple[DetectorPass, list[DetectorPass], dict[str, Tensor]]:
        """Run the student and the teachers that are needed now.

        Returns:
            The student's pass, one for each of `scheduled`'s teachers, and the student's losses.
        """
        plan = self.scheduled()
        wanted = [method for _, entries in plan for method, _, _ in entries]
        student = self.student.run(images, targets, cuts=union(wanted, "student_cuts"),
                                   modules=union(wanted, "student_modules"))
        losses = self.student.losses(student)
        seen = [self._run_teacher(teacher, [method for method, _, _ in entries], images, targets)
                for teacher, entries in plan]
        return student, seen, losses

    def loss(self, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """The student's losses plus every method's, scalars.

        Args:
            images: (N, 3, H, W), normalised by the student's `preprocess`.
            targets: a dict per image.
        """
        student, seen, losses = self.passes(images, targets)
        self.features = student.features if self.keep_features else None
        found = {}
        for teacher, (_, entries) in zip(seen, self.scheduled()):
            for method, name, factor in entries:
                found |= {(key, name): factor * value for key, value in method(student, teacher).items()}
        self.reported |= found.keys()
        return losses | {self.key(key, name): value for (key, name), value in found.items()}

    def key(self, key: str, name: str) -> str:
        """A loss's name in the result: with the method's behind it where another one reports the same."""
        return key if sum(other == key for other, _ in self.reported) == 1 else f"{key}/{name}"

    def by_method(self, values: dict) -> dict[str, list]:
        """The values of each method's losses, picked from a dict like `loss` returns."""
        found = {}
        for key, name in sorted(self.reported):
            if self.key(key, name) in values:
                found.setdefault(name, []).append(values[self.key(key, name)])
        return found

    def shares(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each method's share of the total loss, under `share/` and its name."""
        total = sum(losses.values()).detach()
        return {f"share/{name}": sum(values).detach() / total for name, values in self.by_method(losses).items()}

    def gradient_norms(self, losses: dict[str, Tensor], scale: float = 1.0) -> dict[str, float]:
        """Norm of the gradient that the student's own losses and each method's have at its neck's outputs.

        A level that further ones are made of gets their gradient, too.

        Args:
            losses: of the last `loss`, before their backward; `keep_features` must have been set.
            scale: they are multiplied by it on their way back, so that fp16 does not lose them.
        """
        of_methods = self.by_method(losses)
        own = losses.keys() - {self.key(key, name) for key, name in self.reported}
        norms = {}
        for name, values in ({"student": [losses[key] for key in sorted(own)]} | of_methods).items():
            gradients = torch.autograd.grad(scale * sum(values), self.features, retain_graph=True, allow_unused=True)
            parts = [gradient.double().norm() for gradient in gradients if gradient is not None]
            norms[name] = float(torch.stack(parts).norm()) / scale if parts else 0.0
        return norms

    @torch.no_grad()
    def _run_teacher(self, teacher: Detector, methods: list[Method], images: Tensor,
                     targets: list[dict]) -> DetectorPass:
        images = teacher.preprocess.convert(images, targets, self.student.preprocess)
        return teacher.run(images, targets, cuts=union(methods, "teacher_cuts"),
                           modules=union(methods, "teacher_modules"), with_head=any(m.teacher_head for m in methods))

    def predict(self, images: Tensor, targets: list[dict]) -> list[dict]:
        """The student's detections, see `Detector.predict`."""
        return self.student.predict(images, targets)

    def forward(self, images: Tensor, targets: list[dict]) -> dict[str, Tensor] | list[dict]:
        return self.loss(images, targets) if self.training else self.predict(images, targets)


def union(methods: list[Method], attribute: str) -> tuple:
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


def teacher_entries(cfg: dict) -> list[dict]:
    """The teachers of a configuration, which says one or a list; none without a `distill` section."""
    teachers = cfg["distill"]["teacher"] if cfg.get("distill") else []
    return teachers if isinstance(teachers, list) else [teachers]


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
    from .config.load import load_config  # which checks `distill` sections against this module
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
