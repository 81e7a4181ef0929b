"""PGD and FRS, which weigh cells by the teacher's predictions, and CWD of normalised maps: plain transcriptions.

Values and gradients are compared in float64. The transcriptions go image by image, box by box and cell by cell.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from small_models import HEADS, make_batch, small_distiller, teacher_entry

from kd.methods.pgd import gaussian_weights
from models import ConfigError

PGD_OF_HEADS = {"GFLHead": (0.04, 30), "RetinaHead": (0.04, 30), "FCOSHead": (0.04, 30), "ATSSHead": (0.08, 9)}
FRS_OF_HEADS = {"GFLHead": (0.1, 0.05), "RetinaHead": (0.005, 0.02), "FCOSHead": (0.01, 0.05), "ATSSHead": (0.01, 0.05)}


def run(method, head="GFLHead", **arguments):
    """A method, and the passes over a batch, whose features and class scores are leaves."""
    model = small_distiller(method, head=head, **arguments)
    images, targets = make_batch()
    for target in targets:  # larger boxes, with more cells
        target["boxes"] = target["boxes"] + torch.tensor([-8.0, -8.0, 16.0, 16.0])
    student, (teacher,), _ = model.passes(images, targets)
    student.features = [leaf(x) for x in student.features]
    student.outputs.cls = leaf(student.outputs.cls)
    student.outputs.cuts = {k: tuple([leaf(x) for x in tower] for tower in towers)
                            for k, towers in student.outputs.cuts.items()}
    return model.methods[0][0], student, teacher


def leaf(x):
    return x.detach().clone().requires_grad_()


def same(found, expected, leaves):
    """Values agree, and so do the gradients to all leaves."""
    assert found.dtype == torch.float64 and found > 0
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for mine, plain in zip(*(torch.autograd.grad(x, leaves, retain_graph=True) for x in (found, expected))):
        assert (mine - plain).norm() <= 1e-6 * plain.norm() and plain.norm() > 0


# --- PGD ---

def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def plain_regions(student, teacher, topk, xi):
    """Weights of the cells of one kind, and the background, as lists by image."""
    head, priors = teacher.head, teacher.head.priors(teacher.outputs)
    anchors, predicted = head.prior_generator.num_anchors, head.boxes(teacher.outputs, priors).tolist()
    points, corners = priors.centers[::anchors].tolist(), priors.cells[::anchors].tolist()
    logits, weights, background = teacher.outputs.cls.tolist(), [], []
    for i, target in enumerate(student.targets):
        height, width = (-(-side // 32) * 32 for side in target["image_size"])
        valid = [not head.restrict_to_pad or (x < width and y < height) for x, y in corners]
        best, inside_any = [0.0] * len(points), [False] * len(points)
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist()):
            quality = [max(math.exp((1 - xi) * -math.log1p(math.exp(-logits[i][p][label])))
                           * iou(box, predicted[i][p]) ** xi for p in range(c * anchors, (c + 1) * anchors))
                       for c in range(len(points))]
            order = sorted((c for c in range(len(points)) if valid[c] and quality[c] > 0), key=lambda c: -quality[c])
            chosen = order[:topk]
            for c, weight in zip(chosen, gaussian([points[c] for c in chosen])):
                if inside(points[c], box):
                    best[c] = max(best[c], weight)
            inside_any = [found or inside(point, box) for found, point in zip(inside_any, points)]
        weights.append(best)
        background.append([float(v and not found) for v, found in zip(valid, inside_any)])
    return weights, background


def inside(point, box):
    return box[0] < point[0] < box[2] and box[1] < point[1] < box[3]


def gaussian(points):
    """exp(-d^2 / 2) of each point, by the mean and the covariance of all, plus the variance of the authors' noise."""
    if not points:
        return []
    x = torch.tensor(points, dtype=torch.float64)
    offset = x - x.mean(0)
    covariance = offset.T @ offset / len(x) + torch.eye(2).double() * 0.1 ** 2 / 12
    inverse = torch.linalg.inv(covariance)
    return [math.exp(-0.5 * float(d @ inverse @ d)) for d in offset]


