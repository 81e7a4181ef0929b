"""PKD: distillation via the Pearson correlation coefficient (Cao et al., arXiv:2207.02039)."""
from torch import Tensor

from losses import PKDLoss
from models import Detector, DetectorPass
from models.build import ConfigError

from .method import Method


class PKD(Method):
    """Neck outputs are compared with each channel's mean and deviation over the batch taken out.

    Args:
        loss_weight: weight of the loss, summed over levels.
        levels: neck outputs that are distilled, by number; all by default.
    """

    def __init__(self, student: Detector, teacher: Detector, loss_weight: float = 1.0,
                 levels: list[int] | None = None):
        super().__init__()
        own, other = student.feature_channels, teacher.feature_channels
        self.levels = list(range(len(own))) if levels is None else levels
        if not all(0 <= level < min(len(own), len(other)) for level in self.levels):
            raise ConfigError("levels", f"{self.levels} are not all among the student's {len(own)} and the teacher's "
                                        f"{len(other)}")
        for level in self.levels:
            if own[level] != other[level]:
                raise ConfigError("levels", f"level {level} has {own[level]} channels in the student and "
                                            f"{other[level]} in the teacher: give both necks one width")
        self.loss = PKDLoss(loss_weight)

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        return {"loss_feat_kd": sum(self.loss(student.features[i], teacher.features[i]) for i in self.levels)}
