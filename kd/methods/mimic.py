"""Plain prediction mimicking: the student's head against the teacher's, CrossKD's baseline (arXiv:2306.11369, 3.1)."""
from torch import Tensor

from models import Detector, DetectorPass

from .base import BoxLoss, CenternessLoss, Method, ScoreLoss, build_mimic_losses, check_same_predictions, mimic


class Mimic(Method):
    """The student's own predictions mimic the teacher's, with the same losses as in CrossKD.

    Args:
        loss_cls_kd, loss_reg_kd, loss_center_kd: see `CrossKD`.
    """

    teacher_head = True
    some_classes = True
    needs_labels = False
    needs = ("scores", "boxes", "same heads", "same classes")
    teacher_levels = ()

    def __init__(self, student: Detector, teacher: Detector, loss_cls_kd: ScoreLoss = None,
                 loss_reg_kd: BoxLoss = None, loss_center_kd: CenternessLoss = None):
        super().__init__()
        check_same_predictions(student.bbox_head, teacher.bbox_head, "Mimic")
        heads = student.bbox_head, teacher.bbox_head
        centerness = all(head.has_centerness for head in heads) and heads[0].quality == heads[1].quality
        self.losses = build_mimic_losses(heads[1], centerness, loss_cls_kd, loss_reg_kd, loss_center_kd)

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        return mimic(student.outputs, student.head, student, teacher, self.losses)
