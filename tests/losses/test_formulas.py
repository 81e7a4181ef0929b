"""Losses agree with their formulas, also at edge cases and in every precision."""
import math

import pytest
import torch
import torch.nn.functional as F

import losses as L

K = 5


def case(name, n=12, dtype=torch.float32, scale=1.0):
    """The prediction and target of a loss, with one entry per row."""
    torch.manual_seed(0)

    def boxes():
        corner = 20 * torch.rand(n, 2)
        return torch.cat([corner, corner + 1 + 20 * torch.rand(n, 2)], dim=1)

    labels = torch.arange(n) % (K + 1)
    logits, teacher = 3 * scale * torch.randn(n, K), 3 * scale * torch.randn(n, K)
    targets = {
        "FocalLoss": (logits, labels), "QualityFocalLoss": (logits, (labels, torch.rand(n))),
        "CrossEntropyLoss": (logits[:, 0], torch.rand(n)), "DistributionFocalLoss": (logits, 3.9 * torch.rand(n)),
        "L1Loss": (scale * boxes(), boxes()), "SmoothL1Loss": (scale * boxes(), boxes()),
        "KDQualityFocalLoss": (logits, teacher), "KnowledgeDistillationKLDivLoss": (logits, teacher)}
    pred, target = targets.get(name) or (scale * boxes(), boxes())

    def cast(value):
        return value.to(dtype) if value.is_floating_point() else value

    return cast(pred), tuple(map(cast, target)) if isinstance(target, tuple) else cast(target)


every_loss = pytest.mark.parametrize("name", [name for name in L.LOSSES if name != "PKDLoss"])


@every_loss
def test_reductions(name):
    loss, (pred, target) = L.LOSSES[name](), case(name, dtype=torch.float64)
    rows = loss(pred, target, reduction="none")
    assert rows.shape[0] == len(pred) and rows.shape in (pred.shape, pred.shape[:1])
    torch.testing.assert_close(loss(pred, target, reduction="sum"), rows.sum())
    torch.testing.assert_close(loss(pred, target), rows.mean())
    # mmdet adds the machine epsilon of float32 to the divisor
    for factor in (7.0, torch.tensor(7.0, dtype=torch.float64)):
        expected = rows.sum() / (7.0 + torch.finfo(torch.float32).eps)
        torch.testing.assert_close(loss(pred, target, avg_factor=factor), expected, rtol=1e-12, atol=0)


@every_loss
def test_weight_is_per_row_and_scales_with_loss_weight(name):
    pred, target = case(name, dtype=torch.float64)
    weight = torch.arange(len(pred), dtype=torch.float64)
    if name in ("L1Loss", "SmoothL1Loss"):
        weight = weight.unsqueeze(1).expand(-1, 4)  # may differ between sides
    rows = L.LOSSES[name](loss_weight=1.0)(pred, target, reduction="none")
    by_row = rows.flatten(1).sum(1) if rows.dim() > 1 else rows
    expected = 3 * (by_row * torch.arange(len(pred))).sum()
    torch.testing.assert_close(L.LOSSES[name](loss_weight=3.0)(pred, target, weight, reduction="sum"), expected)


@every_loss
def test_zero_weight_gives_zero_and_no_gradient(name):
    pred, target = case(name)
    pred.requires_grad_()
    value = L.LOSSES[name]()(pred, target, torch.zeros(len(pred)), avg_factor=1.0)
    value.backward()
    assert value == 0 and not pred.grad.any()


def test_a_weight_per_row_is_a_weight_for_each_of_its_entries():
    torch.manual_seed(0)
    pred, labels, weight = torch.randn(3, 6, K), torch.arange(18).view(3, 6) % (K + 1), torch.rand(3, 6)
    per_entry = L.sigmoid_focal_loss(pred, labels, weight.unsqueeze(-1).expand(-1, -1, K))
    torch.testing.assert_close(L.sigmoid_focal_loss(pred, labels, weight), per_entry)


@every_loss
def test_bad_reduction(name):
    loss, (pred, target) = L.LOSSES[name](), case(name)
    with pytest.raises(ValueError, match='avg_factor.*"sum"'):
        loss(pred, target, reduction="sum", avg_factor=2.0)
    with pytest.raises(ValueError, match='"avg"'):
        loss(pred, target, reduction="avg")


@every_loss
@pytest.mark.parametrize("scale", [0.0, 1e4, -1e4])
def test_extreme_predictions_stay_finite(name, scale):
    pred, target = case(name, scale=scale)
    pred.requires_grad_()
    value = L.LOSSES[name]()(pred, target)
    value.backward()
    assert value.isfinite() and pred.grad.isfinite().all()