def plain_pgd(own, other, weights, background, settings, factor):
    """The two losses of one level, cell by cell, from maps (N, C, H, W) and lists of weights for both kinds."""
    alpha, beta, gamma, delta, temperature, across = settings
    n, c, h, w = own.shape
    cells = [(i, k) for i in range(n) for k in range(h * w)]
    s, t = own.flatten(2), other.flatten(2)
    spatial = [[h * w * (x[i].abs().mean(0) / temperature).softmax(0) for i in range(n)] for x in (s, t)]
    channel = [{(i, k): c * (x[i, :, k].abs() / temperature).softmax(0) for i, k in cells} for x in (s, t)]
    error = {(i, k): channel[1][i, k] * (s[i, :, k] - t[i, :, k]) ** 2 for i, k in cells}
    difference = {cell: (channel[0][cell] - channel[1][cell]).abs().sum() for cell in cells}

    def share(values):
        return [value / max(1, sum(v > 0 for v in values)) for value in values]

    total = [[alpha * f + beta * b for f, b in zip(share(weights[0][i]), share(background[i]))] for i in range(n)]
    cls = sum(total[j if across else i][k] * spatial[1][i][k] * error[i, k].sum()
              for i, k in cells for j in (range(n) if across else [i])) / n * factor
    cls = cls + delta * (sum(difference.values()) / (n * h * w)
                         + sum((a - b).abs().sum() for a, b in zip(*spatial)) / n)
    positive = [(i, k) for i, k in cells if weights[1][i][k] > 0]
    reg = sum(gamma * weights[1][i][k] * error[i, k].mean() + delta * difference[i, k] for i, k in positive)
    return cls, reg / max(1, len(positive))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("across", [False, True])
def test_pgd(head, across):
    alpha, topk = PGD_OF_HEADS[head]
    method, student, teacher = run({"type": "PGD", "across_images": across}, head)
    settings = alpha, alpha / 2, 1.6 * alpha, 0.0008, 0.8, across
    weights, background = zip(*(plain_regions(student, teacher, topk, xi) for xi in (0.8, 0.6)))
    found, expected, start = method(student, teacher), [0.0, 0.0], 0
    towers = student.outputs.cuts[1]
    for level, (h, w) in enumerate(teacher.outputs.sizes):
        part = slice(start, start + h * w)
        of_level = [[image[part] for image in kind] for kind in (*weights, background[0])]
        for kind, tower in enumerate(towers):
            expected[kind] += plain_pgd(tower[level], teacher.outputs.cuts[1][kind][level], of_level[:2], of_level[2],
                                        settings, 1 + level / 4)[kind]
        start += h * w
    assert sum(value > 0 for image in weights[0] for value in image) > 20
    same(found["loss_pgd_cls"], expected[0], towers[0])
    flat = [x for x, n in zip(towers[1], teacher.outputs.sizes)
            if torch.autograd.grad(expected[1], x, retain_graph=True, allow_unused=True)[0] is not None]
    same(found["loss_pgd_reg"], expected[1], flat)


def test_the_weights_of_a_region_by_hand():
    """Four corners of a square: the covariance is diagonal, with 64 + 0.01 / 12 in each direction."""
    points = torch.tensor([[x, y] for y in (8.0, 16.0, 24.0) for x in (8.0, 16.0, 24.0)]).double()
    quality = torch.zeros(1, 1, 9, dtype=torch.float64)
    quality[0, 0, [0, 2, 6, 8]] = torch.tensor([0.9, 0.8, 0.7, 0.6]).double()
    found = gaussian_weights(points, quality, 30)[0, 0]
    expected = math.exp(-64 / (64 + 0.01 / 12))
    torch.testing.assert_close(found, (quality[0, 0] > 0).double() * expected)
    assert gaussian_weights(points, quality, 1)[0, 0].tolist() == [1.0] + [0.0] * 8  # its own mean
    assert not gaussian_weights(points, quality * 0, 30).any()


