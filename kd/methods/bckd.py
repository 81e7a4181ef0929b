"""BCKD: class scores as binary maps, and boxes compared by their IoU (Yang et al., arXiv:2308.14286)."""
from typing import Annotated

import torch
from torch import Tensor

from losses import LOSSES, at_least_float32
from models import Detector, DetectorPass
from models.build import OneOf, build_loss

from .base import (
    Method,
    check_same_predictions,
    compared_scores,
    known_anchors,
    levels_with_positives,
    to_anchors,
)

SCORES, BOXES = ("logits of both sides",), ("boxes",)


class BCKD(Method):
    """Each class logit is a binary classification that mimics the teacher's; decoded boxes mimic the teacher's by IoU.

    The class loss is the binary cross-entropy between the two scores, times their difference (the paper's binary
    classification distillation loss). The box loss is the GIoU loss between the two boxes, times the largest difference
    among the anchor's class scores (IoU-based localization distillation loss); no gradient flows through this factor.
    Both losses cover all anchors that the assignment does not ignore. Their sums are divided by the number of
    positives.

    Args:
        loss_kd: loss on class scores. The original's NovelKDLoss is KDQualityFocalLoss with beta 1.
        loss_score_kd: loss on boxes.
        only_levels_with_positives: leave out levels without a positive anchor in the batch of this process, as the
            authors' code does; the paper sums over all levels.
    """

    teacher_head = True
    some_classes = True
    needs_labels = False
    needs = ("scores", "boxes", "same heads", "same classes")

    def __init__(self, student: Detector, teacher: Detector,
                 loss_kd: Annotated[dict, OneOf(LOSSES, takes=SCORES)] = {
                     "type": "KDQualityFocalLoss", "beta": 1.0, "loss_weight": 1.0},
                 loss_score_kd: Annotated[dict, OneOf(LOSSES, takes=BOXES)] = {"type": "GIoULoss", "loss_weight": 4.0},
                 only_levels_with_positives: bool = False):
        super().__init__()
        check_same_predictions(student.bbox_head, teacher.bbox_head, "BCKD", boxes=False)
        self.loss_kd = build_loss(loss_kd, "loss_kd", SCORES)
        self.loss_score_kd = build_loss(loss_score_kd, "loss_score_kd", BOXES)
        self.only_levels_with_positives = only_levels_with_positives

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        assignment = student.assignment
        weight = assignment.label_weights
        if self.only_levels_with_positives:
            weight = weight * to_anchors(levels_with_positives(assignment), assignment.priors.level_sizes)
        own, other = (seen.head.boxes(seen.outputs, seen.head.priors(seen.outputs)) for seen in (student, teacher))
        own_scores, other_scores = compared_scores(student, teacher)
        box_weight = known_anchors(weight, assignment.labels, teacher.head) * score_difference(own_scores, other_scores)
        return {"loss_cls_kd": self.loss_kd(own_scores, other_scores, weight, avg_factor=assignment.avg_factor),
                "loss_reg_kd": self.loss_score_kd(own, other, box_weight, avg_factor=assignment.avg_factor)}


@torch.no_grad()
def score_difference(own: Tensor, other: Tensor) -> Tensor:
    """Largest difference (N, P) among the class scores of two predictions, from their logits (N, P, C)."""
    difference = at_least_float32(other).sigmoid()
    return difference.sub_(at_least_float32(own).sigmoid()).abs_().amax(-1)  # in place: RetinaNet has many scores