@every_loss
def test_identical_prediction_and_degenerate_boxes_stay_finite(name):
    pred, target = case(name)
    if pred.shape[-1] == 4:
        pred = target.clone()
        pred[0, 2:] = pred[0, :2]  # no area
        pred[1, :2], pred[1, 2:] = target[1, 2:], target[1, :2]  # corners swapped
    elif isinstance(target, torch.Tensor) and target.shape == pred.shape:
        pred = target.clone()
    pred.requires_grad_()
    value = L.LOSSES[name]()(pred, target)
    value.backward()
    assert value.isfinite() and pred.grad.isfinite().all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_precision(name, dtype):
    loss, (pred, target) = L.LOSSES[name](), case(name, dtype=dtype)
    pred.requires_grad_()
    value = loss(pred, target)
    value.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert pred.grad.dtype == dtype and pred.grad.isfinite().all()

    def wide(x):
        return x.detach().to(value.dtype) if x.is_floating_point() else x

    # Nothing is computed in half precision: the result is the same as for promoted inputs.
    target = tuple(map(wide, target)) if isinstance(target, tuple) else wide(target)
    torch.testing.assert_close(value, loss(wide(pred), target), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["KDQualityFocalLoss", "KnowledgeDistillationKLDivLoss"])
def test_a_teacher_gets_no_gradient(name):
    pred, target = case(name)
    target.requires_grad_()
    L.LOSSES[name]()(pred.requires_grad_(), target).backward()
    assert target.grad is None and pred.grad.any()


