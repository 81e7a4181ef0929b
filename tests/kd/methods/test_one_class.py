"""One class, the commonest detector: every loss is that of two classes of which one never occurs.

A class whose logits are far below zero in student and teacher adds nothing to a loss that sums over classes.
"""
import pytest
import torch
from small_models import VARIANTS, gradients, make_batch, small_distiller, teacher_entry

from models import ConfigError

HEADS = ["GFLHead", "RetinaHead", "ATSSHead", "FCOSHead", *VARIANTS]
METHODS = [{"type": "CrossKD", "reused_teacher_head_idx": 1}, {"type": "CrossKD", "reused_teacher_head_idx": 0},
           {"type": "Mimic"}, {"type": "KD", "T": 2.0}, {"type": "FGD"}, {"type": "PKD"}, {"type": "MGD"},
           {"type": "CWD"}, {"type": "CWD", "on": "logits", "name": "logits"}, {"type": "FitNet"},
           {"type": "BCKD", "name": "BCKD"}, {"type": "GI"}, {"type": "PGD"}, {"type": "FRS"}]
NEVER = -200.0


def distiller(head, classes, methods, teacher="", **more):
    """Both detectors have `classes` classes; an empty `teacher` stands for a head of the student's kind."""
    return small_distiller(*methods, head=head, student={"head": {"num_classes": classes}},
                           teacher=teacher_entry(teacher or head, head_={"num_classes": classes}), **more)


def copy_with_second_class(one, two):
    """Copy the weights of a detector of one class to one of two, whose second class is never detected."""
    source = one.state_dict()
    for name, value in two.state_dict().items():
        if value.shape != source[name].shape:  # (anchors * classes, ...)
            parts = value.unflatten(0, (-1, 2))
            parts[:, 0] = source[name]
            parts[:, 1] = NEVER if name.endswith("bias") else 0
        else:
            value.copy_(source[name])


def batch():
    images, targets = make_batch()
    return images, [target | {"labels": target["labels"] * 0} for target in targets]


@pytest.mark.parametrize("head", HEADS)
def test_losses_are_those_of_two_classes_of_which_one_never_occurs(head):
    methods = METHODS + ([{"type": "LD", "vlr_weight": 0.25}] if head == "GFLHead" else [])
    one, two = (distiller(head, classes, methods) for classes in (1, 2))
    with torch.no_grad():
        for mine, theirs in zip([one.student, *one.teachers], [two.student, *two.teachers], strict=True):
            copy_with_second_class(mine, theirs)
        two.methods.load_state_dict(one.methods.state_dict())
    torch.manual_seed(0)  # MGD's mask
    losses = one.loss(*batch())
    torch.manual_seed(0)
    expected = two.loss(*batch())
    assert losses.keys() == expected.keys() and "loss_cwd/logits" in losses
    if head == "GFLv2":  # the quality varies over positions, so CWD sees it in the second class, too
        losses.pop("loss_cwd/logits")
    for key, value in losses.items():
        # On logits, CWD takes the mean over the channels, and those of the second class add zero.
        torch.testing.assert_close(value, expected[key] * (2 if key == "loss_cwd/logits" else 1), rtol=1e-9, atol=0)
        assert value > 0 and value.isfinite()
    assert all(g is None or g.isfinite().all() for g in gradients(one, losses).values())


@pytest.mark.parametrize("head", HEADS)
def test_what_compares_classes_with_one_another_is_refused(head):
    with pytest.raises(ConfigError, match="DKD compares classes with one another, and there is only one; use KD"):
        distiller(head, 1, [{"type": "DKD"}])
    for name in ("loss_kd", "loss_kd_vlr") if head == "GFLHead" else ():
        with pytest.raises(ConfigError, match=f"methods.0.{name}: compares classes .* only one: remove this loss"):
            distiller(head, 1, [{"type": "LD", name: {"type": "KnowledgeDistillationKLDivLoss"}}])


def test_detections_are_those_of_two_classes_of_which_one_never_occurs():
    for head in HEADS:
        one, two = (distiller(head, classes, [{"type": "PKD"}]).eval() for classes in (1, 2))
        with torch.no_grad():
            copy_with_second_class(one.student, two.student)
        for mine, theirs in zip(one.student.predict(*batch()), two.student.predict(*batch())):
            assert all(torch.equal(mine[key], theirs[key]) for key in mine) and len(mine["scores"]) > 10
