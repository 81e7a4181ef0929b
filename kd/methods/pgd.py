"""PGD: prediction-guided distillation (Yang et al., arXiv:2203.05469)."""
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from data.errors import counted
from data.ranges import Count, NonNegative, Number, Positive, Share, Some
from losses import at_least_float32, mean_over_processes, widest_float
from models import Detector, DetectorPass
from models.assigners import box_chunks, pairwise_overlap
from models.build import ConfigError
from models.targets import pad_targets

from .base import HeatMap, Method, adapter, known_anchors, link, split_levels

# The authors move each position at random by up to 0.05 pixel, so that a covariance has an inverse. This is the
# variance of such a move in each direction. Added to the covariance, it does the same without chance.
VARIANCE = 0.1 ** 2 / 12
ALPHA, TOPK = {"ATSSHead": 0.08}, {"ATSSHead": 9}  # the authors' values for a head, if they are not the usual ones


class Regions(NamedTuple):
    """Weights of the cells of all levels, (N, cells) each, in the order of `Priors`."""

    cls: Tensor         # key regions for classification features, from 0 to 1
    reg: Tensor         # key regions for box features, from 0 to 1
    background: Tensor  # 1 in cells whose centre is in no box, else 0


class PGD(Method):
    """Tower features mimic the teacher's in the cells where the teacher predicts an object best.

    The quality of a cell for an object of class c is `p_c^(1 - xi) * IoU^xi` (eq. 1), with the teacher's score p_c and
    the IoU of the teacher's box with the object's. The `topk` cells of best quality are the object's key region. A
    Gaussian is fitted to their centres by maximum likelihood. A cell's weight is `exp(-d^2 / 2)`, d the Mahalanobis
    distance of its centre to the mean. Cells outside the box, or of quality zero, have weight 0. A cell in the regions
    of several objects takes the largest weight. Where a cell has several anchors, it has the best quality of these.
    Objects of a class that the teacher does not know have no key region, and their cells are not background either.

    With student and teacher features s and t (N, C, H, W) of a level, T the temperature, S = HW softmax(mean_c |t| / T)
    over positions, and A = C softmax(|t| / T) over channels in each cell, S' and A' the same of s, the losses are
        cls:  level weight * sum((alpha F + beta B) S A (s - t)^2) / N + delta (sum |A - A'| / NHW + sum |S - S'| / N)
        reg:  (gamma sum(R mean_c(A (s - t)^2)) + delta sum_(R > 0) |A - A'|) / n
    F: the weights for classification, B: the background, each divided by its number of cells above 0 in the image.
    R: the weights for boxes; n: the number of cells with R > 0 in the batch, averaged over processes. The losses are
    summed over levels.

    The authors' code differs where it cannot be meant: it decodes GFL's boxes with strides of other levels, exchanges x
    and y in the test whether a point of FCOS is in a box, and multiplies the features of each image by the weights of
    every image (`across_images`).

    Args:
        tower_convs: number of convolutions of each tower before the features that are compared; 0: the neck's outputs.
        temperature: of both attentions.
        alpha: weight of key regions in the cls loss. Default: 0.08 for ATSS and 0.04 for other heads. The authors did
            not use RetinaNet.
        beta: weight of the background in the cls loss. Default: half of alpha.
        gamma: weight of key regions in the reg loss. Default: 1.6 times alpha.
        delta: weight of the attentions in both losses.
        level_weights: a factor of alpha and beta for each level; by default 1, 1.25, 1.5, ...
        topk: cells of a key region. Default: 9 if the teacher is an ATSS, else 30.
        xi_cls, xi_reg: exponents of the IoU in the quality, for the two kinds of features.
        across_images: in the cls loss, the weights of an image are the sums over all images of the process's batch, as
            in the authors' code, which their figures come from.
        adapter_kernel: kernel size of the convolution that is added where student and teacher differ in channels.
    """

    teacher_head = True
    some_classes = True
    needs = ("scores", "boxes", "same classes")

    def __init__(self, student: Detector, teacher: Detector, tower_convs: Number = 1, temperature: Positive = 0.8,
                 alpha: NonNegative | None = None, beta: NonNegative | None = None, gamma: NonNegative | None = None,
                 delta: NonNegative = 0.0008, level_weights: Some[NonNegative] | None = None,
                 topk: Count | None = None, xi_cls: Share = 0.8, xi_reg: Share = 0.6, across_images: bool = False,
                 adapter_kernel: Literal[1, 3] = 1):
        super().__init__()
        heads = student.bbox_head, teacher.bbox_head
        check_heads(*heads, tower_convs)
        levels = len(heads[0].prior_generator.strides)
        self.level_weights = [1 + level / 4 for level in range(levels)] if level_weights is None else level_weights
        if len(self.level_weights) != levels:
            raise ConfigError("level_weights", f"must have one entry per level, {levels} in total")
        if alpha is None:
            alpha = ALPHA.get(type(heads[0]).__name__, 0.04)
        self.alpha, self.delta = alpha, delta
        self.beta, self.gamma = alpha / 2 if beta is None else beta, 1.6 * alpha if gamma is None else gamma
        self.topk = TOPK.get(type(heads[1]).__name__, 30) if topk is None else topk
        self.xi, self.temperature, self.across_images = (xi_cls, xi_reg), temperature, across_images
        self.cut, self.student_cuts, self.teacher_cuts = tower_convs, (tower_convs,), (tower_convs,)
        widths = [head.tower_channels if tower_convs else head.in_channels for head in heads]
        self.adapters = nn.ModuleList(adapter(*widths, adapter_kernel) for _ in ("cls", "reg"))

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        cls, reg, background = (split_levels(weight, teacher.outputs) for weight in self.regions(student, teacher))
        cls_pairs, reg_pairs = (
            [(at_least_float32(adapt(own)), at_least_float32(other)) for own, other in zip(*towers)]
            for adapt, *towers in zip(self.adapters, student.outputs.cuts[self.cut], teacher.outputs.cuts[self.cut]))
        counts = mean_over_processes(torch.stack([(weight > 0).sum() for weight in reg]).to(reg[0].dtype), least=1)
        of_cls = zip(cls_pairs, cls, background, self.level_weights)
        return {"loss_pgd_cls": sum(self.cls_loss(*pair, *weights) for pair, *weights in of_cls),
                "loss_pgd_reg": sum(self.reg_loss(*pair, *rest) for pair, *rest in zip(reg_pairs, reg, counts))}

    def cls_loss(self, own: Tensor, other: Tensor, weight: Tensor, background: Tensor, factor: float) -> Tensor:
        """The cls loss of one level, from maps (N, C, H, W) and weights (N, H, W)."""
        n, _, h, w = own.shape
        spatial, channel = attention(other, self.temperature)
        own_spatial, own_channel = attention(own, self.temperature)
        total = self.alpha * per_cell(weight) + self.beta * per_cell(background)
        if self.across_images:
            total = total.sum(0, keepdim=True)
        error = ((own - other).square() * channel).sum(1) * spatial
        mimicry = (channel - own_channel).abs().sum() / (n * h * w) + (spatial - own_spatial).abs().sum() / n
        return factor * (error * total).sum() / n + self.delta * mimicry

    def reg_loss(self, own: Tensor, other: Tensor, weight: Tensor, count: Tensor) -> Tensor:
        """The reg loss of one level, from maps (N, C, H, W) and weights (N, H, W); `count`: how many are above 0."""
        channel, own_channel = (attention(x, self.temperature)[1] for x in (other, own))
        error = ((own - other).square() * channel).mean(1) * weight
        mimicry = (channel - own_channel).abs().sum(1) * (weight > 0)
        return (self.gamma * error.sum() + self.delta * mimicry.sum()) / count

    @torch.no_grad()
    def regions(self, student: DetectorPass, teacher: DetectorPass) -> Regions:
        """The key regions and the background of the batch."""
        head, outputs = teacher.head, teacher.outputs
        priors, anchors = head.priors(outputs), head.prior_generator.num_anchors
        points, truth = priors.centers[::anchors], pad_targets(student.targets, priors.boxes.dtype, priors.boxes.device)
        valid = (priors.cells[::anchors] < truth.pad_sizes.flip(-1).unsqueeze(1)).all(-1)  # (N, cells)
        if not head.restrict_to_pad:
            valid = torch.ones_like(valid)
        predicted, logits = head.boxes(outputs, priors), at_least_float32(outputs.cls).transpose(1, 2)
        weights, covered = [torch.zeros_like(valid, dtype=predicted.dtype) for _ in self.xi], torch.zeros_like(valid)
        for part in box_chunks(truth.boxes, len(priors.boxes)):
            boxes = truth.boxes[:, part]
            inside = in_boxes(points, boxes) & truth.real[:, part].unsqueeze(-1) & valid.unsqueeze(1)  # (N, G, cells)
            covered |= inside.any(1)
            known = known_anchors(truth.real[:, part], truth.labels[:, part], head)  # (N, G)
            counts = known.unsqueeze(-1) & valid.unsqueeze(1)
            overlap = pairwise_overlap(boxes, predicted)  # (N, G, P)
            score = logits.gather(1, truth.labels[:, part].unsqueeze(-1).expand_as(overlap)).sigmoid()
            for i, xi in enumerate(self.xi):
                quality = (score.pow(1 - xi) * overlap.pow(xi)).unflatten(-1, (-1, anchors)).amax(-1) * counts
                weight = gaussian_weights(points, quality, self.topk) * (inside & counts)
                weights[i] = torch.maximum(weights[i], weight.amax(1))
        return Regions(*weights, (valid & ~covered).to(weights[0].dtype))

    def weights(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("alpha", "beta", "gamma", "delta")}

    def links(self, student: DetectorPass, teacher: DetectorPass) -> list[str]:
        towers = zip(("classification", "box"), student.outputs.cuts[self.cut], teacher.outputs.cuts[self.cut])
        where = f"tower after {counted(self.cut, 'convolution')}, finest of {counted(len(student.features), 'level')}"
        return [link(f"{name} {where}", own[0], f"{name} tower", other[0]) for name, own, other in towers]

    def charts(self, student: DetectorPass, teacher: DetectorPass, trained: bool) -> dict[str, list[list[HeatMap]]]:
        """Key regions for both kinds of features; a column for each level."""
        if not all("boxes" in target for target in student.targets):
            return {}
        cls, reg, _ = (split_levels(weight, teacher.outputs) for weight in self.regions(student, teacher))
        return {"regions": [[HeatMap(f"level {i}, regions for {kind}: up to {float(weight[0].max()):.2f}", weight[0])
                             for kind, weight in (("classes", of_cls), ("boxes", of_reg))]
                            for i, (of_cls, of_reg) in enumerate(zip(cls, reg))]}


