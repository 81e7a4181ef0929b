"""Starts a detector from another one: the weights that fit, and the rows of the classes that both have."""
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.errors import one_line

from .build import ConfigError
from .checkpoints.classes import known_classes, match_classes
from .checkpoints.formats import Checkpoint
from .detector import Detector
from .weights import CheckpointError, align, check_finite, is_optional, open_checkpoint, summary

PARTS = ("backbone", "neck", "bbox_head")


@dataclass
class InitialReport:
    """What a detector took from a checkpoint. Its text is a few lines for people."""

    label: str                         # the checkpoint
    taken: dict[str, tuple[int, int]]  # by part: tensors that were taken whole, of how many; without the classifier
    matched: dict[str, str]            # classes that both have: name in the data -> name in the checkpoint
    new: list[str]                     # the data's other classes, whose rows keep the head's prior
    names: str | None                  # where the checkpoint's class names are from
    problem: str                       # why no class can be matched, if `names` is None
    kept: list[str]                    # tensors of the model that were not taken
    unexpected: list[str]              # names in the checkpoint only

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {taken} of {total}" for part, (taken, total) in self.taken.items())
        pairs = [ours if ours == theirs else f"{ours} from {theirs}" for ours, theirs in self.matched.items()]
        classes = f"classes found among {self.names}: {counted(pairs)}" if self.names else f"no class: {self.problem}"
        left = {"not in the checkpoint, or of another shape": self.kept, "in the checkpoint only": self.unexpected}
        return "\n  ".join([f"starts from {self.label}", f"tensors taken: {parts}",
                            f"{classes}; new classes: {counted(self.new)}",
                            *(f"{what}: {summary(names)}" for what, names in left.items() if names)])


def counted(names: Sequence[str], most: int = 10) -> str:
    """`3 (a, b, c)`, cut after ten; `none` without any."""
    shown = ", ".join(one_line(name, 60) for name in names[:most])
    return f"{len(names)} ({shown}{', ...' if len(names) > most else ''})" if names else "none"


@torch.no_grad()
def load_initial(model: Detector, source: str | os.PathLike | Mapping, classes: Sequence[str],
                 source_classes: Sequence[str] | None = None) -> InitialReport:
    """Copies into `model` all that a checkpoint of another detector has under the same name and in the same shape.

    The rows of the classifier are matched by the classes' names. The rows of a class that the checkpoint does not have,
    or whose name is not known, keep the values that the head was built with.

    Args:
        source: as in `load_weights`; of an FGD checkpoint, the student.
        classes: the names of the model's classes.
        source_classes: the names of the checkpoint's classes; by default its own, or COCO's where it is known to have
            these.
    Raises, before the model is changed:
        CheckpointError: the file cannot be read, or has values that are not finite, or another backbone.
        ConfigError: `source_classes` are not as many as the checkpoint has.
    """
    label, checkpoint = open_checkpoint(source, preferred="student")
    label = f"{checkpoint.format} checkpoint {label}"
    wanted = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    weights = align(checkpoint.weights, wanted)
    check_backbone(label, weights, wanted)
    name = f"bbox_head.{model.bbox_head.classifier}"
    classifier = (f"{name}.weight", f"{name}.bias")
    whole = [name for name, value in wanted.items()
             if name not in classifier and name in weights and weights[name].shape == value.shape]
    used = [*whole, *(name for name in classifier if name in weights)]
    check_finite(label, {name: weights[name].to(wanted[name].dtype) for name in used}, used)
    given, about = classes_of(checkpoint, [weights.get(name) for name in classifier], model, source_classes)
    matches = match_classes(classes, given)

    for name in whole:
        wanted[name].copy_(weights[name])
    if any(number is not None for number in matches):
        for name in classifier:
            copy_rows(wanted[name], weights[name], matches, len(given))
    required = [name for name in wanted if name not in classifier and not is_optional(name)]
    taken = set(whole)
    parts = {part: [name in taken for name in required if name.startswith(f"{part}.")] for part in PARTS}
    return InitialReport(
        label, {part: (sum(found), len(found)) for part, found in parts.items() if found},
        matched={ours: given[number] for ours, number in zip(classes, matches) if number is not None},
        new=[ours for ours, number in zip(classes, matches) if number is None],
        names=about if given else None, problem="" if given else about,
        kept=[name for name in required if name not in taken],
        unexpected=[name for name in weights if name not in wanted and not is_optional(name)])


