"""Properties of losses for any finite input: finite values and gradients, bounds, symmetries."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import boxes, examples, floats, tensors

import losses as L
from losses.reduce import EPS

ROWS, CLASSES = 3, 4
logits = tensors((ROWS, CLASSES), -1e4, 1e4)
labels = st.lists(st.integers(0, CLASSES), min_size=ROWS, max_size=ROWS).map(torch.tensor)
scores = tensors((ROWS,), 0, 1)
any_boxes = tensors((ROWS, 4), -1e5, 1e5)  # predictions may have no area or negative sides
dtypes = st.sampled_from([torch.float32, torch.float64])

INPUTS = {
    "FocalLoss": (logits, labels), "QualityFocalLoss": (logits, st.tuples(labels, scores)),
    "CrossEntropyLoss": (tensors((ROWS,), -1e4, 1e4), scores),
    "DistributionFocalLoss": (logits, tensors((ROWS,), 0, CLASSES - 1 - 0.1)),
    "L1Loss": (any_boxes, any_boxes), "SmoothL1Loss": (any_boxes, any_boxes),
    "KDQualityFocalLoss": (logits, logits), "KnowledgeDistillationKLDivLoss": (logits, logits),
    **{f"{name}Loss": (any_boxes | boxes(ROWS), boxes(ROWS, least=0)) for name in ("IoU", "GIoU", "DIoU", "CIoU")}}
OPTIONS = {
    "FocalLoss": {"gamma": [0.0, 0.5, 1.0, 2.0, 5.0]}, "QualityFocalLoss": {"beta": [0.0, 0.5, 1.0, 2.0]},
    "KDQualityFocalLoss": {"beta": [0.0, 0.5, 1.0, 2.0]}, "SmoothL1Loss": {"beta": [0.0, 0.11, 1.0]},
    "KnowledgeDistillationKLDivLoss": {"T": [1, 10], "class_reduction": ["sum", "mean"]},
    "IoULoss": {"mode": ["log", "linear", "square"]}}


def cast(value, dtype):
    if isinstance(value, tuple):
        return tuple(cast(v, dtype) for v in value)
    return value.to(dtype) if value.is_floating_point() else value


def test_no_loss_is_forgotten():
    assert INPUTS.keys() == L.LOSSES.keys()


@pytest.mark.parametrize("name", INPUTS)
@examples(150)
@given(data=st.data(), dtype=dtypes)
def test_value_and_gradient_are_finite_and_no_loss_is_negative(name, data, dtype):
    pred, target = (cast(data.draw(strategy), dtype) for strategy in INPUTS[name])
    options = {key: data.draw(st.sampled_from(values)) for key, values in OPTIONS.get(name, {}).items()}
    pred.requires_grad_()
    average = data.draw(floats(0, 100))
    value = L.LOSSES[name](**options)(pred, target, avg_factor=average)
    value.backward()
    assert value.isfinite() and pred.grad.isfinite().all()
    if "IoU" not in name:  # boxes with negative sides give any IoU loss; other boxes are tested below
        # a bound for the sum: an average factor of 0 divides its rounding error by 1e-7
        assert value * (average + EPS) >= -1e-5 * max(1, pred.detach().abs().max())


@examples(100)
@given(pred=tensors((2, 3, 2, 2), -1e4, 1e4), target=tensors((2, 3, 2, 2), -1e4, 1e4), constant=st.booleans(),
       dtype=dtypes)
def test_pkd_is_finite_for_constant_features_too(pred, target, constant, dtype):
    pred, target = (pred[:, :, :1, :1] * 0 + 7).expand(2, 3, 2, 2) if constant else pred, target.to(dtype)
    pred = pred.to(dtype).clone().requires_grad_()
    value = L.pkd_loss(pred, target)
    value.backward()
    assert value.isfinite() and pred.grad.isfinite().all() and value >= 0


@pytest.mark.parametrize("name, most", [
    ("iou_loss", -math.log(1e-6)), ("giou_loss", 2), ("diou_loss", 2), ("ciou_loss", 2)])
@examples(100)
@given(pred=boxes(ROWS), target=boxes(ROWS), dtype=dtypes)
def test_bounds_of_the_iou_family(name, most, pred, target, dtype):
    loss = getattr(L, name)
    value = loss(pred.to(dtype), target.to(dtype), reduction="none")
    assert (value >= -1e-5).all() and (value <= most + 1e-5).all()
    same = loss(pred.to(dtype), pred.to(dtype), reduction="none")
    assert (same.abs() < 1e-3).all()  # a box of one pixel with rounded corners


@examples(100)
@given(pred=boxes(ROWS), target=boxes(ROWS))
def test_iou_and_its_relations(pred, target):
    iou = L.aligned_iou(pred, target)
    assert (iou >= 0).all() and (iou <= 1 + 1e-12).all()
    torch.testing.assert_close(L.aligned_iou(target, pred), iou)
    torch.testing.assert_close(L.aligned_iou(pred * 4, target * 4), iou)  # independent of the unit
    torch.testing.assert_close(L.aligned_iou(pred + 64, target + 64), iou)  # and of the position
    giou, diou, ciou = (1 - loss(pred, target, reduction="none") for loss in (L.giou_loss, L.diou_loss, L.ciou_loss))
    assert (giou <= iou + 1e-6).all() and (diou <= iou + 1e-6).all() and (ciou <= diou + 1e-6).all()


@examples(100)
@given(pred=logits, target=logits, beta=st.sampled_from([1.0, 2.0]))
def test_distillation_vanishes_where_student_and_teacher_agree(pred, target, beta):
    for loss in (lambda a, b: L.kd_quality_focal_loss(a, b, beta=beta), L.kd_kl_div_loss):
        same = pred.clone().requires_grad_()
        value = loss(same, pred)
        value.backward()
        assert value.abs() < 1e-9 and same.grad.abs().max() < 1e-9
        assert loss(pred, target) >= -1e-9


@examples(50)
@given(values=tensors((5, 3), -1e4, 1e4), weight=tensors((5,), 0, 10), order=st.permutations(range(5)))
def test_reduction_does_not_depend_on_the_order_of_rows(values, weight, order):
    torch.testing.assert_close(L.reduce_loss(values[order], weight[order], avg_factor=3.0),
                               L.reduce_loss(values, weight, avg_factor=3.0), rtol=1e-9, atol=1e-6)
