"""CrossKD: cross-head knowledge distillation (Wang et al., arXiv:2306.11369)."""
from typing import Annotated, Literal

from torch import Tensor, nn

from losses import LOSSES, at_least_float32, channel_statistics
from models import Detector, DetectorPass, HeadOutputs
from models.build import ConfigError, OneOf

from .base import Method, adapter, build_mimic_losses, check_same_predictions, link, mimic


class CrossKD(Method):
    """The student's tower features go on through the teacher's head, and what comes out mimics the teacher.

    Args:
        reused_teacher_head_idx: convolutions of each tower that are the student's; the rest are the teacher's.
        loss_cls_kd, loss_reg_kd, loss_center_kd: losses on class scores, boxes and, where the head has it,
            centerness; by default the published ones of the head, which for FCOS have none on centerness.
        adapter_kernel: size of the convolution to the teacher's width where the widths differ.
        sync_stats: the means and deviations that features are aligned by are of all processes' batches together; the
            original takes each process's own.
    """

    teacher_head = True
    crosses_heads = True

    def __init__(self, student: Detector, teacher: Detector, reused_teacher_head_idx: int = 3,
                 loss_cls_kd: Annotated[dict, OneOf(LOSSES)] | None = None,
                 loss_reg_kd: Annotated[dict, OneOf(LOSSES)] | None = None,
                 loss_center_kd: Annotated[dict, OneOf(LOSSES)] | None = None, adapter_kernel: Literal[1, 3] = 1,
                 sync_stats: bool = False):
        super().__init__()
        cut = reused_teacher_head_idx
        check_same_predictions(student.bbox_head, teacher.bbox_head, "CrossKD")
        for name, head in (("student", student.bbox_head), ("teacher", teacher.bbox_head)):
            if not 0 <= cut <= head.stacked_convs:
                raise ConfigError("reused_teacher_head_idx", f"is {cut}, and the {name}'s head has layers "
                                                             f"0..{head.stacked_convs}")
        widths = [head.tower_channels if cut else head.in_channels for head in (student.bbox_head, teacher.bbox_head)]
        self.adapters = nn.ModuleList(adapter(*widths, adapter_kernel) for _ in ("cls", "reg"))
        self.student_cuts = self.teacher_cuts = (cut,)
        self.cut, self.sync_stats = cut, sync_stats
        self.losses = build_mimic_losses(teacher.bbox_head, teacher.bbox_head.has_centerness, loss_cls_kd, loss_reg_kd,
                                         loss_center_kd)

    def cross_head(self, student: DetectorPass, teacher: DetectorPass) -> HeadOutputs:
        """The teacher's head's predictions from the student's tower features."""
        cls_feats, reg_feats = (
            [align_scale(adapt(own), other, sync_stats=self.sync_stats) for own, other in zip(*towers)]
            for adapt, *towers in zip(self.adapters, student.outputs.cuts[self.cut], teacher.outputs.cuts[self.cut]))
        return teacher.run_head(self.cut, cls_feats, reg_feats)

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        return mimic(self.cross_head(student, teacher), teacher.head, student, teacher, self.losses)

    def links(self, student: DetectorPass, teacher: DetectorPass) -> list[str]:
        features = zip(("classification", "box"), student.outputs.cuts[self.cut], teacher.outputs.cuts[self.cut])
        where = f"tower after {self.cut} convolutions, finest of {len(student.features)} levels"
        through = f"through the teacher's layers {self.cut + 1}.. of its head"
        return [link(f"{tower} {where}", own[0], f"{tower} tower", other[0]) for tower, own, other in features] + [
            f"{through}: {line}" for line in super().links(student, teacher)]


def align_scale(student: Tensor, teacher: Tensor, eps: float = 1e-6, sync_stats: bool = False) -> Tensor:
    """The student's map (N, C, H, W) with each channel's mean and deviation over the batch as in the teacher's."""
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    std, mean = channel_statistics(student, sync_stats)
    teacher_std, teacher_mean = channel_statistics(teacher, sync_stats)
    return (student - mean) / (std + eps) * teacher_std + teacher_mean
