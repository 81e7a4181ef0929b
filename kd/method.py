"""What a distillation method is."""
from torch import Tensor, nn

from models import DetectorPass


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

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        """Scalar losses under the references' names."""
        raise NotImplementedError
