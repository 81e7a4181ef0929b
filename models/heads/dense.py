"""What all dense heads share: two towers of convolutions, assignment, and what distillation asks of a head."""
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from losses import mean_over_processes

from ..anchors import Priors
from ..assigners import IGNORED
from ..build import ConfigError
from ..layers import ConvModule, NormCfg, normal_init
from ..targets import Assignment, pad_targets

Maps = Sequence[Tensor]


@dataclass
class HeadOutputs:
    """Predictions for N images, flattened in the order of `Priors`: level, y, x, anchor."""

    cls: Tensor                      # (N, P, C) logits
    box: Tensor                      # (N, P, D), as the head parametrises boxes
    centerness: Tensor | None        # (N, P) logits, of heads that have it
    sizes: list[tuple[int, int]]     # height, width of each level's map
    # Tower features at the cuts asked for: layer -> (classification, regression) maps of every level.
    cuts: dict[int, tuple[list[Tensor], list[Tensor]]] = field(default_factory=dict)

    def cls_maps(self) -> list[Tensor]:
        """Class logits as maps (N, A*C, H, W), a level each."""
        n, _, classes = self.cls.shape
        anchors = self.cls.shape[1] // sum(h * w for h, w in self.sizes)
        levels = self.cls.split([h * w * anchors for h, w in self.sizes], dim=1)
        return [level.reshape(n, h, w, anchors * classes).permute(0, 3, 1, 2)
                for level, (h, w) in zip(levels, self.sizes)]


