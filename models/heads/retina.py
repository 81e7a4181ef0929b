"""RetinaNet's head (arXiv:1708.02002)."""
import torch
from torch import Tensor, nn

from data.ranges import Count, FewOrNone, OrMinusOne, Share
from losses import at_least_float32, mean_over_processes

from ..anchors import Priors
from ..build import build_loss
from ..layers import NormCfg, prior_bias
from ..targets import Assignment
from .dense import AnchorCfg, AssignerCfg, BoxLoss, ClassLoss, CoderCfg, DenseHead, HeadOutputs


class RetinaHead(DenseHead):
    """Focal classification and box deltas on several anchors per cell. Defaults are mmdet's RetinaNet.

    Args:
        reg_decoded_bbox: the box loss compares decoded boxes, as IoU losses need, in place of deltas.
        ema_normalizer: momentum of detectron2's running loss normaliser, which starts at 100; None divides by the
            batch's own positives.
        Others: see `DenseHead`.
    """

    box_channels = 4
    classifier = "retina_cls"
    test_defaults = {"nms_iou_threshold": 0.5}
    kd_defaults = {"loss_cls_kd": {"type": "KDQualityFocalLoss", "beta": 1.0, "loss_weight": 1.0},
                   "loss_reg_kd": {"type": "GIoULoss", "loss_weight": 1.0}}

    def __init__(
            self, num_classes: Count, in_channels: Count, feat_channels: Count = 256, stacked_convs: FewOrNone = 4,
            norm_cfg: NormCfg = None,
            anchor_generator: AnchorCfg = {
                "type": "AnchorGenerator", "octave_base_scale": 4, "scales_per_octave": 3, "ratios": [0.5, 1.0, 2.0],
                "strides": [8, 16, 32, 64, 128]},
            bbox_coder: CoderCfg = {"type": "DeltaXYWHBBoxCoder"},
            assigner: AssignerCfg = {
                "type": "MaxIoUAssigner", "pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0.0,
                "ignore_iof_thr": -1},
            loss_cls: ClassLoss = {"type": "FocalLoss"},
            loss_bbox: BoxLoss = {"type": "L1Loss"},
            reg_decoded_bbox: bool = False, ema_normalizer: Share | None = None, pos_weight: OrMinusOne = -1,
            allowed_border: OrMinusOne = -1, restrict_to_pad: bool = True):
        super().__init__(num_classes, in_channels, feat_channels, stacked_convs, norm_cfg, pos_weight=pos_weight,
                         allowed_border=allowed_border, restrict_to_pad=restrict_to_pad)
        self.build_parts(anchor_generator=anchor_generator, bbox_coder=bbox_coder, assigner=assigner, loss_cls=loss_cls)
        self.loss_bbox = build_loss(loss_bbox, "loss_bbox", ("boxes", "numbers") if reg_decoded_bbox else ("numbers",))
        self.reg_decoded_bbox, self.ema_normalizer = reg_decoded_bbox, ema_normalizer
        anchors = self.prior_generator.num_anchors
        self.retina_cls = nn.Conv2d(self.tower_channels, anchors * num_classes, 3, padding=1)
        self.retina_reg = nn.Conv2d(self.tower_channels, anchors * 4, 3, padding=1)
        self.init_weights(prior_bias(0.01))
        if ema_normalizer is not None:
            self.register_buffer("loss_normalizer", torch.tensor(100.0))

    def predict_maps(self, cls_feat: Tensor, reg_feat: Tensor, level: int) -> tuple[Tensor, Tensor, None]:
        return self.retina_cls(cls_feat), self.retina_reg(reg_feat), None

    def _normalizer(self, assignment: Assignment) -> Tensor:
        if self.ema_normalizer is None:
            return assignment.avg_factor
        with torch.no_grad():
            positives = mean_over_processes(assignment.positive.sum(), least=1)
            self.loss_normalizer.lerp_(positives.to(self.loss_normalizer), 1 - self.ema_normalizer)
        return self.loss_normalizer.to(assignment.avg_factor)

    def losses(self, outputs: HeadOutputs, assignment: Assignment) -> dict[str, Tensor]:
        normalizer = self._normalizer(assignment)
        loss_cls = self.loss_cls(outputs.cls, assignment.labels, assignment.label_weights, avg_factor=normalizer)
        boxes, target = outputs.box, assignment.box_targets
        if self.reg_decoded_bbox:
            boxes = self.decode(boxes, assignment.priors)
        else:
            target = self.bbox_coder.encode(assignment.priors.boxes, target)
        return {"loss_cls": loss_cls,
                "loss_bbox": self.loss_bbox(boxes, target, assignment.positive, avg_factor=normalizer)}

    def decode(self, box: Tensor, priors: Priors) -> Tensor:
        return self.bbox_coder.decode(priors.boxes, at_least_float32(box))
