"""The base of all dense heads: two towers of convolutions, the assignment, and what distillation needs from a head."""
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import one_line
from data.ranges import Count, FewOrNone, OrMinusOne
from losses import LOSSES, at_least_float32, mean_over_processes

from ..anchors import PRIORS, Priors
from ..assigners import ASSIGNERS, IGNORED, NEGATIVE
from ..build import ConfigError, OneOf, build
from ..coders import CODERS
from ..layers import ConvModule, NormCfg, normal_init
from ..targets import Assignment, count_labelled, pad_targets
from .known import UNKNOWN_LOGIT, KnownClasses

Maps = Sequence[Tensor]
# The types of a head's parts; its other parts are losses.
PARTS = {"anchor_generator": PRIORS, "bbox_coder": CODERS, "assigner": ASSIGNERS}
AnchorCfg = Annotated[dict, OneOf(PRIORS, light=True)]
CoderCfg = Annotated[dict, OneOf(CODERS, light=True)]
AssignerCfg = Annotated[dict, OneOf(ASSIGNERS, light=True)]
# The losses by what they are given, in the words of the losses' `takes`.
ClassLoss = Annotated[dict, OneOf(LOSSES, takes=("logits and labels",))]
QualityLoss = Annotated[dict, OneOf(LOSSES, takes=("logits, labels and qualities",))]
SidesLoss = Annotated[dict, OneOf(LOSSES, takes=("distributions and numbers",))]
BoxLoss = Annotated[dict, OneOf(LOSSES, takes=("boxes", "numbers"))]
CenternessLoss = Annotated[dict, OneOf(LOSSES, takes=("logits and probabilities",))]


@dataclass
class HeadOutputs:
    """Predictions for N images, flattened in the order of `Priors`: level, y, x, anchor."""

    cls: Tensor                      # (N, P, C) logits
    box: Tensor                      # (N, P, D), in the head's own box parameters
    centerness: Tensor | None        # (N, P) logits, for heads that have it
    sizes: list[tuple[int, int]]     # height, width of each level's map
    # Tower features at the requested cuts: layer -> (classification, regression) maps of every level.
    cuts: dict[int, tuple[list[Tensor], list[Tensor]]] = field(default_factory=dict)

    def of_labelled(self, count: int) -> "HeadOutputs":
        """The predictions for the first `count` images."""
        cuts = {layer: tuple([x[:count] for x in maps] for maps in towers) for layer, towers in self.cuts.items()}
        return replace(self, cls=self.cls[:count], box=self.box[:count], cuts=cuts,
                       centerness=None if self.centerness is None else self.centerness[:count])

    def cls_maps(self) -> list[Tensor]:
        """Class logits as maps (N, A*C, H, W), one per level."""
        n, _, classes = self.cls.shape
        anchors = self.cls.shape[1] // sum(h * w for h, w in self.sizes)
        levels = self.cls.split([h * w * anchors for h, w in self.sizes], dim=1)
        return [level.reshape(n, h, w, anchors * classes).permute(0, 3, 1, 2)
                for level, (h, w) in zip(levels, self.sizes)]