class DenseHead(nn.Module):
    """Base of the heads. A head adds its last convolutions, its losses and its decoding.

    Args:
        num_classes: object classes, background not counted.
        in_channels, feat_channels: channels of the features and of the towers.
        stacked_convs: convolutions per tower; 0 predicts from the features directly.
        conv_bias: bias of the tower convolutions; None gives them one where no norm follows.
        pos_weight: classification weight of positives; 1 when not positive.
        allowed_border: anchors further than this outside their image do not take part; negative lets all.
        restrict_to_pad: anchors of cells beyond an image's own `pad_size` do not take part.
    """

    # Name of the convolution that gives the class scores, and what a score is the probability of.
    classifier: str
    score_meaning = "the class"
    has_centerness = False
    box_form = "boxes in pixels"  # what `box_space` gives
    # What of the `test` section is this head's own when not said.
    test_defaults: dict = {}
    # The published losses of CrossKD and mimicking on this head.
    kd_defaults: dict = {}

    def __init__(self, num_classes: int, in_channels: int, feat_channels: int, stacked_convs: int, norm_cfg: NormCfg,
                 conv_bias: bool | None = None, pos_weight: float = -1, allowed_border: float = -1,
                 restrict_to_pad: bool = True):
        super().__init__()
        if stacked_convs < 0:
            raise ConfigError("stacked_convs", f"must be 0 or more, not {stacked_convs}")
        if num_classes < 1:
            raise ConfigError("num_classes", f"must be at least 1, not {num_classes}")
        self.num_classes, self.stacked_convs = num_classes, stacked_convs
        self.pos_weight, self.allowed_border, self.restrict_to_pad = pos_weight, allowed_border, restrict_to_pad

        def tower() -> nn.ModuleList:
            return nn.ModuleList(
                ConvModule(feat_channels if i else in_channels, feat_channels, 3, padding=1, bias=conv_bias,
                           norm_cfg=norm_cfg) for i in range(stacked_convs))

        self.cls_convs, self.reg_convs = tower(), tower()
        self.in_channels = in_channels
        self.tower_channels = feat_channels if stacked_convs else in_channels

    def init_weights(self, prior: float) -> None:
        """Normal weights of deviation 0.01; the classifier starts at the score that `prior` is the bias of."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                normal_init(module, bias=prior if module is getattr(self, self.classifier) else 0.0)

    @torch.no_grad()
    def select_classes(self, class_map: Sequence[int]) -> None:
        """Keep some classes only: class k is from now on what class `class_map[k]` was.

        Raises:
            ConfigError: an entry that is no class of this head.
        """
        if not class_map or not all(0 <= k < self.num_classes for k in class_map):
            raise ConfigError("class_map", f"must name classes among 0..{self.num_classes - 1}, not {list(class_map)}")
        conv = getattr(self, self.classifier)
        rows = torch.arange(conv.out_channels).view(-1, self.num_classes)[:, list(class_map)].flatten()
        conv.weight, conv.bias = nn.Parameter(conv.weight[rows]), nn.Parameter(conv.bias[rows])
        conv.out_channels, self.num_classes = len(rows), len(class_map)

    # --- forward ---

    def predict_maps(self, cls_feat: Tensor, reg_feat: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Last convolutions of one level: logits (N, A*C, H, W), boxes (N, A*D, H, W), centerness (N, A, H, W)."""
        raise NotImplementedError

    def forward(self, features: Maps, cuts: Sequence[int] = ()) -> HeadOutputs:
        """Predictions from the neck's features, a map (N, in_channels, H_l, W_l) per level."""
        return self.run_from(0, features, features, cuts)

    def run_from(self, layer: int, cls_feats: Maps, reg_feats: Maps, cuts: Sequence[int] = ()) -> HeadOutputs:
        """Predictions from features put in after `layer` convolutions of each tower.

        Args:
            layer: 0 takes the neck's features; k takes features in place of what the k-th convolution gave, and
                activates them (once more, if they are activations: CrossKD shifts them to other means in between).
            cuts: layers whose output is kept in the outputs; 0 is the neck's features.
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
        """The tower's output, and by number those of the layers in `cuts`; others are not kept alive."""
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
        """Which anchor learns what.

        Raises:
            ConfigError: `allowed_border` leaves an image without anchors.
        """
        priors = self.priors(outputs)
        truth = pad_targets(targets, priors.boxes.dtype, priors.boxes.device)
        valid = self._valid(priors, truth.image_sizes, truth.pad_sizes)
        matched = self.assigner(priors, valid, truth.boxes, truth.real, truth.ignored, truth.ignored_real)
        positive = matched >= 0
        index = matched.clamp(min=0)
        labels = torch.where(positive, truth.labels.gather(1, index), self.num_classes)
        weights = (valid & (matched != IGNORED)).to(priors.boxes.dtype)
        if self.pos_weight > 0:
            weights = torch.where(positive, self.pos_weight, weights)
        gathered = truth.boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
        return Assignment(priors, matched, labels, weights, torch.where(positive.unsqueeze(-1), gathered, priors.boxes),
                          positive.to(weights.dtype),
                          self.average_positives(positive, weights.dtype))

    @staticmethod
    def average_positives(positive: Tensor, dtype: torch.dtype) -> Tensor:
        """Normaliser of the losses: positives, but at least one per image, averaged over processes."""
        return mean_over_processes(positive.sum(1).clamp(min=1).sum().to(dtype))

    def kd_normalizer(self, assignment: Assignment) -> Tensor:
        """What the losses of mimicked predictions are divided by."""
        return assignment.avg_factor

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

    def box_space(self, outputs: HeadOutputs, priors: Priors) -> Tensor:
        """Box predictions in the form in which two heads of this kind are compared: decoded boxes (N, P, 4)."""
        return self.boxes(outputs, priors)

    def compare(self, box: Tensor, reference: Tensor, weight: Tensor, assignment: Assignment,
                loss: nn.Module) -> Tensor:
        """Loss between two predictions in `box_space`, weighted by (N, P), with this head's normaliser."""
        return loss(box, reference, weight, avg_factor=self.kd_normalizer(assignment))


def flatten(maps: Maps, channels: int) -> Tensor:
    """Maps (N, A*channels, H_l, W_l) of all levels as one (N, P, channels), in the order of `Priors`."""
    return torch.cat([x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, channels) for x in maps], dim=1)


def centerness_target(points: Tensor, boxes: Tensor) -> Tensor:
    """How central points (..., 2) lie in boxes (..., 4), in [0, 1] (FCOS, arXiv:1904.01355, eq. 3)."""
    low, high = points - boxes[..., :2], boxes[..., 2:] - points
    tiny = torch.finfo(low.dtype).tiny
    ratio = torch.min(low, high).clamp(min=0) / torch.max(low, high).clamp(min=tiny)
    return ratio.prod(-1).sqrt()