@pytest.mark.parametrize("alpha", [0.25, 0.3])  # 0.3 is not a binary fraction
def test_sigmoid_focal_loss_by_its_equation(alpha):
    pred, labels = case("FocalLoss", dtype=torch.float64)
    expected = torch.zeros_like(pred)
    for i, label in enumerate(labels.tolist()):
        for k in range(K):
            p = torch.sigmoid(pred[i, k])
            expected[i, k] = -((alpha * (1 - p) ** 2 * p.log()) if k == label else (1 - alpha) * p ** 2 * (1 - p).log())
    found = L.sigmoid_focal_loss(pred, labels, alpha=alpha, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_focal_loss_with_gamma_zero_is_weighted_cross_entropy():
    pred, labels = case("FocalLoss", dtype=torch.float64)
    target = F.one_hot(labels, K + 1)[:, :K].double()
    expected = 0.5 * F.binary_cross_entropy_with_logits(pred, target)
    torch.testing.assert_close(L.sigmoid_focal_loss(pred, labels, gamma=0.0, alpha=0.5), expected)


def test_quality_focal_loss_by_its_equation():
    pred, (labels, score) = case("QualityFocalLoss", dtype=torch.float64)
    expected = torch.zeros(len(pred), dtype=torch.float64)
    for i, label in enumerate(labels.tolist()):
        for k in range(K):
            quality, p = score[i] if k == label else torch.zeros(()), torch.sigmoid(pred[i, k])
            entropy = -(1 - quality) * (1 - p).log() - quality * p.log()
            expected[i] += (quality - p).abs() ** 2 * entropy
    torch.testing.assert_close(L.quality_focal_loss(pred, (labels, score), reduction="none"), expected)


def test_kd_quality_focal_loss_vanishes_where_student_and_teacher_agree():
    pred, target = case("KDQualityFocalLoss", dtype=torch.float64)
    assert L.kd_quality_focal_loss(target, target).item() == 0
    p, t = pred.sigmoid(), target.sigmoid()
    expected = -(p - t).abs() * (t * p.log() + (1 - t) * (1 - p).log())
    torch.testing.assert_close(L.kd_quality_focal_loss(pred, target, reduction="none"), expected)


@pytest.mark.parametrize("classes, factor", [("sum", 1.0), ("mean", 1 / K)])
def test_kl_divergence(classes, factor):
    pred, target = case("KnowledgeDistillationKLDivLoss", dtype=torch.float64)
    p, t = (pred / 4).softmax(-1), (target / 4).softmax(-1)
    expected = 16 * factor * (t * (t / p).log()).sum(-1)
    torch.testing.assert_close(
        L.kd_kl_div_loss(pred, target, T=4.0, class_reduction=classes, reduction="none"), expected)
    assert abs(L.kd_kl_div_loss(target, target, T=4.0, class_reduction=classes).item()) < 1e-12


def test_kl_divergence_refuses_bad_arguments():
    with pytest.raises(ValueError, match="class_reduction"):
        L.kd_kl_div_loss(torch.zeros(1, 2), torch.zeros(1, 2), class_reduction="max")
    with pytest.raises(ValueError, match="T must be"):
        L.KnowledgeDistillationKLDivLoss(T=0.5)


def test_smooth_l1():
    pred, target = case("SmoothL1Loss", dtype=torch.float64)
    torch.testing.assert_close(L.smooth_l1_loss(pred, target, beta=0.0), L.l1_loss(pred, target))
    for beta in (0.11, 1.0, 5.0):
        torch.testing.assert_close(L.smooth_l1_loss(pred, target, beta=beta), F.smooth_l1_loss(pred, target, beta=beta))


def test_dfl_at_whole_distances_is_cross_entropy_to_that_bin():
    pred = case("DistributionFocalLoss", dtype=torch.float64)[0]
    bins = torch.arange(len(pred)) % (K - 1)
    expected = F.cross_entropy(pred, bins, reduction="none")
    torch.testing.assert_close(L.distribution_focal_loss(pred, bins.double(), reduction="none"), expected)
    halfway = (expected + F.cross_entropy(pred, bins + 1, reduction="none")) / 2
    torch.testing.assert_close(L.distribution_focal_loss(pred, bins + 0.5, reduction="none"), halfway)


# A box with side 2; others: overlap of half its area (IoU 1/3), disjoint, same centre and side 1 (IoU 1/4).
BOX = torch.tensor([0.0, 0, 2, 2], dtype=torch.float64)
HALF, AWAY, INNER = (torch.tensor(x, dtype=torch.float64) for x in ([1, 0, 3, 2], [6, 0, 8, 2], [0.5, 0.5, 1.5, 1.5]))


@pytest.mark.parametrize("loss, other, expected", [
    (L.iou_loss, BOX, 0.0), (L.iou_loss, HALF, math.log(3)), (L.iou_loss, AWAY, -math.log(1e-6)),
    (L.giou_loss, BOX, 0.0), (L.giou_loss, HALF, 1 - 1 / 3), (L.giou_loss, AWAY, 1 + 8 / 16),
    (L.giou_loss, INNER, 1 - 1 / 4),
    (L.diou_loss, BOX, 0.0), (L.diou_loss, HALF, 1 - 1 / 3 + 1 / 13), (L.diou_loss, AWAY, 1 + 36 / 68),
    (L.diou_loss, INNER, 1 - 1 / 4),
    (L.ciou_loss, BOX, 0.0), (L.ciou_loss, HALF, 1 - 1 / 3 + 1 / 13), (L.ciou_loss, INNER, 1 - 1 / 4),
])
def test_iou_family_by_hand(loss, other, expected):
    assert loss(BOX, other).item() == pytest.approx(expected, abs=1e-6)


def test_ciou_adds_the_aspect_term():
    wide = torch.tensor([0.0, 0.25, 2, 1.75], dtype=torch.float64)  # IoU 3/4, the same centre
    v = 4 / math.pi ** 2 * (math.atan(1) - math.atan(2 / 1.5)) ** 2
    assert L.ciou_loss(wide, BOX).item() == pytest.approx(1 - 0.75 + v * v / (0.25 + v), abs=1e-6)


@pytest.mark.parametrize("mode, expected", [("linear", 2 / 3), ("square", 8 / 9), ("log", math.log(3))])
def test_iou_loss_modes(mode, expected):
    assert L.IoULoss(mode=mode)(BOX, HALF).item() == pytest.approx(expected)


def test_iou_loss_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match="cubic"):
        L.iou_loss(BOX, HALF, mode="cubic")


@pytest.mark.parametrize("name", ["FocalLoss", "QualityFocalLoss", "CrossEntropyLoss", "KDQualityFocalLoss"])
def test_softmax_variants_are_refused(name):
    with pytest.raises(ValueError, match="use_sigmoid"):
        L.LOSSES[name](use_sigmoid=False)


def test_mean_over_processes_of_one_is_the_value_without_gradient():
    value = torch.tensor(3.0, requires_grad=True)
    mean = L.mean_over_processes(value)
    assert mean.item() == 3 and not mean.requires_grad


def test_normalised_channels_are_those_of_a_batch_norm():
    x = (3 * torch.randn(2, 4, 5, 6, dtype=torch.float64) + 1).requires_grad_()
    x.data[:, 3] = 2.0  # a constant channel
    weight, norm = torch.randn(2, 4, 5, 6).double(), torch.nn.BatchNorm2d(4, affine=False).double()
    found, expected = L.normalised_channels(x), norm(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    mine, theirs = (torch.autograd.grad((value * weight)[:, :3].sum(), x)[0] for value in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert not L.normalised_channels(torch.ones(1, 4, 1, 1)).any()  # a batch norm refuses this