def check_heads(student: nn.Module, teacher: nn.Module, tower_convs: int) -> None:
    """Raise ConfigError for heads whose towers cannot be compared, or a teacher with other classes."""
    own, other = student.prior_generator.strides, teacher.prior_generator.strides
    if own != other:
        raise ConfigError("", f"PGD compares all levels, and their strides are {own} in the student and {other} in the "
                              "teacher")
    if student.num_classes != teacher.num_classes:
        raise ConfigError("", "PGD needs the teacher's scores of the student's classes, and the student has "
                              f"{counted(student.num_classes, 'class')} and the teacher {teacher.num_classes}; give "
                              "the teacher a class_map, with null for classes that it does not know")
    for name, head in (("student", student), ("teacher", teacher)):
        if tower_convs > head.stacked_convs:
            raise ConfigError("tower_convs", f"must be from 0 to {head.stacked_convs}, the number of convolutions in "
                                             f"the {name}'s towers, not {tower_convs}")


def attention(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Spatial (N, H, W) and channel (N, C, H, W) attention of a map (N, C, H, W); see `PGD`."""
    n, c, h, w = x.shape
    value = x.abs()
    spatial = h * w * (value.mean(1).flatten(1) / temperature).softmax(-1).view(n, h, w)
    return spatial, c * (value / temperature).softmax(1)


def per_cell(weight: Tensor) -> Tensor:
    """Weights (N, H, W), divided by how many of them are not zero in each image."""
    return weight / (weight > 0).sum((1, 2), keepdim=True).clamp(min=1)


def in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """(N, G, cells) bool: whether each point (cells, 2) is in the box (N, G, 4), and not on its border."""
    low, high = boxes[..., None, :2], boxes[..., None, 2:]
    return ((points > low) & (points < high)).all(-1)


def gaussian_weights(points: Tensor, quality: Tensor, topk: int) -> Tensor:
    """Weights (N, G, cells) of the `topk` cells with the best quality, by a Gaussian that is fitted to their centres.

    Args:
        points: (cells, 2) the cells' centres in pixels.
        quality: (N, G, cells) of each cell for each box; a cell of quality 0 is not taken.
    """
    best, index = quality.topk(min(topk, quality.shape[-1]), dim=-1)
    wide = widest_float(points.device)  # centres on one line leave few digits of the determinant
    member = (best > 0).to(wide).unsqueeze(-1)  # (N, G, K, 1)
    place, count = points.to(wide)[index], member.sum(2, keepdim=True).clamp(min=1)
    offset = (place - (place * member).sum(2, keepdim=True) / count) * member
    x, y = offset.unbind(-1)  # (N, G, K)
    count = count.squeeze(-1)
    xx, yy, xy = ((a * b).sum(-1, keepdim=True) / count for a, b in ((x, x), (y, y), (x, y)))
    xx, yy = xx + VARIANCE, yy + VARIANCE
    distance = (yy * x.square() - 2 * xy * x * y + xx * y.square()) / (xx * yy - xy.square()).clamp(min=VARIANCE ** 2)
    weight = (-distance.clamp(min=0) / 2).exp() * member.squeeze(-1)
    return torch.zeros_like(quality).scatter_(-1, index, weight.to(quality.dtype))
