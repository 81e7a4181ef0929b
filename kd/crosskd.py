"""CrossKD: cross-head knowledge distillation (Wang et al., arXiv:2306.11369)."""
from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

from losses import LOSSES, at_least_float32
from models import DenseHead, Detector, DetectorPass, HeadOutputs
from models.build import ConfigError, OneOf, build

from .method import Method


class CrossKD(Method):
    """The student's tower features go on through the teacher's head, and what comes out mimics the teacher.

    Args:
        reused_teacher_head_idx: convolutions of each tower that are the student's; the rest are the teacher's.
        loss_cls_kd, loss_reg_kd, loss_center_kd: losses on class scores, boxes and, where the head has it,
            centerness; by default the published ones of the head, which for FCOS have none on centerness.
    """

    teacher_head = True

    def __init__(self, student: Detector, teacher: Detector, reused_teacher_head_idx: int = 3,
                 loss_cls_kd: Annotated[dict, OneOf(LOSSES)] | None = None,
                 loss_reg_kd: Annotated[dict, OneOf(LOSSES)] | None = None,
                 loss_center_kd: Annotated[dict, OneOf(LOSSES)] | None = None):
        super().__init__()
        cut = reused_teacher_head_idx
        check_same_predictions(student.bbox_head, teacher.bbox_head, "CrossKD")
        for name, head in (("student", student.bbox_head), ("teacher", teacher.bbox_head)):
            if not 0 <= cut <= head.stacked_convs:
                raise ConfigError("reused_teacher_head_idx", f"is {cut}, and the {name}'s head has layers "
                                                             f"0..{head.stacked_convs}")
        widths = [head.tower_channels if cut else head.in_channels for head in (student.bbox_head, teacher.bbox_head)]
        if widths[0] != widths[1]:
            raise ConfigError("reused_teacher_head_idx", f"at layer {cut} the student has {widths[0]} channels and the "
                                                         f"teacher {widths[1]}: give both heads one width")
        self.student_cuts = self.teacher_cuts = (cut,)
        self.cut = cut
        self.losses = build_mimic_losses(teacher.bbox_head, loss_cls_kd, loss_reg_kd, loss_center_kd)

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        student_feats, teacher_feats = student.outputs.cuts[self.cut], teacher.outputs.cuts[self.cut]
        cls_feats, reg_feats = ([align_scale(s, t) for s, t in zip(*towers)]
                                for towers in zip(student_feats, teacher_feats))
        reused = teacher.head.run_from(self.cut, cls_feats, reg_feats)
        return mimic(reused, student, teacher, self.losses)


def align_scale(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> Tensor:
    """The student's map (N, C, H, W) with each channel's mean and deviation over the batch as in the teacher's."""
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    dims = (0, 2, 3)
    std, mean = torch.std_mean(student, dims, keepdim=True)
    teacher_std, teacher_mean = torch.std_mean(teacher, dims, keepdim=True)
    return (student - mean) / (std + eps) * teacher_std + teacher_mean


def build_mimic_losses(head: DenseHead, loss_cls_kd: dict | None, loss_reg_kd: dict | None,
                       loss_center_kd: dict | None) -> torch.nn.ModuleDict:
    """The losses of `mimic` by name: those said, otherwise the head's published ones."""
    said = {"loss_cls_kd": loss_cls_kd, "loss_reg_kd": loss_reg_kd, "loss_center_kd": loss_center_kd}
    chosen = head.kd_defaults | {name: cfg for name, cfg in said.items() if cfg is not None}
    if "loss_center_kd" in chosen and not hasattr(head, "loss_centerness"):
        raise ConfigError("loss_center_kd", f"{type(head).__name__} predicts no centerness")
    return torch.nn.ModuleDict({name: build(cfg, LOSSES, name) for name, cfg in chosen.items()})


def mimic(outputs: HeadOutputs, student: DetectorPass, teacher: DetectorPass,
          losses: Mapping[str, torch.nn.Module]) -> dict[str, Tensor]:
    """Losses that pull predictions towards the teacher's (section 3.3).

    Classes count wherever the student's assignment has not ignored the anchor; boxes count there as much as the
    teacher believes in an object; centerness counts on positives.
    """
    assignment, head = student.assignment, teacher.head
    target = teacher.outputs
    weight = at_least_float32(target.cls).amax(-1).sigmoid() * (assignment.label_weights != 0)
    found = {
        "loss_cls_kd": losses["loss_cls_kd"](outputs.cls, target.cls, assignment.label_weights,
                                             avg_factor=head.kd_normalizer(assignment)),
        "loss_reg_kd": head.compare(head.box_space(outputs, assignment.priors),
                                    head.box_space(target, assignment.priors), weight, assignment,
                                    losses["loss_reg_kd"])}
    if "loss_center_kd" in losses:
        found["loss_center_kd"] = losses["loss_center_kd"](
            outputs.centerness, target.centerness.detach().sigmoid(), assignment.positive,
            avg_factor=assignment.avg_factor)
    return found


def check_same_predictions(student: torch.nn.Module, teacher: torch.nn.Module, method: str) -> None:
    """Refuse two heads whose outputs do not mean the same.

    Raises:
        ConfigError: saying what differs.
    """
    pairs = {"kind of head": (type(student).__name__, type(teacher).__name__),
             "number of classes": (student.num_classes, teacher.num_classes),
             "outputs per box": (student.box_channels, teacher.box_channels),
             "anchor strides": (student.prior_generator.strides, teacher.prior_generator.strides),
             "anchors": (student.prior_generator.num_anchors, teacher.prior_generator.num_anchors)}
    for what, (own, other) in pairs.items():
        if own != other:
            raise ConfigError("", f"{method} compares predictions one by one, and the {what} of student and teacher "
                                  f"differ: {own} and {other}")
