"""Which maps of the student a feature method compares with which of the teacher."""
from collections.abc import Sequence

from torch import Tensor, nn

from models import ConfigError, Detector, DetectorPass
from models.build import nearest


class FeaturePairs(nn.Module):
    """Pairs of maps, the student's brought to the teacher's width by a convolution where they differ.

    Args:
        levels: neck outputs, by number; all by default.
        student_modules, teacher_modules: names of modules whose outputs are compared in place of neck outputs, pair by
            pair, `neck.fpn_convs.0.conv` say; the teacher's are the student's when not given.
        adapter_kernel: size of the convolutions, 1 or 3.
    """

    def __init__(self, student: Detector, teacher: Detector, levels: Sequence[int] | None = None,
                 student_modules: Sequence[str] | None = None, teacher_modules: Sequence[str] | None = None,
                 adapter_kernel: int | None = 1):  # None: no convolutions, for a method that brings its own
        super().__init__()
        self.student_modules = tuple(student_modules or ())
        self.teacher_modules = tuple(teacher_modules or self.student_modules)
        if self.student_modules:
            if levels is not None or len(self.student_modules) != len(self.teacher_modules):
                raise ConfigError("student_modules", "takes the place of levels, and needs one of teacher_modules each")
            self.levels = ()
            self.student_channels = [module_channels(student, n, "student_modules") for n in self.student_modules]
            self.teacher_channels = [module_channels(teacher, n, "teacher_modules") for n in self.teacher_modules]
        else:
            self.levels = tuple(same_levels(student, teacher) if levels is None else levels)
            check_levels(self.levels, student, teacher)
            self.student_channels = [student.feature_channels[level] for level in self.levels]
            self.teacher_channels = [teacher.feature_channels[level] for level in self.levels]
        self.adapters = nn.ModuleList(adapter(own, other, adapter_kernel) for own, other in zip(
            self.student_channels, self.teacher_channels))

    def places(self) -> list[tuple[str, str]]:
        """Names of what each pair is taken from, in the student and in the teacher."""
        if self.student_modules:
            return list(zip(self.student_modules, self.teacher_modules))
        return [(f"neck output {level}",) * 2 for level in self.levels]

    def maps(self, student: DetectorPass, teacher: DetectorPass) -> list[tuple[Tensor, Tensor]]:
        """The pairs as they are: maps (N, C_s, H, W) and (N, C_t, H, W).

        Raises:
            ConfigError: what a module gives is no map, or the two maps of a pair differ in size.
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
            pairs = [(student.features[level], teacher.features[level]) for level in self.levels]
        for (own, other), (name, other_name) in zip(pairs, self.places()):
            if not (is_map(own) and is_map(other)) or own.shape[-2:] != other.shape[-2:]:
                own, other = (tuple(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
                              for x in (own, other))
                raise ConfigError("distill.methods", f"{name} of the student is {own} and {other_name} of the teacher "
                                                     f"{other}: maps of one size are needed")
        return pairs

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> list[tuple[Tensor, Tensor]]:
        """The pairs in the teacher's width: two maps (N, C_t, H, W) each."""
        return [(adapt(own), other) for adapt, (own, other) in zip(self.adapters, self.maps(student, teacher))]


def is_map(x: object) -> bool:
    """Whether a module's output is a map (N, C, H, W)."""
    return isinstance(x, Tensor) and x.dim() == 4


def adapter(student_channels: int, teacher_channels: int, kernel: int | None) -> nn.Module:
    """A convolution from one width to the other; nothing where they are the same or `kernel` is None."""
    if kernel is None or student_channels == teacher_channels:
        return nn.Identity()
    return nn.Conv2d(student_channels, teacher_channels, kernel, padding=kernel // 2)


def same_levels(student: Detector, teacher: Detector) -> range:
    """All neck outputs, of two detectors that have equally many.

    Raises:
        ConfigError: they have not.
    """
    own, other = len(student.feature_channels), len(teacher.feature_channels)
    if own != other:
        raise ConfigError("levels", f"the student has {own} feature levels and the teacher {other}: say which to use")
    return range(own)


def check_levels(levels: Sequence[int], student: Detector, teacher: Detector) -> None:
    """Refuse levels that are not there, or that do not lie on one grid."""
    own, other = student.bbox_head.prior_generator.strides, teacher.bbox_head.prior_generator.strides
    for level in levels:
        if not 0 <= level < min(len(own), len(other)):
            raise ConfigError("levels", f"must be among 0..{min(len(own), len(other)) - 1}, not {list(levels)}")
        if own[level] != other[level]:
            raise ConfigError("levels", f"level {level} has stride {own[level]} in the student and {other[level]} in "
                                        "the teacher")


def module_channels(detector: Detector, name: str, key: str) -> int:
    """Channels of the map that a detector's module gives: those of its last convolution.

    Raises:
        ConfigError: there is no such module, or no convolution in it.
    """
    modules = dict(detector.named_modules())
    if name not in modules:
        raise ConfigError(key, f'the detector has no module "{name}"; {nearest(name, modules)}')
    convolutions = [module for module in modules[name].modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        raise ConfigError(key, f'"{name}" has no convolution, so the width of its output is unknown')
    return convolutions[-1].out_channels
