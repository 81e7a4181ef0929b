"""FCOS head (arXiv:1904.01355) with the later improvements of its authors' code."""
import torch
from torch import Tensor, nn

from data.ranges import Count, FewOrNone, OrMinusOne, Positive, Some
from losses import at_least_float32, mean_over_processes

from ..anchors import AnchorGenerator, Priors
from ..assigners import FCOSAssigner
from ..build import ConfigError
from ..coders import DistancePointBBoxCoder
from ..layers import NormCfg, Scale, prior_bias
from ..targets import Assignment
from .dense import BoxLoss, CenternessLoss, ClassLoss, DenseHead, HeadOutputs, centerness_target


class FCOSHead(DenseHead):
    """Classification with focal loss, distances to the four sides, and centerness, for one point per cell.

    Args:
        strides: pixels per cell, for each level.
        regress_ranges: for each level, lower and upper bound of a point's largest distance to a side, in pixels.
        center_sampling: a point learns a box only within `center_sample_radius` strides of its centre.
        norm_on_bbox: distances are in strides, at least zero; otherwise in pixels, as the exponential of the output.
        centerness_on_reg: the regression tower predicts centerness; otherwise the classification tower.
        dcn_on_last_conv: must be False, because this project has no deformable convolutions.
        Others: see `DenseHead`.
    """

    box_channels = 4
    classifier = "conv_cls"
    has_centerness = True
    test_defaults = {"nms_iou_threshold": 0.6}
    kd_defaults = {"loss_cls_kd": {"type": "KDQualityFocalLoss", "beta": 1.0, "loss_weight": 0.4},
                   "loss_reg_kd": {"type": "IoULoss", "loss_weight": 0.75}}

    def __init__(
            self, num_classes: Count, in_channels: Count, feat_channels: Count = 256, stacked_convs: FewOrNone = 4,
            norm_cfg: NormCfg = {"type": "GN", "num_groups": 32}, conv_bias: bool | None = True,
            strides: Some[Count] = (8, 16, 32, 64, 128),
            regress_ranges: Some[tuple[OrMinusOne, OrMinusOne]] = (
                (-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8)),
            center_sampling: bool = True, center_sample_radius: Positive = 1.5, norm_on_bbox: bool = True,
            centerness_on_reg: bool = True, dcn_on_last_conv: bool = False,
            loss_cls: ClassLoss = {"type": "FocalLoss"},
            loss_bbox: BoxLoss = {"type": "GIoULoss"},
            loss_centerness: CenternessLoss = {"type": "CrossEntropyLoss"}):
        super().__init__(num_classes, in_channels, feat_channels, stacked_convs, norm_cfg, conv_bias,
                         restrict_to_pad=False)
        if dcn_on_last_conv:
            raise ConfigError("dcn_on_last_conv", "must be false: this project has no deformable convolutions")
        if len(regress_ranges) != len(strides):
            raise ConfigError("regress_ranges", f"must have one entry per stride, {len(strides)} in total")
        if any(low >= high for low, high in regress_ranges):
            raise ConfigError("regress_ranges", f"must each go from a lower to a higher number, not {regress_ranges}")
        self.norm_on_bbox, self.centerness_on_reg = norm_on_bbox, centerness_on_reg
        # Points are the centres of anchors. The size of the anchors is not used.
        self.prior_generator = AnchorGenerator(list(strides), [1.0], scales=[1.0], center_offset=0.5)
        self.bbox_coder = DistancePointBBoxCoder()
        self.assigner = FCOSAssigner(regress_ranges, center_sampling, center_sample_radius)
        self.build_parts(loss_cls=loss_cls, loss_bbox=loss_bbox, loss_centerness=loss_centerness)
        self.conv_cls = nn.Conv2d(self.tower_channels, num_classes, 3, padding=1)
        self.conv_reg = nn.Conv2d(self.tower_channels, 4, 3, padding=1)
        self.conv_centerness = nn.Conv2d(self.tower_channels, 1, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in strides)
        self.init_weights(prior_bias(0.01))

    def predict_maps(self, cls_feat: Tensor, reg_feat: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        box = at_least_float32(self.scales[level](self.conv_reg(reg_feat)))
        box = box.clamp(min=0) if self.norm_on_bbox else box.exp()
        return self.conv_cls(cls_feat), box, self.conv_centerness(reg_feat if self.centerness_on_reg else cls_feat)

    @staticmethod
    def average_positives(positive: Tensor, dtype: torch.dtype) -> Tensor:
        return mean_over_processes(positive.sum().to(dtype), least=1)

    @staticmethod
    def centerness(assignment: Assignment) -> Tensor:
        """Centerness target (N, P), zero for anchors that learn no box."""
        return centerness_target(assignment.priors.centers, assignment.box_targets) * assignment.positive

    def kd_normalizer(self, assignment: Assignment) -> Tensor:
        """The sum of the centerness targets, as for the box loss; one if there are none.

        The original divides by 1e-6 then. Mimicked predictions count also where there is no object, so a batch without
        objects would have a loss of about 1e9.
        """
        total = mean_over_processes(self.centerness(assignment).sum(), least=1e-6)
        return torch.where(total > 1e-6, total * assignment.images_per_labelled, assignment.avg_factor)

    def losses(self, outputs: HeadOutputs, assignment: Assignment) -> dict[str, Tensor]:
        priors, positive = assignment.priors, assignment.positive
        centerness = self.centerness(assignment)
        target = self.bbox_coder.encode(priors.centers, assignment.box_targets)
        if self.norm_on_bbox:
            target = target / priors.strides.unsqueeze(-1)
        # In training, the original decodes distances in strides as if they were pixels. Its IoU differs only by `eps`.
        target, decoded = (self.bbox_coder.decode(priors.centers, distances) for distances in (target, outputs.box))
        return {
            "loss_cls": self.loss_cls(outputs.cls, assignment.labels, assignment.label_weights,
                                      avg_factor=assignment.avg_factor),
            "loss_bbox": self.loss_bbox(decoded, target, centerness, avg_factor=self.kd_normalizer(assignment)),
            "loss_centerness": self.loss_centerness(outputs.centerness, centerness, positive,
                                                    avg_factor=assignment.avg_factor)}

    def decode(self, box: Tensor, priors: Priors) -> Tensor:
        distances = box * priors.strides.unsqueeze(-1) if self.norm_on_bbox else box
        return self.bbox_coder.decode(priors.centers, distances)
