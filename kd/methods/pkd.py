"""PKD: distillation via the Pearson correlation coefficient (Cao et al., arXiv:2207.02039)."""
from typing import Literal

from torch import Tensor

from data.ranges import NonNegative, Number, Some
from losses import PKDLoss
from models import Detector, DetectorPass

from .base import Method


class PKD(Method):
    """Maps are compared after each channel is normalised by its mean and deviation over the batch.

    Args:
        loss_weight: weight of the loss, summed over maps.
        sync_stats: take means and deviations over the batches of all processes; the original uses each process's.
        levels, student_modules, teacher_modules, adapter_kernel: see `FeaturePairs`.
    """

    needs_labels = False
    needs = ("features",)

    def __init__(self, student: Detector, teacher: Detector, loss_weight: NonNegative = 1.0,
                 levels: Some[Number] | None = None, student_modules: Some[str] | None = None,
                 teacher_modules: Some[str] | None = None, adapter_kernel: Literal[1, 3] = 1, sync_stats: bool = False):
        super().__init__()
        self.pair_features(student, teacher, levels, student_modules, teacher_modules, adapter_kernel)
        self.loss = PKDLoss(loss_weight, sync_stats)

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        return {"loss_feat_kd": sum(self.loss(own, other) for own, other in self.pairs(student, teacher))}
