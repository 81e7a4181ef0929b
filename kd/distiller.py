"""The distiller: a student, its frozen teachers and the distillation methods."""
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from losses import total_loss
from models import ConfigError, Detector, DetectorPass
from models.targets import count_labelled

from .cache import TeacherCache
from .gradients import GradientShares, gradient_norm
from .methods.base import Method, MethodOptions


class PlannedMethod(NamedTuple):
    """A method that runs at the current step."""

    method: Method
    name: str
    factor: float  # multiplies its losses, and so does what `GradientShares` measures


Plan = list[tuple[Detector, list[PlannedMethod]]]  # each teacher that is needed at this step, with its methods


class Passes(NamedTuple):
    """The passes of student and teachers over one batch."""

    student: DetectorPass
    teachers: list[DetectorPass]  # one for each teacher of the plan
    plan: Plan


class Distiller(nn.Module):
    """Runs the student and each teacher once per batch, and adds the methods' losses to the student's.

    Teachers are frozen and absent from `parameters()` and `state_dict()`, but `.to()`, `.cuda()` and similar calls
    move them, too.
    """

    def __init__(self, student: Detector, teachers: list[Detector], methods: list[list[Method]],
                 options: list[list[MethodOptions]], eval_teacher: bool = True):
        """`methods` and `options` hold a list for each teacher; every `MethodOptions` has its own name."""
        super().__init__()
        self.student = student
        self.methods = nn.ModuleList(nn.ModuleList(of_teacher) for of_teacher in methods)
        self.options = options
        self.gradient_shares = GradientShares([option for of_teacher in options for option in of_teacher])
        self.eval_teacher = eval_teacher
        self.caches: list[TeacherCache] = []  # one for each teacher, or none
        self.stream: torch.cuda.Stream | None = None  # on which the teachers run; None: after the student
        self.on_part: Callable[[str], object] = str  # is told the part of a step that has just been done
        self.step, self.epoch, self.epochs = 0, 0.0, float("inf")
        self.reported: set[tuple[str, str]] = set()  # (loss, method) of every loss that was reported so far
        object.__setattr__(self, "teachers", teachers)  # so that nn.Module does not register them
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
        """Call `Detector.compile` for the student and all teachers that are not sharded.

        Raises:
            ConfigError: a method needs the outputs of named modules.
        """
        for method in (method for methods in self.methods for method in methods):
            if method.student_modules or method.teacher_modules:
                raise ConfigError("train.compile", f"{type(method).__name__} needs the outputs of named modules, which "
                                                   "compiled code does not give: distil levels, or do not compile")
        from torch._functorch import config  # here, because only compiled code needs it
        config.donated_buffer = False  # gradients at the neck need what is freed for one backward pass
        for detector in (self.student, *(teacher for teacher in self.teachers if not teacher.sharded)):
            detector.compile(*args, **kwargs)

    def advance(self, step: int, steps_per_epoch: int, epochs: int) -> None:
        """Set the progress that the methods' schedules use: `step` steps done, `epochs` epochs in total."""
        self.step, self.epoch, self.epochs = step, step / steps_per_epoch, epochs

    def plan(self) -> Plan:
        """The methods that run at the current step, with their teachers."""
        plan = [(teacher, [PlannedMethod(method, option.name, option.factor(self.epoch, self.epochs))
                           for method, option in zip(methods, options) if option.runs(self.step, self.epoch)])
                for teacher, methods, options in zip(self.teachers, self.methods, self.options)]
        return [(teacher, entries) for teacher, entries in plan if entries]

    def whole_plan(self) -> Plan:
        """All teachers with all methods, at any step."""
        return [(teacher, [PlannedMethod(method, option.name, option.constant)
                           for method, option in zip(methods, options)])
                for teacher, methods, options in zip(self.teachers, self.methods, self.options)]

    @property
    def all_methods_always_run(self) -> bool:
        """Whether every method runs at every step."""
        return all(option.every == 1 and option.stop_epoch is None for options in self.options for option in options)

    def passes(self, images: Tensor, targets: list[dict], plan: Plan | None = None, with_heads: bool = False,
               assign: bool = True) -> Passes:
        """Run the student and the teachers of a plan over a batch; `images` and `targets` are as in `loss`.

        Args:
            plan: by default `plan()`.
            with_heads: run the heads of all teachers, even if no method needs them.
            assign: assign the targets to the student's anchors.
        """
        plan = self.plan() if plan is None else plan
        student = self.run_student(images, targets, plan, assign)
        teachers = []
        for teacher, entries in plan:
            count = shown_to(entries, targets) if assign else len(targets)
            teachers.append(self.run_teacher(teacher, entries, images[:count], targets[:count], with_heads))
        return Passes(student, teachers, plan)

    def run_student(self, images: Tensor, targets: list[dict], plan: Plan, assign: bool = True) -> DetectorPass:
        """The student's pass, with everything that the methods of a plan need from it."""
        methods = [entry.method for _, entries in plan for entry in entries]
        return self.student.run(images, targets, union(methods, "student_cuts"), union(methods, "student_modules"),
                                assign=assign)

    @torch.no_grad()
    def run_teacher(self, teacher: Detector, entries: list[PlannedMethod], images: Tensor, targets: list[dict],
                    with_head: bool = False) -> DetectorPass:
        """A teacher's pass over the student's batch, with everything that `entries` need from it."""
        methods = [entry.method for entry in entries]
        images = teacher.preprocess.convert(images, targets, self.student.preprocess)
        return teacher.run(images, targets, union(methods, "teacher_cuts"), union(methods, "teacher_modules"),
                           with_head or any(method.teacher_head for method in methods))

    def answers(self, teacher: Detector, entries: list[PlannedMethod], images: Tensor, targets: list[dict]
                ) -> DetectorPass:
        """A teacher's pass as the methods need it, from its cache if it has one. It holds nothing else then."""
        number = self.teachers.index(teacher)
        if self.caches:
            _, entries = self.whole_plan()[number]  # so that a stored answer serves all steps
        count = shown_to(entries, targets)
        images, targets = images[:count], targets[:count]
        if not self.caches:
            return self.run_teacher(teacher, entries, images, targets)
        return self.caches[number].answer(
            images, targets, lambda: teacher.preprocess.convert(images, targets, self.student.preprocess),
            lambda shown: self.run_teacher(teacher, entries, shown, targets))

    def read_ahead(self, targets: list[dict], step: int, steps_per_epoch: int) -> None:
        """Begin to read the answers for a batch of a later step from the caches of the teachers that it needs."""
        for cache, options, (_, entries) in zip(self.caches, self.options, self.whole_plan()):
            if any(option.runs(step, step / steps_per_epoch) for option in options):
                cache.read_ahead(targets[:shown_to(entries, targets)])

    def loss(self, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """The losses of the student and of every method, scalars.

        Args:
            images: (N, 3, H, W), normalised by the student's `preprocess`.
            targets: a dict per image. Unlabelled images come last; their dicts have `unlabelled: True`. Only methods
                with `needs_labels = False` see them.
        """
        return self.loss_and_pass(images, targets)[0]

    def loss_and_pass(self, images: Tensor, targets: list[dict]) -> tuple[dict[str, Tensor], DetectorPass]:
        """`loss`, and the student's pass."""
        plan = self.plan()
        with self.beside() as stream:
            student = self.run_student(images, targets, plan)
            self.on_part("student")
            with stream:
                teachers = [self.answers(teacher, entries, images, targets) for teacher, entries in plan]
        self.on_part("teacher")
        losses = self.student.losses(student)
        self.on_part("student")
        plain = {name: (factor, method(*seen_by(method, student, teacher)))
                 for teacher, (_, entries) in zip(teachers, plan) for method, name, factor in entries}
        self.gradient_shares.measure(self.step, total_loss(losses), {
            name: total_loss(values) for name, (_, values) in plain.items()}, student.features)
        found = {}
        for name, (factor, values) in plain.items():
            weight = self.gradient_shares.weigh(name, factor)
            found |= {(key, name): weight * value for key, value in values.items()}
        self.reported |= found.keys()
        self.on_part("methods")
        return losses | {self.key(key, name): value for (key, name), value in found.items()}, student

    @contextmanager
    def beside(self) -> Iterator[AbstractContextManager]:
        """Within this context, what runs in the yielded one does not wait for the rest, if there is a `stream`.

        Both wait for what was before, and what comes next waits for both. So no tensor is freed too early.
        """
        if self.stream is None:
            yield nullcontext()
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        yield torch.cuda.stream(self.stream)
        torch.cuda.current_stream().wait_stream(self.stream)

    def key(self, key: str, name: str) -> str:
        """The name of a loss in the result: if several methods report `key`, the method's name is appended."""
        return key if sum(other == key for other, _ in self.reported) == 1 else f"{key}/{name}"

    def by_method(self, values: dict) -> dict[str, list]:
        """The values of each method's losses, taken from a dict such as `loss` returns."""
        found = {}
        for key, name in sorted(self.reported):
            if self.key(key, name) in values:
                found.setdefault(name, []).append(values[self.key(key, name)])
        return found

    def shares(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each method's share of the total loss, under the key `share/NAME`."""
        total = total_loss(losses).detach()
        return {f"share/{name}": sum(values).detach() / total for name, values in self.by_method(losses).items()}

    def measured_weights(self) -> dict[str, Tensor]:
        """The weight of each method with a `gradient_share` that runs at the current step, as `weight/NAME`."""
        return {f"weight/{name}": self.gradient_shares.weigh(name, factor) for _, entries in self.plan()
                for _, name, factor in entries if name in self.gradient_shares.shares}

    def gradient_norms(self, losses: dict[str, Tensor], features: list[Tensor], scale: float = 1.0) -> dict[str, float]:
        """Gradient norms at the student's neck: of the student's own losses, and of the losses of each method.

        The gradient of a level includes that of the levels which are computed from it, unless the neck is compiled.

        Args:
            losses, features: the losses and the pass's features from one `loss_and_pass`, before the backward pass.
            scale: multiplies the losses before they are differentiated, so that fp16 does not lose small gradients.
        """
        of_methods = self.by_method(losses)
        own = losses.keys() - {self.key(key, name) for key, name in self.reported}
        norms = {}
        for name, values in ({"student": [losses[key] for key in sorted(own)]} | of_methods).items():
            norm = gradient_norm(sum(values), features, scale)
            norms[name] = 0.0 if norm is None else float(norm)
        return norms

    def predict(self, images: Tensor, targets: list[dict]) -> list[dict]:
        """The student's detections, see `Detector.predict`."""
        return self.student.predict(images, targets)

    def forward(self, images: Tensor, targets: list[dict], with_pass: bool = False
                ) -> dict[str, Tensor] | list[dict] | tuple[dict[str, Tensor], DetectorPass]:
        """In training `loss`, or `loss_and_pass` if `with_pass`; otherwise `predict`."""
        if not self.training:
            return self.predict(images, targets)
        return self.loss_and_pass(images, targets) if with_pass else self.loss(images, targets)


def shown_to(entries: list[PlannedMethod], targets: list[dict]) -> int:
    """The number of a batch's images that a teacher is run on: without the unlabelled ones if all methods need labels.
    """
    return count_labelled(targets) if all(entry.method.needs_labels for entry in entries) else len(targets)


def seen_by(method: Method, student: DetectorPass, teacher: DetectorPass) -> tuple[DetectorPass, DetectorPass]:
    """The passes that a method gets: without the unlabelled images if it needs labels."""
    return (student.labelled, teacher.labelled) if method.needs_labels else (student, teacher)


def union(methods: list[Method], attribute: str) -> tuple:
    """The items that this attribute of any method lists, each once."""
    return tuple(dict.fromkeys(item for method in methods for item in getattr(method, attribute)))
