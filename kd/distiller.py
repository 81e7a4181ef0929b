"""Student, frozen teachers and any list of methods."""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models import ConfigError, Detector, DetectorPass

from .methods.base.method import Method
from .methods.base.options import MethodOptions


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
