"""Comparing the predictions of two heads: which heads fit together, and CrossKD's losses."""
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from torch import Tensor

from losses import LOSSES, at_least_float32
from models import DenseHead, DetectorPass, HeadOutputs
from models.build import ConfigError, OneOf, build_loss
from models.targets import Assignment

# The losses of `mimic`, as mappings with a type; None: the published one.
SCORES, CENTERNESS = ("logits of both sides",), ("logits and probabilities",)
ScoreLoss = Annotated[dict, OneOf(LOSSES, takes=SCORES)] | None
BoxLoss = Annotated[dict, OneOf(LOSSES, takes=("boxes", "numbers", "distributions of both sides"))] | None
CenternessLoss = Annotated[dict, OneOf(LOSSES, takes=CENTERNESS)] | None


def check_same_grid(student: DenseHead, teacher: DenseHead, method: str) -> None:
    """Raise ConfigError if two heads differ in their classes or in the strides of their levels."""
    differ("number of classes is", student.num_classes, teacher.num_classes, student, teacher, method,
           "give the teacher a class_map, with null for classes that it does not know")
    differ("strides of the levels are", student.prior_generator.strides, teacher.prior_generator.strides, student,
           teacher, method)


def check_same_predictions(student: DenseHead, teacher: DenseHead, method: str, boxes: bool = True) -> None:
    """Raise ConfigError if the class scores (with `boxes`, also the boxes) of two heads do not mean the same."""
    check_same_grid(student, teacher, method)
    meaning = {"class score is the probability of": (student.score_meaning, teacher.score_meaning),
               "number of anchors per cell is": (student.prior_generator.num_anchors,
                                                 teacher.prior_generator.num_anchors)}
    if boxes and student.box_channels != teacher.box_channels:
        meaning["boxes are predicted as"] = (student.box_form, teacher.box_form)
    for what, (own, other) in meaning.items():
        differ(what, own, other, student, teacher, method, "for such a pair use CrossKD")


def differ(what: str, own: object, other: object, student: DenseHead, teacher: DenseHead, method: str,
           advice: str = "") -> None:
    """Raise ConfigError with a line of advice if the student's and the teacher's value of something differ."""
    if own != other:
        raise ConfigError("", f"{method} compares predictions one by one, and those of the student's "
                              f"{type(student).__name__} and the teacher's {type(teacher).__name__} do not mean "
                              f"the same: the student's {what} {own}, the teacher's {other}"
                              + (f"; {advice}" if advice else ""))


def known_scores(cls: Tensor, teacher: DenseHead) -> Tensor:
    """The columns of class scores (..., C) whose classes a teacher's head knows, (..., K); usually all of them.

    Losses on these columns have no gradient in the others, whatever the loss.
    """
    return cls if teacher.known is None else teacher.known.scores(cls)


def compared_scores(student: DetectorPass, teacher: DetectorPass) -> tuple[Tensor, Tensor]:
    """The class scores of both passes in the columns that the teacher knows, see `known_scores`."""
    own, other = (known_scores(seen.outputs.cls, teacher.head) for seen in (student, teacher))
    return own, other


def known_anchors(weight: Tensor, labels: Tensor, teacher: DenseHead) -> Tensor:
    """A weight for each anchor, zero where the class of the anchor's object is one that a teacher's head does not know.

    Anchors of the background keep their weight.
    """
    return weight if teacher.known is None else weight * (teacher.known.labels(labels) >= 0)


def build_mimic_losses(head: DenseHead, centerness: bool, loss_cls_kd: dict | None, loss_reg_kd: dict | None,
                       loss_center_kd: dict | None) -> torch.nn.ModuleDict:
    """The losses for `mimic`, by name: those given, otherwise those published for `head`, the teacher's.

    `centerness` says whether both heads predict the same.
    """
    said = {"loss_cls_kd": loss_cls_kd, "loss_reg_kd": loss_reg_kd, "loss_center_kd": loss_center_kd}
    chosen = head.kd_defaults | {name: cfg for name, cfg in said.items() if cfg is not None}
    if not centerness:
        if loss_center_kd is not None:
            raise ConfigError("loss_center_kd", "centerness is not predicted by both detectors (or by one in the form "
                                                "of an IoU): remove this loss")
        chosen.pop("loss_center_kd", None)
    takes = {"loss_cls_kd": SCORES, "loss_reg_kd": head.kd_boxes, "loss_center_kd": CENTERNESS}
    return torch.nn.ModuleDict({name: build_loss(cfg, name, takes[name]) for name, cfg in chosen.items()})


