"""Methods that mimic class logits only: plain (KD) and decoupled (DKD)."""
from torch import Tensor

from data.ranges import NonNegative, Positive
from losses import binary_kd_loss, dkd_loss
from models import Detector, DetectorPass
from models.build import ConfigError

from .base import Method, check_same_predictions, compared_scores, known_anchors, link


class KD(Method):
    """Class scores mimic the teacher's, softened by a temperature (Hinton et al., arXiv:1503.02531, section 2).

    Dense heads score every class separately, so each score is a distribution over two outcomes. All anchors count
    except those that the assignment ignores; the sum is divided by the head's own normaliser.

    Args:
        T: temperature.
        loss_weight: weight of the loss.
    """

    teacher_head = True
    some_classes = True
    needs_labels = False
    needs = ("scores", "same heads", "same classes")
    teacher_levels = ()

    def __init__(self, student: Detector, teacher: Detector, T: Positive = 1.0, loss_weight: NonNegative = 1.0):
        super().__init__()
        check_same_predictions(student.bbox_head, teacher.bbox_head, "KD", boxes=False)
        self.T, self.loss_weight = T, loss_weight

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        assignment = student.assignment
        own, other = compared_scores(student, teacher)
        loss = binary_kd_loss(own, other, assignment.label_weights, self.T, avg_factor=assignment.avg_factor)
        return {"loss_kd": self.loss_weight * loss}

    def links(self, student: DetectorPass, teacher: DetectorPass) -> list[str]:
        return super().links(student, teacher)[:1]


class DKD(Method):
    """Decoupled mimicking (Zhao et al., arXiv:2203.08679, eq. 7): true class against the rest, and within the rest.

    It needs a true class, so only positive anchors count. A softmax over the classes turns their logits into scores. If
    the teacher knows only some classes, the softmax is over these, and only anchors of these classes count.

    Args:
        alpha, beta: weights of the true class against the rest, and of the others among themselves.
        T: temperature.
        loss_weight: weight of the loss.
    """

    teacher_head = True
    some_classes = True
    needs = ("scores", "same heads", "same classes")
    teacher_levels = ()

    def __init__(self, student: Detector, teacher: Detector, alpha: NonNegative = 1.0, beta: NonNegative = 8.0,
                 T: Positive = 4.0, loss_weight: NonNegative = 1.0):
        super().__init__()
        check_same_predictions(student.bbox_head, teacher.bbox_head, "DKD", boxes=False)
        known = teacher.bbox_head.known
        if student.bbox_head.num_classes < 2 or (known is not None and len(known.numbers) < 2):
            what = "there is only one" if known is None else "the teacher knows only one"
            raise ConfigError("", f"DKD compares classes with one another, and {what}; use KD")
        self.alpha, self.beta, self.T, self.loss_weight = alpha, beta, T, loss_weight

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        assignment, known = student.assignment, teacher.head.known
        own, other = compared_scores(student, teacher)
        labels = assignment.labels if known is None else known.labels(assignment.labels)
        labels = labels.clamp(min=0, max=own.shape[-1] - 1)  # the weight of the background and of other classes is zero
        weight = known_anchors(assignment.positive, assignment.labels, teacher.head)
        loss = dkd_loss(own, other, labels, weight, self.alpha, self.beta, self.T, avg_factor=assignment.avg_factor)
        return {"loss_dkd": self.loss_weight * loss}

    def links(self, student: DetectorPass, teacher: DetectorPass) -> list[str]:
        own, other = compared_scores(student, teacher)
        return [link("class scores", own, "class scores of positives", other)]
