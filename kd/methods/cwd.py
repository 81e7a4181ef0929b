"""CWD: channel-wise knowledge distillation (Shu et al., arXiv:2011.13256)."""
from typing import Literal

from torch import Tensor

from data.ranges import NonNegative, Number, Positive, Some
from losses import channel_wise_divergence
from models import Detector, DetectorPass

from .base import Method, check_same_predictions, link


class CWD(Method):
    """Each channel of a map, as a distribution over positions, mimics the teacher's.

    Args:
        tau: temperature of the distributions (eq. 3).
        loss_weight: weight of the divergence (eq. 4), summed over maps.
        on: "features" compares feature maps, "logits" the class scores of each level.
        levels, student_modules, teacher_modules, adapter_kernel: the maps, see `FeaturePairs`.
    """

    def __init__(self, student: Detector, teacher: Detector, tau: Positive = 1.0, loss_weight: NonNegative = 5.0,
                 on: Literal["features", "logits"] = "features", levels: Some[Number] | None = None,
                 student_modules: Some[str] | None = None, teacher_modules: Some[str] | None = None,
                 adapter_kernel: Literal[1, 3] = 1):
        super().__init__()
        self.tau, self.loss_weight, self.teacher_head = tau, loss_weight, on == "logits"
        if self.teacher_head:
            self.teacher_levels = ()
            if levels is not None or student_modules is not None:
                raise ValueError("CWD on logits compares all levels: remove levels and student_modules")
            check_same_predictions(student.bbox_head, teacher.bbox_head, "CWD on logits", boxes=False)
        else:
            self.pair_features(student, teacher, levels, student_modules, teacher_modules, adapter_kernel)

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        if self.teacher_head:
            pairs = list(zip(student.outputs.cls_maps(), teacher.outputs.cls_maps()))
        else:
            pairs = self.pairs(student, teacher)
        losses = [channel_wise_divergence(own, other, self.tau) for own, other in pairs]
        return {"loss_cwd": self.loss_weight * sum(losses)}

    def links(self, student: DetectorPass, teacher: DetectorPass) -> list[str]:
        if not self.teacher_head:
            return super().links(student, teacher)
        maps = zip(student.outputs.cls_maps(), teacher.outputs.cls_maps())
        return [link(f"class scores of level {i}", own, f"class scores of level {i}", other)
                for i, (own, other) in enumerate(maps)]