def mimic(outputs: HeadOutputs, head: DenseHead, student: DetectorPass, teacher: DetectorPass,
          losses: Mapping[str, torch.nn.Module]) -> dict[str, Tensor]:
    """Losses that pull predictions towards the teacher's (CrossKD, arXiv:2306.11369, section 3.3).

    The class loss covers all anchors that the student's assignment does not ignore. The box loss covers the same
    anchors, weighted by the teacher's highest class score. The centerness loss covers positive anchors. The class and
    box losses are divided by the student's normaliser, the centerness loss by the student's number of positives.
    (Distributions over distances are divided by the sum of their weights instead.) If `head` has another number of
    anchors per cell than the student, see `spread` for its weights; the divisors stay the same. Unlabelled images have
    no positives: the normalisers count as many per image as the labelled ones have.

    With a teacher that knows some classes only, the class loss covers these, and the others leave out anchors of other
    classes. The normalisers of the class and centerness losses stay those of all classes, so the class losses of two
    teachers that share the classes add up to that of one teacher with all of them.

    Args:
        outputs: predictions of `head` from the student's features.
    """
    assignment, target = student.assignment, teacher.outputs
    scores, wanted = (known_scores(made.cls, teacher.head) for made in (outputs, target))
    label_weights = spread(assignment.label_weights, student.head, head)
    known, positive = (spread(known_anchors(values, assignment.labels, teacher.head), student.head, head)
                       for values in (assignment.label_weights, assignment.positive))
    weight = at_least_float32(wanted).amax(-1).sigmoid() * (known != 0)
    normalizer = student.head.kd_normalizer(assignment)
    # Heads of different types can be compared only by decoded boxes.
    form = "comparable_boxes" if head.box_form == teacher.head.box_form else "boxes"
    own, other = (getattr(made_by, form)(made, made_by.priors(made))
                  for made_by, made in ((head, outputs), (teacher.head, target)))
    found = {"loss_cls_kd": losses["loss_cls_kd"](scores, wanted, label_weights, avg_factor=normalizer),
             "loss_reg_kd": head.compare(own, other, weight, normalizer, losses["loss_reg_kd"])}
    if "loss_center_kd" in losses:
        found["loss_center_kd"] = losses["loss_center_kd"](
            outputs.centerness, at_least_float32(target.centerness).detach().sigmoid(), positive,
            avg_factor=assignment.labelled_factor)
    return found


def spread(values: Tensor, student: DenseHead, head: DenseHead) -> Tensor:
    """Values (N, P) of the student's anchors for the anchors (N, Q) of another head on the same cells.

    With the same number of anchors per cell they stay as they are. Otherwise all anchors of a cell get the largest
    value of the student's anchors there, so that a cell counts if the student ignores not all of its anchors.
    """
    own, other = student.prior_generator.num_anchors, head.prior_generator.num_anchors
    if own == other:
        return values
    return values.unflatten(1, (-1, own)).amax(-1, keepdim=True).expand(-1, -1, other).flatten(1)


def level_sums(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sums (L,) over images and anchors of each level; `values` are (N, P), and `sizes` the anchors per level."""
    return torch.stack([level.sum() for level in values.split(list(sizes), 1)])


def to_anchors(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """A value per level (L,) as a value per anchor (P,)."""
    return torch.cat([value.expand(size) for value, size in zip(values, sizes)])


def levels_with_positives(assignment: Assignment) -> Tensor:
    """(L,) in the weights' dtype: 1 for levels with a positive anchor in this process's batch, 0 for the others.

    LD's code, from which BCKD's comes, computes the losses level by level. Some of them are zero on levels without
    positives, although they are about all anchors.
    """
    positive = assignment.positive
    return (level_sums(positive, assignment.priors.level_sizes) > 0).to(positive.dtype)


def split_levels(values: Tensor, outputs: HeadOutputs) -> list[Tensor]:
    """Values (N, cells) of the cells of all levels as maps (N, H, W), one for each level."""
    levels = values.split([h * w for h, w in outputs.sizes], dim=1)
    return [level.unflatten(1, size) for level, size in zip(levels, outputs.sizes)]
