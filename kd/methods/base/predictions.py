"""Comparing the predictions of two heads: which heads fit together, and CrossKD's losses."""
from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

from losses import LOSSES, at_least_float32
from models import DenseHead, DetectorPass, HeadOutputs
from models.build import ConfigError, OneOf, build_loss

# The losses of `mimic`, as mappings with a type; None: the published one.
SCORES, CENTERNESS = ("logits of both sides",), ("logits and probabilities",)
ScoreLoss = Annotated[dict, OneOf(LOSSES, takes=SCORES)] | None
BoxLoss = Annotated[dict, OneOf(LOSSES, takes=("boxes", "numbers", "distributions of both sides"))] | None
CenternessLoss = Annotated[dict, OneOf(LOSSES, takes=CENTERNESS)] | None


def check_same_grid(student: DenseHead, teacher: DenseHead, method: str) -> None:
    """Raise ConfigError if two heads differ in their classes or in the strides of their levels."""
    differ("number of classes is", student.num_classes, teacher.num_classes, student, teacher, method,
           "give the teacher a class_map")
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
    anchors per cell than the student, see `spread` for its weights; the divisors stay the same.

    Args:
        outputs: predictions of `head` from the student's features.
    """
    assignment, target = student.assignment, teacher.outputs
    label_weights, positive = (spread(values, student.head, head)
                               for values in (assignment.label_weights, assignment.positive))
    weight = at_least_float32(target.cls).amax(-1).sigmoid() * (label_weights != 0)
    normalizer = student.head.kd_normalizer(assignment)
    # Heads of different types can be compared only by decoded boxes.
    form = "comparable_boxes" if head.box_form == teacher.head.box_form else "boxes"
    own, other = (getattr(made_by, form)(made, made_by.priors(made))
                  for made_by, made in ((head, outputs), (teacher.head, target)))
    found = {"loss_cls_kd": losses["loss_cls_kd"](outputs.cls, target.cls, label_weights, avg_factor=normalizer),
             "loss_reg_kd": head.compare(own, other, weight, normalizer, losses["loss_reg_kd"])}
    if "loss_center_kd" in losses:
        found["loss_center_kd"] = losses["loss_center_kd"](
            outputs.centerness, at_least_float32(target.centerness).detach().sigmoid(), positive,
            avg_factor=assignment.avg_factor)
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