class DenseHead(nn.Module):
    """Base class of the heads. A head adds its last convolutions, its losses and its decoding.

    Args:
        num_classes: object classes, background not counted.
        in_channels, feat_channels: channels of the features and of the towers.
        stacked_convs: convolutions per tower; 0 predicts directly from the features.
        conv_bias: bias of the tower convolutions; None adds it if no norm follows.
        pos_weight: weight of positive anchors in the classification loss; 0 or less means 1.
        allowed_border: anchors that reach further than this beyond their image take no part; negative: all take part.
        restrict_to_pad: anchors of cells beyond an image's own `pad_size` do not take part.
    """

    # The name of the convolution that gives the class scores, and what a score is the probability of.
    classifier: str
    score_meaning = "the class"
    has_centerness = False
    quality = "centerness"  # what the third output predicts, if there is one
    kd_boxes = ("boxes", "numbers")  # what a loss on `comparable_boxes` is given
    box_form = "boxes in pixels"  # the form that `comparable_boxes` returns
    # This head's defaults for keys of the `test` section.
    test_defaults: dict = {}
    # The published losses of CrossKD and of mimicking for this head.
    kd_defaults: dict = {}

    def __init__(self, num_classes: Count, in_channels: Count, feat_channels: Count, stacked_convs: FewOrNone,
                 norm_cfg: NormCfg, conv_bias: bool | None = None, pos_weight: OrMinusOne = -1,
                 allowed_border: OrMinusOne = -1, restrict_to_pad: bool = True):
        super().__init__()
        self.num_classes, self.stacked_convs = num_classes, stacked_convs
        self.known: KnownClasses | None = None  # None: it knows all classes
        self.pos_weight, self.allowed_border, self.restrict_to_pad = pos_weight, allowed_border, restrict_to_pad

        def tower() -> nn.ModuleList:
            return nn.ModuleList(
                ConvModule(feat_channels if i else in_channels, feat_channels, 3, padding=1, bias=conv_bias,
                           norm_cfg=norm_cfg) for i in range(stacked_convs))

        self.cls_convs, self.reg_convs = tower(), tower()
        self.in_channels = in_channels
        self.tower_channels = feat_channels if stacked_convs else in_channels

    def build_parts(self, **configs: dict) -> None:
        """Build parts of the head as attributes of the same names; the anchor generator becomes `prior_generator`."""
        for key, cfg in configs.items():
            name = "prior_generator" if key == "anchor_generator" else key
            setattr(self, name, build(cfg, PARTS.get(key, LOSSES), key))

    def init_weights(self, prior: float) -> None:
        """Normal weights with standard deviation 0.01, zero biases; the classifier's bias starts at `prior`."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                normal_init(module, bias=prior if module is getattr(self, self.classifier) else 0.0)

    @torch.no_grad()
    def select_classes(self, class_map: Sequence[int | None]) -> None:
        """Keep only some classes: from now on, class k is the former class `class_map[k]`.

        Where the entry is None, the head does not know class k: its scores are zero, and it is not in `known`.

        Raises:
            ConfigError: `class_map` is empty or all None, or an entry is not a class of this head.
        """
        check_class_map(class_map, self.num_classes, "class_map")
        conv, known = getattr(self, self.classifier), [k is not None for k in class_map]
        rows = torch.arange(conv.out_channels).view(-1, self.num_classes)[:, [k or 0 for k in class_map]].flatten()
        conv.weight, conv.bias = nn.Parameter(conv.weight[rows]), nn.Parameter(conv.bias[rows])
        conv.out_channels, self.num_classes = len(rows), len(class_map)
        if not all(known):
            unknown = ~torch.tensor(known).repeat(len(rows) // len(known)).to(conv.bias.device)
            conv.weight[unknown], conv.bias[unknown] = 0.0, UNKNOWN_LOGIT
            self.known = KnownClasses(known).to(conv.bias.device)

    # --- forward ---

    def predict_maps(self, cls_feat: Tensor, reg_feat: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Predictions for one level: logits (N, A*C, H, W), boxes (N, A*D, H, W), centerness (N, A, H, W)."""
        raise NotImplementedError

    def forward(self, features: Maps, cuts: Sequence[int] = ()) -> HeadOutputs:
        """Predictions from the neck's features, one map (N, in_channels, H_l, W_l) per level."""
        return self.run_from(0, features, features, cuts)

    def run_from(self, layer: int, cls_feats: Maps, reg_feats: Maps, cuts: Sequence[int] = ()) -> HeadOutputs:
        """Predictions from features that replace the output of the first `layer` convolutions of each tower.

        Args:
            layer: with 0, features are the neck's; with k, they replace the k-th convolution's output and are activated
                (a second time, if they are activations: CrossKD changes their mean and deviation in between).
            cuts: layers whose outputs are returned in `HeadOutputs.cuts`; 0 is the neck's features.
        """
        levels, held = [], []
        for level, (cls_feat, reg_feat) in enumerate(zip(cls_feats, reg_feats)):
            cls_feat, cls_held = self._run_tower(self.cls_convs, cls_feat, layer, cuts)
            reg_feat, reg_held = self._run_tower(self.reg_convs, reg_feat, layer, cuts)
            levels.append(self.predict_maps(cls_feat, reg_feat, level))
            held.append((cls_held, reg_held))
        cls, box, centerness = zip(*levels)
        sizes = [tuple(x.shape[-2:]) for x in cls]
        kept = {k: ([c[k] for c, _ in held], [r[k] for _, r in held]) for k in cuts}
        return HeadOutputs(flatten(cls, self.num_classes), flatten(box, self.box_channels),
                           None if centerness[0] is None else flatten(centerness, 1).squeeze(-1), sizes, kept)

    def run_level(self, feature: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """`predict_maps` of one level from the neck's features (N, in_channels, H, W)."""
        towers = [self._run_tower(convs, feature, 0, ())[0] for convs in (self.cls_convs, self.reg_convs)]
        return self.predict_maps(*towers, level)

    @staticmethod
    def _run_tower(convs: nn.ModuleList, x: Tensor, layer: int, cuts: Sequence[int]) -> tuple[Tensor, dict]:
        """The tower's output, and the outputs of the layers in `cuts` by number; others are not kept in memory."""
        held = {layer: x}
        if layer:
            x = convs[layer - 1].activate(x)
        for i, conv in enumerate(convs[layer:], start=layer + 1):
            x = conv(x)
            if i in cuts:
                held[i] = x
        return x, held

    # --- targets ---

    def priors(self, outputs: HeadOutputs) -> Priors:
        """Anchors of these outputs, in at least float32."""
        dtype = torch.promote_types(outputs.box.dtype, torch.float32)
        return self.prior_generator(outputs.sizes, dtype, outputs.box.device)

    def _valid(self, priors: Priors, image_sizes: Tensor, pad_sizes: Tensor) -> Tensor:
        """(N, P) bool: anchors that take part."""
        valid = torch.ones(len(image_sizes), len(priors.boxes), dtype=torch.bool, device=priors.boxes.device)
        if self.restrict_to_pad:
            valid = (priors.cells < pad_sizes.flip(-1).unsqueeze(1)).all(-1)
        if self.allowed_border >= 0:
            far = image_sizes.flip(-1).unsqueeze(1) + self.allowed_border
            valid = valid & (priors.boxes[:, :2] >= -self.allowed_border).all(-1) & (priors.boxes[:, 2:] < far).all(-1)
            if not valid.any(1).all():
                raise ConfigError("model.head.allowed_border", "no anchor lies inside an image: check the image and "
                                                               "anchor sizes, or set -1 to let all anchors take part")
        return valid

    @torch.no_grad()
    def assign(self, outputs: HeadOutputs, targets: list[dict]) -> Assignment:
        """Decide what each anchor learns.

        In an unlabelled image every anchor that takes part counts as negative, with the same weight. Nothing learns
        that: `Detector.losses` leaves these images out. But the weights say where predictions can be compared.

        Raises:
            ConfigError: `allowed_border` leaves an image without anchors.
            ValueError: see `count_labelled`.
        """
        labelled, count = count_labelled(targets), len(targets)
        priors = self.priors(outputs)
        truth = pad_targets(targets, priors.boxes.dtype, priors.boxes.device)
        valid = self._valid(priors, truth.image_sizes, truth.pad_sizes)
        matched = self.assigner(priors, valid[:labelled], truth.boxes, truth.real, truth.ignored, truth.ignored_real)
        index = matched.clamp(min=0)
        labels, gathered = truth.labels.gather(1, index), truth.boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
        avg_factor = self.average_positives(matched >= 0, priors.boxes.dtype)
        if more := count - labelled:
            matched, labels = F.pad(matched, (0, 0, 0, more), value=NEGATIVE), F.pad(labels, (0, 0, 0, more))
            gathered = F.pad(gathered, (0, 0, 0, 0, 0, more))
        positive = matched >= 0
        labels = torch.where(positive, labels, self.num_classes)
        weights = (valid & (matched != IGNORED)).to(priors.boxes.dtype)
        if self.pos_weight > 0:
            weights = torch.where(positive, self.pos_weight, weights)
        return Assignment(priors, matched, labels, weights, torch.where(positive.unsqueeze(-1), gathered, priors.boxes),
                          positive.to(weights.dtype), avg_factor * (count / labelled) if more else avg_factor,
                          count / labelled, avg_factor)

    @staticmethod
    def average_positives(positive: Tensor, dtype: torch.dtype) -> Tensor:
        """Normaliser of the losses: number of positives, at least one per image, averaged over processes."""
        return mean_over_processes(positive.sum(1).clamp(min=1).sum().to(dtype))

    def kd_normalizer(self, assignment: Assignment) -> Tensor:
        """The divisor of the losses on mimicked predictions."""
        return assignment.avg_factor

    # --- detections ---

    def candidate_scores(self, cls: Tensor, centerness: Tensor | None) -> Tensor:
        """Scores (..., P, C) that choose the candidates of detections, from logits (..., P, C) and (..., P)."""
        return at_least_float32(cls).sigmoid()

    def final_scores(self, scores: Tensor, centerness: Tensor | None) -> Tensor:
        """Scores (...) of detections, from their candidates' scores (...) and their logits of centerness (...)."""
        return scores if centerness is None else scores * at_least_float32(centerness).sigmoid()

    # --- what a head adds ---

    def losses(self, outputs: HeadOutputs, assignment: Assignment) -> dict[str, Tensor]:
        """The head's training losses, scalars."""
        raise NotImplementedError

    def decode(self, box: Tensor, priors: Priors) -> Tensor:
        """Boxes (..., 4) xyxy in input pixels from predictions (..., D) of the given anchors."""
        raise NotImplementedError

    def boxes(self, outputs: HeadOutputs, priors: Priors) -> Tensor:
        """Boxes (N, P, 4) xyxy in input pixels."""
        return self.decode(outputs.box, priors)

    def comparable_boxes(self, outputs: HeadOutputs, priors: Priors) -> Tensor:
        """Box predictions in the form that is compared between two heads of this kind: decoded boxes (N, P, 4)."""
        return self.boxes(outputs, priors)

    def compare(self, box: Tensor, reference: Tensor, weight: Tensor, normalizer: Tensor, loss: nn.Module) -> Tensor:
        """Loss between two predictions in `comparable_boxes`, weighted by (N, P) and divided by `normalizer`, a scalar.
        """
        return loss(box, reference, weight, avg_factor=normalizer)


def check_class_map(class_map: Sequence[int | None], count: int, key: str) -> None:
    """Raise ConfigError if a class map names none of a head's `count` classes, or a class that it does not have."""
    named = [k for k in class_map if k is not None]
    if not named or not all(0 <= k < count for k in named):
        raise ConfigError(key, f"must name classes among 0..{count - 1}, not {one_line(json.dumps(list(class_map)))}")


def flatten(maps: Maps, channels: int) -> Tensor:
    """Maps (N, A*channels, H_l, W_l) of all levels as one tensor (N, P, channels), in the order of `Priors`."""
    return torch.cat([x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, channels) for x in maps], dim=1)


def centerness_target(points: Tensor, boxes: Tensor) -> Tensor:
    """How close points (..., 2) are to the centre of boxes (..., 4), in [0, 1] (FCOS, arXiv:1904.01355, eq. 3)."""
    low, high = points - boxes[..., :2], boxes[..., 2:] - points
    tiny = torch.finfo(low.dtype).tiny
    ratio = torch.min(low, high).clamp(min=0) / torch.max(low, high).clamp(min=tiny)
    return ratio.prod(-1).sqrt()
