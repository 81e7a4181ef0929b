"""LD: localization distillation for dense object detection (Zheng et al., arXiv:2102.12252)."""
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from data.ranges import NonNegative, Share, Temperature
from losses import LOSSES, KnowledgeDistillationKLDivLoss, at_least_float32, mean_over_processes
from models import Detector, DetectorPass, GFLHead
from models.assigners import pairwise_overlap
from models.build import ConfigError, OneOf, build_loss
from models.targets import pad_targets

from .base import Method, check_same_predictions, compared_scores, known_anchors, level_sums, link, to_anchors

DISTRIBUTIONS = ("distributions of both sides",)
ClassLoss = Annotated[dict, OneOf(LOSSES, takes=DISTRIBUTIONS)] | None


class LD(Method):
    """The distribution of each box side mimics the teacher's on positive anchors, softened by a temperature (eq. 4).

    Each anchor is weighted by the student's highest class score, as in the head's own box loss.

    Args:
        loss_weight, T, class_reduction: of the KL divergence, see `losses.kd_kl_div_loss`.
        vlr_weight: weight of the same divergence in the valuable localisation region, see `valuable_region`; 0 omits
            it. Anchors are weighted by their IoU with the box, divided by 16, as in the authors' code.
        vlr_gamma: lower bound of that region, as a share of the positives' threshold (algorithm 1).
        vlr_overlap: iof chooses that region by the intersection over the anchor's area, as the authors' code does; iou
            by the intersection over the union, as in the paper (algorithm 1).
        loss_kd: loss on the class scores of positive anchors (the paper's main KD), see `class_loss`; none by default.
            The authors' is `{type: KnowledgeDistillationKLDivLoss, loss_weight: 10, T: 2}`.
        loss_kd_vlr: the same in the valuable localisation region (the paper's VLR KD); none by default.
    """

    teacher_head = True
    some_classes = True
    needs = ("boxes", "same heads", "same classes")
    teacher_levels = ()

    def __init__(self, student: Detector, teacher: Detector, loss_weight: NonNegative = 0.25, T: Temperature = 10.0,
                 class_reduction: Literal["mean", "sum"] = "mean", vlr_weight: NonNegative = 0.0,
                 vlr_gamma: Share = 0.25, vlr_overlap: Literal["iof", "iou"] = "iof", loss_kd: ClassLoss = None,
                 loss_kd_vlr: ClassLoss = None):
        super().__init__()
        check_same_predictions(student.bbox_head, teacher.bbox_head, "LD")
        if not isinstance(student.bbox_head, GFLHead):
            raise ConfigError("", f"LD distils distributions over distances, and {type(student.bbox_head).__name__} "
                                  "predicts none: use it with GFLHead, or use CrossKD")
        self.vlr_gamma, self.vlr_overlap = vlr_gamma, vlr_overlap
        self.main = KnowledgeDistillationKLDivLoss(class_reduction, T, loss_weight)
        self.vlr = KnowledgeDistillationKLDivLoss(class_reduction, T, vlr_weight) if vlr_weight else None
        known = teacher.bbox_head.known
        classes = student.bbox_head.num_classes if known is None else len(known.numbers)
        for name, cfg in (("loss_kd", loss_kd), ("loss_kd_vlr", loss_kd_vlr)):
            if cfg is not None and classes < 2:
                what = "there is only one" if known is None else "the teacher knows only one"
                raise ConfigError(name, f"compares classes with one another, and {what}: remove this loss")
            setattr(self, name, None if cfg is None else build_loss(cfg, name, DISTRIBUTIONS))

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        assignment, head = student.assignment, student.head
        own = head.comparable_boxes(student.outputs, assignment.priors)
        other = head.comparable_boxes(teacher.outputs, assignment.priors)
        weight = at_least_float32(student.outputs.cls).detach().sigmoid().amax(-1) * assignment.positive
        weight = known_anchors(weight, assignment.labels, teacher.head)
        losses = {"loss_ld": self.main(own, other, weight.unsqueeze(-1), avg_factor=4.0)}
        if self.loss_kd is not None:
            losses["loss_kd"] = self.class_loss(self.loss_kd, student, teacher, assignment.positive)
        if self.vlr is None and self.loss_kd_vlr is None:
            return losses
        region = self.valuable_region(student, teacher)
        if self.vlr is not None:
            losses["loss_ld_vlr"] = self.vlr(own, other, region.unsqueeze(-1), avg_factor=16.0)
        if self.loss_kd_vlr is not None:
            losses["loss_kd_vlr"] = self.class_loss(self.loss_kd_vlr, student, teacher, (region > 0).to(region.dtype))
        return losses

    @staticmethod
    def class_loss(loss: nn.Module, student: DetectorPass, teacher: DetectorPass, chosen: Tensor) -> Tensor:
        """Loss between softmaxes over the classes: the mean over the chosen anchors of each level, summed over levels.

        If the teacher knows only some classes, the softmaxes are over these, and anchors of other classes have no loss.

        Args:
            chosen: (N, P), 1 for the anchors that count and 0 for the others.
        """
        sizes = student.assignment.priors.level_sizes
        number = mean_over_processes(level_sums(chosen, sizes), least=1)
        weight = chosen * student.assignment.label_weights / to_anchors(number, sizes)
        weight = known_anchors(weight, student.assignment.labels, teacher.head)
        return loss(*compared_scores(student, teacher), weight, reduction="sum")

    @torch.no_grad()
    def valuable_region(self, student: DetectorPass, teacher: DetectorPass | None = None) -> Tensor:
        """IoU (N, P) of almost positive anchors with their box; zero for all other anchors (algorithm 1).

        Their DIoU with the box is below the threshold for positives, but at least `vlr_gamma` times this threshold. The
        paper's DIoU is the IoU minus `center_distance`. The authors' code, from which the published figures come,
        divides the intersection by the area of the anchor there. So a small anchor inside a box has 1 instead of a
        small IoU. The threshold and the returned values are IoUs in both. Boxes of classes that the teacher does not
        know have no such region.
        """
        priors = student.assignment.priors
        truth = pad_targets(student.targets, priors.boxes.dtype, priors.boxes.device)
        valid = student.assignment.label_weights != 0
        threshold = student.head.assigner.positive_threshold(priors, valid, truth.boxes).unsqueeze(-1)
        iou = pairwise_overlap(truth.boxes, priors.boxes)  # (N, G, P)
        overlap = iou
        if self.vlr_overlap == "iof":
            overlap = pairwise_overlap(priors.boxes, truth.boxes, "iof").transpose(-1, -2)
        diou = overlap - center_distance(truth.boxes, priors.boxes)
        near = (diou < threshold) & (diou >= self.vlr_gamma * threshold)
        real = truth.real if teacher is None else known_anchors(truth.real, truth.labels, teacher.head)
        return (iou * (near & real.unsqueeze(-1) & valid.unsqueeze(1))).amax(1)

    def links(self, student: DetectorPass, teacher: DetectorPass) -> list[str]:
        lines = [link("box distributions of positives", student.outputs.box, "box distributions", teacher.outputs.box)]
        for loss, where in ((self.loss_kd, "positives"), (self.loss_kd_vlr, "the valuable localisation region")):
            if loss is not None:
                lines.append(link(f"class scores of {where}", student.outputs.cls, "class scores", teacher.outputs.cls))
        return lines


def center_distance(boxes: Tensor, others: Tensor) -> Tensor:
    """DIoU penalty (..., G, P): squared distance of centres / squared enclosing diagonal (arXiv:1911.08287, eq. 6)."""
    a, b = boxes.unsqueeze(-2), others.unsqueeze(-3)
    low, high = torch.min(a[..., :2], b[..., :2]), torch.max(a[..., 2:], b[..., 2:])
    distance = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]).square().sum(-1) / 4
    return distance / (high - low).square().sum(-1).clamp(min=1e-6)
