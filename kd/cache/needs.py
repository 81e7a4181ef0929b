"""What a set of methods needs of a teacher, and its names in a stored entry."""
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from data.errors import counted
from models import ConfigError, Detector, DetectorPass, HeadOutputs

from ..methods.base import Method


class Needs(NamedTuple):
    """What methods need of a teacher's pass.

    Attributes:
        levels: numbers of the neck's outputs.
        head: whether its predictions are needed.
        cuts: tower layers whose features are needed.
        modules: names of modules whose outputs are needed.
    """

    levels: tuple[int, ...]
    head: bool
    cuts: tuple[int, ...]
    modules: tuple[str, ...]


def needs_of(methods: Iterable[Method], teacher: Detector) -> Needs:
    """The union over all methods of a teacher, also over those that run only at some steps."""
    methods = list(methods)
    every = range(len(teacher.feature_channels))
    levels = {level for method in methods
              for level in (every if method.teacher_levels is None else method.teacher_levels)}
    return Needs(tuple(sorted(levels)), any(method.teacher_head for method in methods),
                 tuple(sorted({cut for method in methods for cut in method.teacher_cuts})),
                 tuple(sorted({name for method in methods for name in method.teacher_modules})))


def named_tensors(seen: DetectorPass, needs: Needs) -> dict[str, Tensor]:
    """The tensors (N, ...) of a pass that are needed, by name.

    Raises:
        ConfigError: a module was never called, or its output has no entry for each image.
    """
    found = {f"level {level}": seen.features[level] for level in needs.levels}
    if needs.head:
        found |= {"cls": seen.outputs.cls, "box": seen.outputs.box}
        if seen.outputs.centerness is not None:
            found["centerness"] = seen.outputs.centerness
        found |= {f"cut {cut} {tower} {level}": tensor for cut in needs.cuts
                  for tower, maps in zip(("cls", "box"), seen.outputs.cuts[cut]) for level, tensor in enumerate(maps)}
    found |= {f"module {name}": seen.modules.get(name) for name in needs.modules}
    images = len(seen.images)
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or not tensor.dim() or len(tensor) != images:
            what = tuple(tensor.shape) if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise ConfigError("distill.cache", f"the teacher's {name} has no entry for each image of a batch (it is "
                                               f"{what} for {counted(images, 'image')}), so it cannot be stored: "
                                               "remove distill.cache, or name another module")
    return found


def expected_names(needs: Needs, teacher: Detector) -> set[str]:
    """The names that `named_tensors` gives."""
    names = {f"level {level}" for level in needs.levels} | {f"module {name}" for name in needs.modules}
    if needs.head:
        names |= {"cls", "box"} | ({"centerness"} if teacher.bbox_head.has_centerness else set())
        names |= {f"cut {cut} {tower} {level}" for cut in needs.cuts for tower in ("cls", "box")
                  for level in range(len(teacher.feature_channels))}
    return names


def rebuilt(found: dict[str, Tensor], sizes: list[tuple[int, int]], needs: Needs, teacher: Detector, images: Tensor,
            targets: list[dict]) -> DetectorPass:
    """The pass that `named_tensors` was taken from; what is not needed is None in it. KeyError if a name is missing."""
    features = [found[f"level {level}"] if level in needs.levels else None
                for level in range(len(teacher.feature_channels))]
    outputs = None
    if needs.head:
        cuts = {cut: tuple([found[f"cut {cut} {tower} {level}"] for level in range(len(sizes))]
                           for tower in ("cls", "box")) for cut in needs.cuts}
        centerness = found["centerness"] if teacher.bbox_head.has_centerness else None
        outputs = HeadOutputs(found["cls"], found["box"], centerness, list(sizes), cuts)
    return DetectorPass(teacher, images, targets, features, outputs, None,
                        {name: found[f"module {name}"] for name in needs.modules})