def check_backbone(label: str, weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if the checkpoint's backbone is another one: its features would mean nothing here."""
    ours = [name for name in wanted if name.startswith("backbone.") and not is_optional(name)]
    advice = "set model.backbone as the checkpoint was trained, or take another checkpoint"
    others = [name for name in ours if name in weights and weights[name].shape != wanted[name].shape]
    if others:
        shapes = f"{tuple(wanted[others[0]].shape)} in the model and {tuple(weights[others[0]].shape)} in the file"
        raise CheckpointError(f"{label} has a backbone of another architecture or width, {len(others)} of {len(ours)} "
                              f"tensors have another shape: {others[0]} is {shapes}; {advice}")
    if not any(name in weights for name in ours):
        first = min((name for name in weights if name.startswith("backbone.")), default=next(iter(weights)))
        raise CheckpointError(f"{label} has no weight for this model's backbone: the model has {ours[0]} "
                              f"{tuple(wanted[ours[0]].shape)}, the file {one_line(first, 120)} "
                              f"{tuple(weights[first].shape)}; {advice}")


def classes_of(checkpoint: Checkpoint, classifier: Sequence[Tensor | None], model: Detector,
               said: Sequence[str] | None) -> tuple[list[str | None], str]:
    """The names of the classes in a checkpoint's classifier, and where they are from; no names, and why, if its rows
    cannot be used."""
    conv = getattr(model.bbox_head, model.bbox_head.classifier)
    anchors, name = conv.out_channels // model.bbox_head.num_classes, f"bbox_head.{model.bbox_head.classifier}"
    weight, bias = classifier
    if weight is None or bias is None:
        problem = f"the checkpoint has no {name}"
    elif weight.shape[1:] != conv.weight.shape[1:] or bias.shape != weight.shape[:1]:
        problem = f"{name} is {tuple(weight.shape)} in the checkpoint and {tuple(conv.weight.shape)} in the model"
    elif len(weight) % anchors:
        problem = f"the checkpoint's {name} has {len(weight)} rows, no multiple of this head's {anchors} anchors"
    else:
        return names_of(checkpoint, len(weight) // anchors, said)
    if said is not None:
        raise ConfigError("train.init_classes", f"cannot be used, {problem}: remove it")
    return [], problem


def names_of(checkpoint: Checkpoint, count: int, said: Sequence[str] | None) -> tuple[list[str | None], str]:
    """The names of `count` classes, and where they are from."""
    if said is not None:
        if len(said) != count:
            names, classes = f"name{'s' * (len(said) != 1)}", f"class{'es' * (count != 1)}"
            raise ConfigError("train.init_classes", f"has {len(said)} {names}, and the checkpoint {count} {classes}: "
                                                    "give one name for each, in the checkpoint's order")
        return list(said), "the names in train.init_classes"
    its = "class, give its name" if count == 1 else f"{count} classes, give their names"
    return known_classes(checkpoint, count) or (
        [], f"the checkpoint does not name its {its} with train.init_classes")


def copy_rows(ours: nn.Parameter, theirs: Tensor, matches: Sequence[int | None], count: int) -> None:
    """Copies the matched classes' rows of a classifier's weight or bias, whose rows are sorted by anchor, then class.

    Args:
        matches: for each of our classes, the number of theirs, or None.
        count: the number of their classes.
    """
    pairs = [(k, number) for k, number in enumerate(matches) if number is not None]
    here, there = (list(numbers) for numbers in zip(*pairs))
    rows = theirs.unflatten(0, (-1, count))[:, there]
    ours.unflatten(0, (-1, len(matches)))[:, here] = rows.to(ours)
