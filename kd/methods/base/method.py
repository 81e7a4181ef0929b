"""The base class of distillation methods."""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from models import Detector, DetectorPass, HeadOutputs

from .features import FeaturePairs
from .predictions import compared_scores

Need = Literal["features", "scores", "boxes", "same heads", "same classes"]


@dataclass
class HeatMap:
    """A map to be drawn over an image."""

    caption: str
    values: Tensor  # (H, W), covers the padded image


@dataclass
class BarChart:
    """A row of bars to be drawn."""

    caption: str
    values: Tensor             # (C,)
    line: float | None = None  # a value at which a line is drawn


class Method(nn.Module):
    """Base of the methods: a module whose forward computes losses from a student's and a teacher's pass.

    A method is built as `Method(student, teacher, **arguments)` from the two detectors. It may read their shapes and
    refuse a pair that makes no sense, but it must not keep them. Its own parameters are trained with the student and
    stay out of the student's checkpoint. These attributes say what it needs from the passes:
    """

    student_cuts: tuple[int, ...] = ()     # tower layers whose features the student's pass keeps
    teacher_cuts: tuple[int, ...] = ()
    student_modules: tuple[str, ...] = ()  # names of modules whose outputs the student's pass keeps
    teacher_modules: tuple[str, ...] = ()
    teacher_levels: tuple[int, ...] | None = None  # the teacher's neck outputs that it reads; None: any of them
    teacher_head: bool = False             # whether it needs the teacher's own predictions
    crosses_heads: bool = False            # whether it has `cross_head`
    some_classes: bool = False             # whether it leaves out the classes that a teacher's head does not know
    needs_labels: bool = True              # False: it gets images without labels, too, see `docs/new_method.md`
    needs: tuple[Need, ...] = ()           # what else it needs, for the table of all methods; (): it does not say
    needs_with: Mapping[str, tuple[Need, ...]] = {}  # the same with another setting, such as "on: logits"
    pairs: FeaturePairs                    # only in methods that compare maps, see `pair_features`

    @classmethod
    def compares_predictions(cls, arguments: Mapping[str, object]) -> bool:
        """Whether the method needs a teacher with a head, if it is built with these arguments."""
        return cls.teacher_head

    def pair_features(self, student: Detector, teacher: Detector, *choice: object) -> None:
        """Compare the maps that `FeaturePairs(student, teacher, *choice)` picks."""
        self.pairs = FeaturePairs(student, teacher, *choice)
        self.student_modules, self.teacher_modules = self.pairs.student_modules, self.pairs.teacher_modules
        self.teacher_levels = self.pairs.teacher_levels

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        """Scalar losses under the references' names."""
        raise NotImplementedError

    def weights(self) -> dict[str, float]:
        """The weights that are part of its losses, by name; by default every `loss_weight` in the method."""
        return {name or "loss_weight": module.loss_weight for name, module in self.named_modules()
                if hasattr(module, "loss_weight")}

    def links(self, student: DetectorPass, teacher: DetectorPass) -> list[str]:
        """Lines that say what is compared with what, for people to read before a long run."""
        if hasattr(self, "pairs"):
            return [link(own, own_map, other, other_map) for (own, other), (own_map, other_map)
                    in zip(self.pairs.places(), self.pairs.maps(student, teacher))]
        if self.teacher_head:
            own, other = compared_scores(student, teacher)
            return [link("class scores", own, "class scores", other),
                    link("boxes", student.outputs.box, "boxes", teacher.outputs.box)]
        return [link(f"neck output {i}", own, f"neck output {i}", other)
                for i, (own, other) in enumerate(zip(student.features, teacher.features))]

    def cross_head(self, student: DetectorPass, teacher: DetectorPass) -> HeadOutputs:
        """Predictions of the teacher's head from the student's features, where `crosses_heads`."""
        raise NotImplementedError

    def charts(self, student: DetectorPass, teacher: DetectorPass, trained: bool
               ) -> dict[str, list[list[HeatMap | BarChart]]]:
        """Pictures of what the method does on the first image of a batch, by name: columns of charts.

        Args:
            trained: whether the method has the weights from its training.
        """
        return {}


def link(name: str, own: Tensor, teacher_name: str, other: Tensor) -> str:
    """A line of `Method.links`."""
    return f"student {name} {tuple(own.shape)} <- teacher {teacher_name} {tuple(other.shape)}"
