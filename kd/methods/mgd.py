"""MGD: masked generative distillation (Yang et al., arXiv:2205.01529)."""
from typing import Literal

import torch
from torch import Tensor, nn

from data.ranges import NonNegative, Number, Share, Some
from losses import at_least_float32
from models import Detector, DetectorPass

from .base import Method


class MGD(Method):
    """Random cells of the student's map are masked, and convolutions generate the teacher's whole map from the rest.

    Args:
        alpha_mgd: weight of the squared error, summed over a map and averaged over images (eq. 4, 5).
        lambda_mgd: share of cells that are masked (eq. 2); 0.65 is the published value for one-stage detectors.
        levels, student_modules, teacher_modules, adapter_kernel: see `FeaturePairs`.
    """

    needs_labels = False
    needs = ("features",)

    def __init__(self, student: Detector, teacher: Detector, alpha_mgd: NonNegative = 0.00002, lambda_mgd: Share = 0.65,
                 levels: Some[Number] | None = None, student_modules: Some[str] | None = None,
                 teacher_modules: Some[str] | None = None, adapter_kernel: Literal[1, 3] = 1):
        super().__init__()
        self.pair_features(student, teacher, levels, student_modules, teacher_modules, adapter_kernel)
        self.alpha_mgd, self.lambda_mgd = alpha_mgd, lambda_mgd
        self.generation = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True),
                          nn.Conv2d(width, width, 3, padding=1)) for width in self.pairs.teacher_channels)

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        total = 0
        for generate, (own, other) in zip(self.generation, self.pairs(student, teacher)):
            n, _, h, w = own.shape
            kept = torch.rand(n, 1, h, w, device=own.device) <= 1 - self.lambda_mgd
            error = at_least_float32(generate(own * kept)) - at_least_float32(other)
            total = total + error.square().sum() / n
        return {"loss_mgd": self.alpha_mgd * total}

    def weights(self) -> dict[str, float]:
        return {"alpha_mgd": self.alpha_mgd}
