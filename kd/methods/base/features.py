"""Pairs of a student's and a teacher's feature maps, for methods that compare maps."""
from collections.abc import Sequence

from torch import Tensor, nn

from models import ConfigError, Detector, DetectorPass
from models.build import nearest


class FeaturePairs(nn.Module):
    """Pairs of maps. Where the channels differ, a convolution takes the student's map to the teacher's channels.

    Args:
        levels: numbers of the student's neck outputs to compare, each with the teacher's map of the same stride; by
            default, all for which the teacher has one.
        student_modules, teacher_modules: names of modules whose outputs are compared pair by pair, in place of neck
            outputs, for example `neck.fpn_convs.0.conv`; teacher_modules is student_modules by default.
        adapter_kernel: kernel size of the convolutions, 1 or 3.
    """

    def __init__(self, student: Detector, teacher: Detector, levels: Sequence[int] | None = None,
                 student_modules: Sequence[str] | None = None, teacher_modules: Sequence[str] | None = None,
                 adapter_kernel: int | None = 1):  # None: no convolutions, for a method that has its own
        super().__init__()
        self.student_modules = tuple(student_modules or ())
        self.teacher_modules = tuple(teacher_modules or self.student_modules)
        self.unpaired: list[int] = []  # strides of the student's maps for which the teacher has none
        if teacher_modules and not student_modules:
            raise ConfigError("teacher_modules", "names modules of the teacher, and student_modules does not say which "
                                                 "of the student they are compared with: add student_modules")
        if self.student_modules:
            if levels is not None or len(self.student_modules) != len(self.teacher_modules):
                raise ConfigError("student_modules", "give these or levels, not both, and as many as teacher_modules")
            self.levels = self.teacher_levels = ()
            self.student_channels = [module_channels(student, n, "student_modules") for n in self.student_modules]
            self.teacher_channels = [module_channels(teacher, n, "teacher_modules") for n in self.teacher_modules]
        else:
            own, other = student.strides, teacher.strides
            if levels is not None and not levels:
                raise ConfigError("levels", "names no level: name some, or leave it out for all of them")
            if levels is None:
                levels = [level for level, stride in enumerate(own) if stride in other]
                self.unpaired = [stride for stride in own if stride not in other]
            check_levels(levels, own, other)
            self.levels = tuple(levels)
            self.teacher_levels = tuple(other.index(own[level]) for level in levels)
            self.student_channels = [student.feature_channels[level] for level in self.levels]
            self.teacher_channels = [teacher.feature_channels[level] for level in self.teacher_levels]
        self.adapters = nn.ModuleList(adapter(own, other, adapter_kernel) for own, other in zip(
            self.student_channels, self.teacher_channels))

    def places(self) -> list[tuple[str, str]]:
        """The names of each pair's maps, in the student and in the teacher."""
        if self.student_modules:
            return list(zip(self.student_modules, self.teacher_modules))
        return [(f"neck output {own}", f"neck output {other}")
                for own, other in zip(self.levels, self.teacher_levels)]

    def maps(self, student: DetectorPass, teacher: DetectorPass) -> list[tuple[Tensor, Tensor]]:
        """The pairs before the convolutions: maps (N, C_s, H, W) and (N, C_t, H, W).

        Raises:
            ConfigError: the output of a module is not a map, or the two maps of a pair differ in size.
        """
        if self.student_modules:
            for seen, names in ((student.modules, self.student_modules), (teacher.modules, self.teacher_modules)):
                for name in names:
                    if name not in seen:
                        raise ConfigError("distill.methods", f'"{name}" only holds other modules and is never called: '
                                                             "name one of them")
            pairs = [(student.modules[own], teacher.modules[other])
                     for own, other in zip(self.student_modules, self.teacher_modules)]
        else:
            pairs = [(student.features[own], teacher.features[other])
                     for own, other in zip(self.levels, self.teacher_levels)]
        for (own, other), (name, other_name) in zip(pairs, self.places()):
            are_maps = all(isinstance(x, Tensor) and x.dim() == 4 for x in (own, other))  # (N, C, H, W)
            if not are_maps or own.shape[-2:] != other.shape[-2:]:
                own, other = (tuple(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
                              for x in (own, other))
                raise ConfigError("distill.methods", f"{name} of the student is {own} and {other_name} of the teacher "
                                                     f"{other}: maps of one size are needed")
        return pairs

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> list[tuple[Tensor, Tensor]]:
        """The pairs after the convolutions: two maps (N, C_t, H, W) each."""
        return [(adapt(own), other) for adapt, (own, other) in zip(self.adapters, self.maps(student, teacher))]


def adapter(student_channels: int, teacher_channels: int, kernel: int | None) -> nn.Module:
    """A convolution between the two numbers of channels; an identity if they are equal or `kernel` is None."""
    if kernel is None or student_channels == teacher_channels:
        return nn.Identity()
    return nn.Conv2d(student_channels, teacher_channels, kernel, padding=kernel // 2)


def check_levels(levels: Sequence[int], student: Sequence[int], teacher: Sequence[int]) -> None:
    """Raise ConfigError for levels that do not exist, or whose strides the teacher does not have.

    Args:
        student, teacher: strides of the maps.
    """
    if not levels:
        raise ConfigError("levels", f"none: the student's maps have strides {student} and the teacher's {teacher}")
    for level in levels:
        if not 0 <= level < len(student) or levels.count(level) > 1:
            raise ConfigError("levels", f"must be among 0..{len(student) - 1}, each once, not {list(levels)}")
        if student[level] not in teacher:
            raise ConfigError("levels", f"level {level} has stride {student[level]} in the student, and the teacher's "
                                        f"strides are {teacher}")


def module_channels(detector: Detector, name: str, key: str) -> int:
    """The output channels of a module's last convolution; ConfigError if there is no such module or convolution."""
    modules = {key: module for key, module in detector.named_modules() if key}  # without the detector itself
    if name not in modules:
        raise ConfigError(key, f'the detector has no module "{name}"; {nearest(name, modules)}')
    convolutions = [module for module in modules[name].modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        raise ConfigError(key, f'"{name}" has no convolution, so the width of its output is unknown')
    return convolutions[-1].out_channels
