"""Feature mimicking: the hints of FitNets (Romero et al., arXiv:1412.6550)."""
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from data.ranges import NonNegative, Number, Some
from losses import at_least_float32
from models import Detector, DetectorPass

from .base import Method


class FitNet(Method):
    """Maps mimic the teacher's: half the squared distance between them (eq. 3), averaged over all entries.

    Args:
        loss_weight: weight of the loss, summed over maps.
        levels, student_modules, teacher_modules, adapter_kernel: see `FeaturePairs`.
    """

    needs_labels = False
    needs = ("features",)

    def __init__(self, student: Detector, teacher: Detector, loss_weight: NonNegative = 1.0,
                 levels: Some[Number] | None = None, student_modules: Some[str] | None = None,
                 teacher_modules: Some[str] | None = None, adapter_kernel: Literal[1, 3] = 1):
        super().__init__()
        self.pair_features(student, teacher, levels, student_modules, teacher_modules, adapter_kernel)
        self.loss_weight = loss_weight

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        errors = [F.mse_loss(at_least_float32(own), at_least_float32(other)) / 2
                  for own, other in self.pairs(student, teacher)]
        return {"loss_fitnet": self.loss_weight * sum(errors)}
