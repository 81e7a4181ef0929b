"""ATSS head (arXiv:1912.02424), and with an output for the IoU that of PAA (arXiv:2007.08103)."""
from typing import Literal

from torch import Tensor, nn

from data.ranges import Count, FewOrNone, OrMinusOne
from losses import aligned_iou, at_least_float32, mean_over_processes

from ..anchors import Priors
from ..layers import NormCfg, Scale, prior_bias
from ..targets import Assignment
from .dense import (
    AnchorCfg,
    AssignerCfg,
    BoxLoss,
    CenternessLoss,
    ClassLoss,
    CoderCfg,
    DenseHead,
    HeadOutputs,
    centerness_target,
)


class ATSSHead(DenseHead):
    """Focal classification, box deltas and centerness on one anchor per cell. Defaults are mmdet's ATSS.

    Args:
        quality: what the third output predicts: the centerness of an anchor, or the IoU of its box, as in PAA. With iou
            the score of a detection is the root of class score times IoU, and `score_thr` and `nms_pre` choose by this
            score. PAA's weights load. Its assignment in training and its score voting after suppression are not here.
        Others: see `DenseHead`.
    """

    box_channels = 4
    classifier = "atss_cls"
    has_centerness = True
    test_defaults = {"nms_iou_threshold": 0.6}
    kd_defaults = {"loss_cls_kd": {"type": "KDQualityFocalLoss", "beta": 1.0, "loss_weight": 1.0},
                   "loss_reg_kd": {"type": "GIoULoss", "loss_weight": 1.0},
                   "loss_center_kd": {"type": "CrossEntropyLoss", "loss_weight": 1.0}}

    def __init__(
            self, num_classes: Count, in_channels: Count, feat_channels: Count = 256, stacked_convs: FewOrNone = 4,
            norm_cfg: NormCfg = {"type": "GN", "num_groups": 32},
            anchor_generator: AnchorCfg = {
                "type": "AnchorGenerator", "ratios": [1.0], "octave_base_scale": 8, "scales_per_octave": 1,
                "strides": [8, 16, 32, 64, 128]},
            bbox_coder: CoderCfg = {
                "type": "DeltaXYWHBBoxCoder", "target_stds": [0.1, 0.1, 0.2, 0.2]},
            assigner: AssignerCfg = {"type": "ATSSAssigner", "topk": 9},
            loss_cls: ClassLoss = {"type": "FocalLoss"},
            loss_bbox: BoxLoss = {"type": "GIoULoss", "loss_weight": 2.0},
            loss_centerness: CenternessLoss = {"type": "CrossEntropyLoss"},
            quality: Literal["centerness", "iou"] = "centerness", pos_weight: OrMinusOne = -1,
            allowed_border: OrMinusOne = -1, restrict_to_pad: bool = True):
        super().__init__(num_classes, in_channels, feat_channels, stacked_convs, norm_cfg, pos_weight=pos_weight,
                         allowed_border=allowed_border, restrict_to_pad=restrict_to_pad)
        self.build_parts(anchor_generator=anchor_generator, bbox_coder=bbox_coder, assigner=assigner, loss_cls=loss_cls,
                         loss_bbox=loss_bbox, loss_centerness=loss_centerness)
        self.quality = quality
        anchors = self.prior_generator.num_anchors
        self.atss_cls = nn.Conv2d(self.tower_channels, anchors * num_classes, 3, padding=1)
        self.atss_reg = nn.Conv2d(self.tower_channels, anchors * 4, 3, padding=1)
        self.atss_centerness = nn.Conv2d(self.tower_channels, anchors, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in self.prior_generator.strides)
        self.init_weights(prior_bias(0.01))

    def predict_maps(self, cls_feat: Tensor, reg_feat: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        box = at_least_float32(self.scales[level](self.atss_reg(reg_feat)))
        return self.atss_cls(cls_feat), box, self.atss_centerness(reg_feat)

    def losses(self, outputs: HeadOutputs, assignment: Assignment) -> dict[str, Tensor]:
        positive, target = assignment.positive, assignment.box_targets
        decoded = self.decode(outputs.box, assignment.priors)
        if self.quality == "iou":
            quality = aligned_iou(decoded.detach(), target) * positive
        else:
            quality = centerness_target(assignment.priors.centers, target) * positive
        normalizer = mean_over_processes(quality.sum(), least=1)
        return {
            "loss_cls": self.loss_cls(outputs.cls, assignment.labels, assignment.label_weights,
                                      avg_factor=assignment.avg_factor),
            "loss_bbox": self.loss_bbox(decoded, target, quality, avg_factor=1.0) / normalizer,
            "loss_centerness": self.loss_centerness(outputs.centerness, quality, positive,
                                                    avg_factor=assignment.avg_factor)}

    def candidate_scores(self, cls: Tensor, centerness: Tensor) -> Tensor:
        scores = super().candidate_scores(cls, centerness)
        if self.quality == "iou":
            return (scores * at_least_float32(centerness).sigmoid().unsqueeze(-1)).sqrt()
        return scores

    def final_scores(self, scores: Tensor, centerness: Tensor) -> Tensor:
        return scores if self.quality == "iou" else super().final_scores(scores, centerness)

    def decode(self, box: Tensor, priors: Priors) -> Tensor:
        return self.bbox_coder.decode(priors.boxes, at_least_float32(box))
