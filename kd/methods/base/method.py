"""What a distillation method is."""
from torch import Tensor, nn

from models import Detector, DetectorPass

from .features import FeaturePairs


class Method(nn.Module):
    """Base of the methods: a module whose forward turns a student's and a teacher's pass into losses.

    A method is built as `Method(student, teacher, **arguments)` from the two detectors, to look at their shapes and to
    refuse a pair that makes no sense; it must not keep them. Its own parameters are trained with the student and stay
    out of the student's checkpoint. What it wants of the passes it says in these attributes:
    """

    student_cuts: tuple[int, ...] = ()     # tower layers whose features the student's pass keeps
    teacher_cuts: tuple[int, ...] = ()
    student_modules: tuple[str, ...] = ()  # modules whose outputs the student's pass keeps, by name
    teacher_modules: tuple[str, ...] = ()
    teacher_head: bool = False             # whether the teacher's own predictions are needed
    pairs: FeaturePairs                    # of methods that compare maps, see `pair_features`

    def pair_features(self, student: Detector, teacher: Detector, *choice: object) -> None:
        """Compare the maps that `FeaturePairs(student, teacher, *choice)` picks."""
        self.pairs = FeaturePairs(student, teacher, *choice)
        self.student_modules, self.teacher_modules = self.pairs.student_modules, self.pairs.teacher_modules

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        """Scalar losses under the references' names."""
        raise NotImplementedError

    def weights(self) -> dict[str, float]:
        """The weights that its losses carry already, by name: by default each part's `loss_weight`."""
        return {name or "loss_weight": module.loss_weight for name, module in self.named_modules()
                if hasattr(module, "loss_weight")}

    def links(self, student: DetectorPass, teacher: DetectorPass) -> list[str]:
        """What is compared with what, a line each, for people to read before a long run."""
        if hasattr(self, "pairs"):
            return [link(own, own_map, other, other_map) for (own, other), (own_map, other_map)
                    in zip(self.pairs.places(), self.pairs.maps(student, teacher))]
        if self.teacher_head:
            return [link("class scores", student.outputs.cls, "class scores", teacher.outputs.cls),
                    link("boxes", student.outputs.box, "boxes", teacher.outputs.box)]
        return [link(f"neck output {i}", own, f"neck output {i}", other)
                for i, (own, other) in enumerate(zip(student.features, teacher.features))]


def link(name: str, own: Tensor, teacher_name: str, other: Tensor) -> str:
    """A line of `Method.links`."""
    return f"student {name} {tuple(own.shape)} <- teacher {teacher_name} {tuple(other.shape)}"