@pytest.mark.parametrize("step", [(8, 0), (0, 8), (8, 8), (128, 128)])
def test_cells_on_a_line(step):
    """In float32 as well: their covariance has next to no determinant."""
    points = torch.tensor([[i * step[0] + 3, i * step[1] + 5] for i in range(9)]).double()
    quality = torch.linspace(0.1, 0.9, 9, dtype=torch.float64).view(1, 1, 9)
    expected = torch.tensor(gaussian(points.tolist())).double()
    for dtype in (torch.float64, torch.float32):
        found = gaussian_weights(points.to(dtype), quality.to(dtype), 9)[0, 0]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_pgd_of_images_without_boxes():
    """Only the background and the attentions are left."""
    model = small_distiller({"type": "PGD"})
    losses = model.loss(*make_batch(counts=(0, 0)))
    assert losses["loss_pgd_cls"] > 0 and losses["loss_pgd_reg"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_regions_of_boxes_in_runs_are_those_of_all_at_once(monkeypatch):
    method, student, teacher = run({"type": "PGD"}, "RetinaHead")
    whole = method.regions(student, teacher)
    monkeypatch.setattr("models.assigners.MAX_PAIRS", 2 * teacher.outputs.cls.shape[1] * 3)  # three boxes at a time
    assert all(torch.equal(a, b) for a, b in zip(whole, method.regions(student, teacher)))
    assert all(weight.any() for weight in whole)


@pytest.mark.parametrize("arguments, teacher, message", [
    ({"tower_convs": 3}, teacher_entry(), "tower_convs: must be from 0 to 2, the number of convolutions in the stude"),
    ({"level_weights": [1.0, 2.0]}, teacher_entry(), "level_weights: must have one entry per level, 5 in total"),
    ({}, teacher_entry(head_={"num_classes": 7}), "has 3 classes and the teacher 7; give the teacher a class_map"),
    ({}, teacher_entry(neck={"num_outs": 4}, head_={"anchor_generator": {
        "type": "AnchorGenerator", "ratios": [1.0], "scales": [8], "strides": [8, 16, 32, 64]}}), "their strides are")])
def test_pgd_refuses(arguments, teacher, message):
    with pytest.raises(ConfigError, match=message):
        small_distiller({"type": "PGD", **arguments}, teacher=teacher)


def test_pgd_on_the_necks_outputs():
    method, student, teacher = run({"type": "PGD", "tower_convs": 0})
    assert student.outputs.cuts[0][0][0].shape == student.features[0].shape
    assert all(value > 0 for value in method(student, teacher).values())


# --- FRS ---

@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("width", [16, 24])
def test_frs(head, width):
    feat, cls = FRS_OF_HEADS[head]
    method, student, teacher = run({"type": "FRS"}, head, teacher=teacher_entry(head, width=width))
    expected, start, anchors = [0.0, 0.0], 0, teacher.head.prior_generator.num_anchors
    for level, (h, w) in enumerate(teacher.outputs.sizes):
        mimicked = F.conv2d(student.features[level], method.align[level].weight, method.align[level].bias, padding=1)
        total, sums = 0.0, [0.0, 0.0]
        for i in range(2):
            for k in range(h * w):
                rows = slice(start + k * anchors, start + (k + 1) * anchors)
                own, other = student.outputs.cls[i, rows].sigmoid(), teacher.outputs.cls[i, rows].sigmoid()
                mask = float(other.max())
                error = (mimicked[i, :, k // w, k % w] - teacher.features[level][i, :, k // w, k % w]) ** 2
                entropy = -(other * own.log() + (1 - other) * (1 - own).log())
                total, sums = total + mask, [sums[0] + mask * error.sum(), sums[1] + mask * entropy.sum()]
        expected = [expected[0] + feat * sums[0] / total, expected[1] + cls * sums[1] / total]
        start += h * w * anchors
    found = method(student, teacher)
    same(found["loss_frs_feat"], expected[0], [*student.features, *method.align.parameters()])
    same(found["loss_frs_cls"], expected[1], [student.outputs.cls])


def test_a_weight_of_zero_omits_a_part_of_frs():
    for argument, left in (("distill_feat_weight", "loss_frs_cls"), ("distill_cls_weight", "loss_frs_feat")):
        model = small_distiller({"type": "FRS", argument: 0.0})
        assert {key for key in model.loss(*make_batch()) if "frs" in key} == {left}
        assert bool(list(model.methods.parameters())) == (left == "loss_frs_feat")


@pytest.mark.parametrize("arguments, head, message", [
    ({"distill_feat_weight": 0.0, "distill_cls_weight": 0.0}, "GFLHead", "FRS has no loss"),
    ({"distill_feat_weight": 0.0, "levels": [0]}, "GFLHead", "levels: .* distill_feat_weight 0 omits them"),
    ({}, "ATSSHead", "FRS with distill_cls_weight above 0 compares predictions")])
def test_frs_refuses(arguments, head, message):
    with pytest.raises(ConfigError, match=message):
        small_distiller({"type": "FRS", **arguments}, teacher=teacher_entry(head))


def test_frs_of_some_levels():
    method, student, teacher = run({"type": "FRS", "levels": [1, 3], "distill_cls_weight": 0.0}, "FCOSHead",
                                   teacher=teacher_entry("RetinaHead"))
    gradients = torch.autograd.grad(method(student, teacher)["loss_frs_feat"], student.features, allow_unused=True)
    assert [g is not None for g in gradients] == [False, True, False, True, False]


def test_frs_weighs_each_map_by_the_scores_of_its_own_level():
    """The teacher's levels have other numbers than the student's levels of the same strides."""
    anchors = {"type": "AnchorGenerator", "ratios": [1.0], "octave_base_scale": 8, "scales_per_octave": 1,
               "strides": [4, 8, 16, 32, 64]}
    method, student, teacher = run({"type": "FRS", "distill_cls_weight": 0.0}, teacher=teacher_entry(
        neck={"start_level": 0}, head_={"anchor_generator": anchors}))
    expected, scores = 0.0, teacher.outputs.cls.sigmoid().amax(-1).split([h * w for h, w in teacher.outputs.sizes], 1)
    for level in range(4):
        mask = scores[level + 1].view(2, *teacher.outputs.sizes[level + 1])
        mimicked = F.conv2d(student.features[level], method.align[level].weight, method.align[level].bias, padding=1)
        error = (mimicked - teacher.features[level + 1]).square().sum(1)
        expected += 0.1 * (mask * error).sum() / mask.sum()
    same(method(student, teacher)["loss_frs_feat"], expected, student.features[:4])


# --- CWD of normalised maps ---

@pytest.mark.parametrize("width", [16, 24])
def test_cwd_of_normalised_maps(width):
    """The recipe of DAMO-YOLO: one batch norm without weights, in training, for both maps; then the divergence."""
    method, student, teacher = run({"type": "CWD", "norm": True, "loss_weight": 1.0},
                                   teacher=teacher_entry(width=width))
    norm, expected = torch.nn.BatchNorm2d(width, affine=False).double(), 0.0
    for adapt, own, other in zip(method.pairs.adapters, student.features, teacher.features):
        own = own if width == 16 else F.conv2d(own, adapt.weight, adapt.bias)
        p, q = norm(other).flatten(2).softmax(-1), norm(own).flatten(2).softmax(-1)
        expected += (p * (p.log() - q.log())).sum() / own.shape[0] / own.shape[1]
    # The last map has a single cell, whose distribution is always 1.
    same(method(student, teacher)["loss_cwd"], expected, student.features[:-1])


def test_a_single_cell_of_one_image_has_no_divergence():
    model = small_distiller({"type": "CWD", "norm": True, "levels": [4]})
    losses = model.loss(*make_batch(sizes=((64, 64),), counts=(2,)))
    assert losses["loss_cwd"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_statistics_of_all_processes_need_the_norm():
    with pytest.raises(ConfigError, match="sync_stats: is about the statistics that norm needs"):
        small_distiller({"type": "CWD", "sync_stats": True})


@pytest.mark.parametrize("argument", [{"levels": [0]}, {"student_modules": ["neck.fpn_convs.0.conv"]},
                                      {"teacher_modules": ["neck.fpn_convs.0.conv"]}, {"adapter_kernel": 3}])
def test_cwd_on_scores_takes_no_choice_of_maps(argument):
    with pytest.raises(ConfigError, match=f"CWD on logits compares the scores of all levels: .*{[*argument][0]}"):
        small_distiller({"type": "CWD", "on": "logits", **argument})
