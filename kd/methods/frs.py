"""FRS: feature-richness score (Du et al., arXiv:2111.00674)."""
from typing import Literal

import torch
from torch import Tensor, nn

from data.ranges import NonNegative, Number, Some
from losses import at_least_float32, kd_quality_focal_loss, mean_over_processes
from models import Detector, DetectorPass
from models.build import ConfigError

from .base import HeatMap, Method, check_same_predictions, compared_scores, link, split_levels

# The authors' weights of the two losses for the student's head. They did not use ATSS; it has FCOS's.
WEIGHTS = {"RetinaHead": (0.005, 0.02), "GFLHead": (0.1, 0.05), "FCOSHead": (0.01, 0.05), "ATSSHead": (0.01, 0.05)}


class FRS(Method):
    """Features and class scores mimic the teacher's, each cell weighted by the teacher's highest class score there.

    With the teacher's highest score M (N, H, W) over classes and anchors of a level, student and teacher features s and
    t, and their class scores p and q, the losses are sums over levels of
        feat:  sum(M (conv(s) - t)^2) / sum(M)
        cls:   sum(M BCE(p, q)) / sum(M)
    BCE is the binary cross-entropy of each class. sum(M) is averaged over processes. As in the authors' code, a trained
    convolution adapts the features of every level, also between maps of equal width. If the teacher knows only some
    classes, both losses are about these.

    Args:
        distill_feat_weight: weight of the loss on features. Default, by the student's head: 0.005 for RetinaNet, 0.1
            for GFL, 0.01 for FCOS and ATSS. The authors did not use ATSS.
        distill_cls_weight: weight of the loss on class scores. Default: 0.02 for RetinaNet and 0.05 for other heads. A
            weight of 0 omits its part; without this one, the two heads may be of any kinds.
        levels: neck outputs whose features are compared, by number; all by default. Scores are compared on all levels.
        adapter_kernel: kernel size of the convolutions.
    """

    teacher_head = True
    some_classes = True
    needs_labels = False
    needs = ("features", "scores", "same heads", "same classes")
    needs_with = {"distill_cls_weight: 0": ("features", "scores")}

    def __init__(self, student: Detector, teacher: Detector, distill_feat_weight: NonNegative | None = None,
                 distill_cls_weight: NonNegative | None = None, levels: Some[Number] | None = None,
                 adapter_kernel: Literal[1, 3] = 3):
        super().__init__()
        feat, cls = WEIGHTS.get(type(student.bbox_head).__name__, WEIGHTS["FCOSHead"])
        self.feat_weight = feat if distill_feat_weight is None else distill_feat_weight
        self.cls_weight = cls if distill_cls_weight is None else distill_cls_weight
        if not self.feat_weight and not self.cls_weight:
            raise ConfigError("", "FRS has no loss: distill_feat_weight and distill_cls_weight are both 0")
        if self.cls_weight:
            check_same_predictions(student.bbox_head, teacher.bbox_head, "FRS with distill_cls_weight above 0", False)
        if self.feat_weight:
            self.pair_features(student, teacher, levels, None, None, None)
            widths = zip(self.pairs.student_channels, self.pairs.teacher_channels)
            self.align = nn.ModuleList(nn.Conv2d(own, other, adapter_kernel, padding=adapter_kernel // 2)
                                       for own, other in widths)
        elif levels is not None:
            raise ConfigError("levels", "says which features are compared, and distill_feat_weight 0 omits them")

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        masks, losses = richness(teacher), {}
        tiny = torch.finfo(masks[0].dtype).tiny
        totals = mean_over_processes(torch.stack([mask.sum() for mask in masks]), least=tiny)
        masks = [mask / total for mask, total in zip(masks, totals)]
        if self.feat_weight:
            maps = zip(self.align, self.pairs.maps(student, teacher), self.pairs.teacher_levels)
            errors = [(at_least_float32(align(own)) - at_least_float32(other)).square().sum(1) * masks[level]
                      for align, (own, other), level in maps]
            losses["loss_frs_feat"] = self.feat_weight * sum(error.sum() for error in errors)
        if self.cls_weight:
            anchors = student.head.prior_generator.num_anchors
            weight = torch.cat([mask.flatten(1) for mask in masks], 1).repeat_interleave(anchors, 1)  # (N, P)
            losses["loss_frs_cls"] = self.cls_weight * kd_quality_focal_loss(
                *compared_scores(student, teacher), weight, beta=0, avg_factor=1.0)
        return losses

    def weights(self) -> dict[str, float]:
        return {"distill_feat_weight": self.feat_weight, "distill_cls_weight": self.cls_weight}

    def links(self, student: DetectorPass, teacher: DetectorPass) -> list[str]:
        lines = super().links(student, teacher) if self.feat_weight else []
        if self.cls_weight:
            own, other = compared_scores(student, teacher)
            lines.append(link("class scores", own, "class scores", other))
        return lines

    def charts(self, student: DetectorPass, teacher: DetectorPass, trained: bool) -> dict[str, list[list[HeatMap]]]:
        """The teacher's highest score in each cell; a column for each level."""
        return {"richness": [[HeatMap(f"level {i}: score up to {float(mask[0].max()):.2f}", mask[0])]
                             for i, mask in enumerate(richness(teacher))]}


def richness(teacher: DetectorPass) -> list[Tensor]:
    """The highest class score of the anchors of each cell, as a map (N, H, W) for each level."""
    best = at_least_float32(teacher.outputs.cls).amax(-1).sigmoid()
    return split_levels(best.unflatten(1, (-1, teacher.head.prior_generator.num_anchors)).amax(-1), teacher.outputs)
