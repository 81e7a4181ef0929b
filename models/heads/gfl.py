"""Generalized focal loss head (arXiv:2006.04388), and its second version (arXiv:2011.12885)."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.ranges import Count, Few, FewOrNone, OrMinusOne
from losses import aligned_iou, at_least_float32, mean_over_processes

from ..anchors import Priors
from ..build import ConfigError
from ..coders import DistancePointBBoxCoder
from ..layers import NormCfg, Scale, prior_bias
from ..targets import Assignment
from .dense import AnchorCfg, AssignerCfg, BoxLoss, DenseHead, HeadOutputs, QualityLoss, SidesLoss


class GFLHead(DenseHead):
    """Class scores that learn the IoU, and a distribution over each side's distance. The defaults are mmdet's GFL.

    Args:
        reg_max: the largest distance in strides; each side has reg_max + 1 logits.
        reg_topk: makes it a GFLv2: a class score is multiplied by a quality, which two small convolutions predict from
            this number of largest probabilities of each side (the Distribution-Guided Quality Predictor of
            arXiv:2011.12885, which has 4); null: no such quality.
        reg_channels: width between these two convolutions.
        add_mean: they get the mean of these probabilities, too.
        Others: see `DenseHead`.
    """

    classifier = "gfl_cls"
    kd_boxes = ("distributions of both sides",)
    score_meaning = "the class times the IoU"
    test_defaults = {"nms_iou_threshold": 0.6}
    kd_defaults = {
        "loss_cls_kd": {"type": "KDQualityFocalLoss", "beta": 1.0, "loss_weight": 1.0},
        "loss_reg_kd": {"type": "KnowledgeDistillationKLDivLoss", "class_reduction": "sum", "T": 1, "loss_weight": 4.0}}

    def __init__(
            self, num_classes: Count, in_channels: Count, feat_channels: Count = 256, stacked_convs: FewOrNone = 4,
            norm_cfg: NormCfg = {"type": "GN", "num_groups": 32}, reg_max: Count = 16,
            reg_topk: Few | None = None, reg_channels: Count = 64, add_mean: bool = True,
            anchor_generator: AnchorCfg = {
                "type": "AnchorGenerator", "ratios": [1.0], "octave_base_scale": 8, "scales_per_octave": 1,
                "strides": [8, 16, 32, 64, 128]},
            assigner: AssignerCfg = {"type": "ATSSAssigner", "topk": 9},
            loss_cls: QualityLoss = {"type": "QualityFocalLoss", "beta": 2.0},
            loss_dfl: SidesLoss = {"type": "DistributionFocalLoss", "loss_weight": 0.25},
            loss_bbox: BoxLoss = {"type": "GIoULoss", "loss_weight": 2.0},
            pos_weight: OrMinusOne = -1, allowed_border: OrMinusOne = -1, restrict_to_pad: bool = True):
        super().__init__(num_classes, in_channels, feat_channels, stacked_convs, norm_cfg, pos_weight=pos_weight,
                         allowed_border=allowed_border, restrict_to_pad=restrict_to_pad)
        self.reg_max, self.box_channels = reg_max, 4 * (reg_max + 1)
        self.box_form = f"distributions over {reg_max + 1} distances"
        self.build_parts(anchor_generator=anchor_generator, assigner=assigner, loss_cls=loss_cls, loss_dfl=loss_dfl,
                         loss_bbox=loss_bbox)
        if self.prior_generator.num_anchors != 1:
            raise ConfigError("anchor_generator", "GFLHead predicts one box per cell: give one scale and one ratio")
        self.bbox_coder = DistancePointBBoxCoder()
        self.gfl_cls = nn.Conv2d(self.tower_channels, num_classes, 3, padding=1)
        self.gfl_reg = nn.Conv2d(self.tower_channels, self.box_channels, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in self.prior_generator.strides)
        self.reg_topk, self.add_mean = reg_topk, add_mean
        if reg_topk is None:
            if reg_channels != 64 or not add_mean:
                raise ConfigError("reg_topk", "is missing: reg_channels and add_mean are of no use without it")
        elif reg_topk > reg_max + 1:
            raise ConfigError("reg_topk", f"must be at most reg_max + 1, {reg_max + 1}, not {reg_topk}")
        else:
            self.reg_conf = nn.Sequential(nn.Conv2d(4 * (reg_topk + add_mean), reg_channels, 1), nn.ReLU(inplace=True),
                                          nn.Conv2d(reg_channels, 1, 1))
        self.init_weights(prior_bias(0.01))

    def predict_maps(self, cls_feat: Tensor, reg_feat: Tensor, level: int) -> tuple[Tensor, Tensor, None]:
        cls, box = self.gfl_cls(cls_feat), at_least_float32(self.scales[level](self.gfl_reg(reg_feat)))
        return cls if self.reg_topk is None else product_logit(cls, self.quality_logit(box)), box, None

    def quality_logit(self, box: Tensor) -> Tensor:
        """Logits (N, 1, H, W) of a box's quality from its distributions (N, 4 * (reg_max + 1), H, W): GFLv2."""
        largest = box.unflatten(1, (4, self.reg_max + 1)).softmax(2).topk(self.reg_topk, dim=2).values
        if self.add_mean:
            largest = torch.cat([largest, largest.mean(2, keepdim=True)], 2)
        return self.reg_conf(largest.flatten(1, 2))

    def logits(self, box: Tensor) -> Tensor:
        """Logits (..., 4, reg_max + 1) from box predictions (..., 4 * (reg_max + 1))."""
        return box.unflatten(-1, (4, self.reg_max + 1))

    def distances(self, box: Tensor) -> Tensor:
        """Expected distance (..., 4) of each side, in strides (eq. 5)."""
        bins = torch.arange(self.reg_max + 1, dtype=box.dtype, device=box.device)
        return self.logits(box).softmax(-1) @ bins

    def losses(self, outputs: HeadOutputs, assignment: Assignment) -> dict[str, Tensor]:
        box = at_least_float32(outputs.box)
        stride = assignment.priors.strides.unsqueeze(-1)
        points = assignment.priors.centers / stride
        target = assignment.box_targets / stride
        decoded = self.bbox_coder.decode(points, self.distances(box))

        quality = aligned_iou(decoded.detach(), target) * assignment.positive
        loss_cls = self.loss_cls(outputs.cls, (assignment.labels, quality), assignment.label_weights,
                                 avg_factor=assignment.avg_factor)
        # A box is weighted with the highest class score of its anchor.
        weight = at_least_float32(outputs.cls).detach().sigmoid().amax(-1) * assignment.positive
        normalizer = mean_over_processes(weight.sum(), least=1)
        loss_bbox = self.loss_bbox(decoded, target, weight, avg_factor=1.0) / normalizer
        sides = self.bbox_coder.encode(points, target, self.reg_max)
        loss_dfl = self.loss_dfl(self.logits(box), sides, weight.unsqueeze(-1), avg_factor=4.0) / normalizer
        return {"loss_cls": loss_cls, "loss_bbox": loss_bbox, "loss_dfl": loss_dfl}

    def decode(self, box: Tensor, priors: Priors) -> Tensor:
        distances = self.distances(at_least_float32(box)) * priors.strides.unsqueeze(-1)
        return self.bbox_coder.decode(priors.centers, distances)

    def comparable_boxes(self, outputs: HeadOutputs, priors: Priors) -> Tensor:
        return self.logits(at_least_float32(outputs.box))

    def compare(self, box: Tensor, reference: Tensor, weight: Tensor, normalizer: Tensor, loss: nn.Module) -> Tensor:
        """As in `DenseHead`, but the sum of the weights is the normaliser, as the reference has it."""
        # The reference does not clamp this; the smallest positive number only avoids 0/0 if all weights are zero.
        total = mean_over_processes(weight.sum()).clamp(min=torch.finfo(weight.dtype).tiny)
        return loss(box, reference, weight.unsqueeze(-1), avg_factor=4.0) / total


def product_logit(a: Tensor, b: Tensor) -> Tensor:
    """The logit of sigmoid(a) * sigmoid(b), in at least float32: -log(exp(-a) + exp(-b) + exp(-a - b)).

    With logits in place of the product, losses and methods need not know that a score is a product.
    """
    a, b = -at_least_float32(a), -at_least_float32(b)
    return -log_add(log_add(a, b), a + b)


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)). Exporters do not know torch.logaddexp."""
    return torch.maximum(a, b) + F.softplus(-(a - b).abs())
