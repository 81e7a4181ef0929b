"""LD: localization distillation for dense object detection (Zheng et al., arXiv:2102.12252)."""
from torch import Tensor

from losses import KnowledgeDistillationKLDivLoss, at_least_float32
from models import Detector, DetectorPass, GFLHead
from models.build import ConfigError

from .crosskd import check_same_predictions
from .method import Method


class LD(Method):
    """Each side's distribution of positive anchors mimics the teacher's, softened by a temperature (eq. 4).

    An anchor counts as much as the student already believes it to be an object, as in the head's own box loss.

    Args:
        loss_weight, T, class_reduction: of the KL divergence, see `losses.kd_kl_div_loss`.
    """

    teacher_head = True

    def __init__(self, student: Detector, teacher: Detector, loss_weight: float = 0.25, T: float = 10.0,
                 class_reduction: str = "mean"):
        super().__init__()
        check_same_predictions(student.bbox_head, teacher.bbox_head, "LD")
        if not isinstance(student.bbox_head, GFLHead):
            raise ConfigError("", f"LD distils distributions over distances, and {type(student.bbox_head).__name__} "
                                  "predicts none: use it with GFLHead")
        self.loss = KnowledgeDistillationKLDivLoss(class_reduction, T, loss_weight)

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        assignment, head = student.assignment, student.head
        weight = at_least_float32(student.outputs.cls).detach().sigmoid().amax(-1) * assignment.positive
        loss = self.loss(head.box_space(student.outputs, assignment.priors),
                         head.box_space(teacher.outputs, assignment.priors), weight.unsqueeze(-1), avg_factor=4.0)
        return {"loss_ld": loss}
