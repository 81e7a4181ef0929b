"""CWD: channel-wise knowledge distillation (Shu et al., arXiv:2011.13256), also of normalised maps."""
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from torch import Tensor

from data.ranges import NonNegative, Number, Positive, Some
from losses import at_least_float32, channel_wise_divergence, normalised_channels
from models import Detector, DetectorPass
from models.build import ConfigError

from .base import Method, check_same_predictions, known_scores, link


class CWD(Method):
    """Each channel of a map, as a distribution over positions, mimics the teacher's.

    With `norm` and a `decay` of its weight, this is the distillation of DAMO-YOLO (arXiv:2211.15444; authors' code,
    distill_loss.py and detector_trainer.py). With `norm` and a `stop_epoch`, it is that of the RTMDets in MMYOLO.

    Args:
        tau: temperature of the distributions (eq. 3).
        loss_weight: weight of the divergence (eq. 4), summed over maps.
        norm: normalise each channel of both maps to mean 0 and variance 1 over the batch first, as a batch norm does.
        sync_stats: with `norm`, over the batches of all processes; the published recipes use each process's.
        on: "features" compares feature maps, "logits" the class scores of each level.
        levels, student_modules, teacher_modules, adapter_kernel: the maps, see `FeaturePairs`.
    """

    some_classes = True
    needs_labels = False
    needs = ("features",)
    needs_with = {"on: logits": ("scores", "same heads", "same classes")}

    def __init__(self, student: Detector, teacher: Detector, tau: Positive = 1.0, loss_weight: NonNegative = 5.0,
                 on: Literal["features", "logits"] = "features", levels: Some[Number] | None = None,
                 student_modules: Some[str] | None = None, teacher_modules: Some[str] | None = None,
                 adapter_kernel: Literal[1, 3] = 1, norm: bool = False, sync_stats: bool = False):
        super().__init__()
        self.tau, self.loss_weight, self.teacher_head = tau, loss_weight, on == "logits"
        self.norm, self.sync_stats = norm, sync_stats
        if sync_stats and not norm:
            raise ConfigError("sync_stats", "is about the statistics that norm needs: set norm: true, or remove it")
        if self.teacher_head:
            self.teacher_levels = ()
            if (levels, student_modules, teacher_modules, adapter_kernel) != (None, None, None, 1):
                raise ConfigError("", "CWD on logits compares the scores of all levels: remove levels, "
                                      "student_modules, teacher_modules and adapter_kernel")
            check_same_predictions(student.bbox_head, teacher.bbox_head, "CWD on logits", boxes=False)
        else:
            self.pair_features(student, teacher, levels, student_modules, teacher_modules, adapter_kernel)

    @classmethod
    def compares_predictions(cls, arguments: Mapping[str, object]) -> bool:
        return arguments.get("on") == "logits"

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        if self.teacher_head:
            pairs = self.score_maps(student, teacher)
        else:
            pairs = self.pairs(student, teacher)
        if self.norm:
            pairs = [[normalised_channels(at_least_float32(x), self.sync_stats) for x in pair] for pair in pairs]
        losses = [channel_wise_divergence(own, other, self.tau) for own, other in pairs]
        return {"loss_cwd": self.loss_weight * sum(losses)}

    def links(self, student: DetectorPass, teacher: DetectorPass) -> list[str]:
        if not self.teacher_head:
            return super().links(student, teacher)
        return [link(f"class scores of level {i}", own, f"class scores of level {i}", other)
                for i, (own, other) in enumerate(self.score_maps(student, teacher))]

    @staticmethod
    def score_maps(student: DetectorPass, teacher: DetectorPass) -> list[tuple[Tensor, Tensor]]:
        """The class scores of each level as maps (N, A*K, H, W), of the K classes that the teacher knows."""
        return list(zip(*(replace(seen.outputs, cls=known_scores(seen.outputs.cls, teacher.head)).cls_maps()
                          for seen in (student, teacher))))
