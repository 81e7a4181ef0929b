"""CrossKD: cross-head knowledge distillation (Wang et al., arXiv:2306.11369)."""
from typing import Literal

from torch import Tensor, nn

from data.errors import counted
from data.ranges import Number
from losses import rescaled_channels
from models import DenseHead, Detector, DetectorPass, HeadOutputs
from models.build import ConfigError

from .base import (
    BoxLoss,
    CenternessLoss,
    Method,
    ScoreLoss,
    adapter,
    build_mimic_losses,
    check_same_grid,
    known_scores,
    link,
    mimic,
)


class CrossKD(Method):
    """The student's tower features pass through the rest of the teacher's head; its predictions mimic the teacher's.

    Both predictions are made by the teacher's head, so the heads can be of different kinds, also with another number of
    anchors per cell. `mimic` says how the student's assignment weights the teacher's predictions.

    Args:
        reused_teacher_head_idx: number of convolutions of each tower that the student runs; the teacher runs the rest.
        loss_cls_kd, loss_reg_kd, loss_center_kd: losses on class scores, boxes and, where the head has it,
            centerness; by default those published for the head, which for FCOS have none on centerness.
        adapter_kernel: kernel size of the convolution that is added where student and teacher differ in channels.
        sync_stats: align features by means and deviations over the batches of all processes; the original uses those
            of each process.
    """

    teacher_head = True
    some_classes = True
    teacher_levels = ()
    crosses_heads = True
    needs_labels = False
    needs = ("scores", "boxes", "same classes")

    def __init__(self, student: Detector, teacher: Detector, reused_teacher_head_idx: Number = 3,
                 loss_cls_kd: ScoreLoss = None, loss_reg_kd: BoxLoss = None, loss_center_kd: CenternessLoss = None,
                 adapter_kernel: Literal[1, 3] = 1, sync_stats: bool = False):
        super().__init__()
        cut = reused_teacher_head_idx
        check_same_grid(student.bbox_head, teacher.bbox_head, "CrossKD")
        for name, head in (("student", student.bbox_head), ("teacher", teacher.bbox_head)):
            if cut > head.stacked_convs:
                raise ConfigError("reused_teacher_head_idx", f"must be from 0 to {head.stacked_convs}, the number of "
                                                             f"convolutions in the {name}'s towers, not {cut}")
        widths = [head.tower_channels if cut else head.in_channels for head in (student.bbox_head, teacher.bbox_head)]
        self.adapters = nn.ModuleList(adapter(*widths, adapter_kernel) for _ in ("cls", "reg"))
        self.student_cuts = self.teacher_cuts = (cut,)
        self.cut, self.sync_stats = cut, sync_stats
        self.losses = build_mimic_losses(teacher.bbox_head, teacher.bbox_head.has_centerness, loss_cls_kd, loss_reg_kd,
                                         loss_center_kd)

    def cross_head(self, student: DetectorPass, teacher: DetectorPass) -> HeadOutputs:
        """Predictions of the teacher's head from the student's tower features."""
        towers = zip(self.adapters, student.outputs.cuts[self.cut])
        own = [adapt(x) for adapt, maps in towers for x in maps]
        aligned = rescaled_channels(own, [x for maps in teacher.outputs.cuts[self.cut] for x in maps],
                                    sync=self.sync_stats)
        levels = len(own) // 2
        return teacher.run_head(self.cut, aligned[:levels], aligned[levels:])

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        return mimic(self.cross_head(student, teacher), teacher.head, student, teacher, self.losses)

    def links(self, student: DetectorPass, teacher: DetectorPass) -> list[str]:
        features = zip(("classification", "box"), student.outputs.cuts[self.cut], teacher.outputs.cuts[self.cut])
        where = f"tower after {counted(self.cut, 'convolution')}, finest of {counted(len(student.features), 'level')}"
        through, made = f"through the teacher's layers {self.cut + 1}.. of its head", teacher.outputs
        scores = known_scores(made.cls, teacher.head)
        # The predictions from the student's features have the shapes of the teacher's, whatever the student's head is.
        lines = [link("class scores", scores, "class scores", scores), link("boxes", made.box, "boxes", made.box)]
        return [link(f"{tower} {where}", own[0], f"{tower} tower", other[0]) for tower, own, other in features] + [
            f"{through}: {line}" for line in lines] + kinds(student.head, teacher.head)


def kinds(student: DenseHead, teacher: DenseHead) -> list[str]:
    """Lines that say how two heads differ, if they do."""
    own, other = (head.prior_generator.num_anchors for head in (student, teacher))
    names = [type(head).__name__ for head in (student, teacher)]
    lines = [f"the student has a {names[0]}, the teacher a {names[1]}: both predictions come from the teacher's head"]
    if own != other:
        lines.append(f"{counted(own, 'anchor')} per cell of the student, {other} of the teacher: a cell counts unless "
                     "the student ignores all of its anchors there")
    return lines[names[0] == names[1]:]
