"""BCKD, LD's part on classes, and GI against plain transcriptions in float64: values and gradients."""
import math

import pytest
import torch
import torch.nn.functional as F
from small_models import make_batch, small_config, small_distiller, teacher_entry
from torchvision.ops import nms

from kd import build_distiller
from models import ConfigError

HEADS = ["GFLHead", "RetinaHead", "ATSSHead", "FCOSHead"]
KL = {"type": "KnowledgeDistillationKLDivLoss", "loss_weight": 10, "T": 2}


def run(method, head="GFLHead", batch=None, **arguments):
    """A method's losses, and the passes that it saw."""
    model = small_distiller(method, head=head, **arguments)
    student, (teacher,), _ = model.passes(*(batch or make_batch()))
    return model.methods[0][0](student, teacher), student, teacher


def same(found, expected, seen, leaves):
    """The values, and the gradients of tensors `seen` and of their copies `leaves`, are equal."""
    assert found.dtype == torch.float64 and expected.item() > 0
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    grads, wanted = (torch.autograd.grad(value, tensors, allow_unused=True, retain_graph=True)
                     for value, tensors in ((found, seen), (expected, leaves)))
    for grad, want in zip(grads, wanted, strict=True):
        if want is None:
            assert grad is None or not grad.any()
        else:
            assert (grad - want).abs().max() < 1e-6 * want.abs().max() and want.any()


def copies(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def decoded(box, head, priors, p):
    """The corners of one box, for GFL with plain sums; a tensor (4,)."""
    if type(head).__name__ != "GFLHead":
        return head.decode(box.view(1, 1, -1), priors.take(torch.tensor([p]))).view(4)
    (x, y), stride, bins = priors.centers[p].tolist(), float(priors.strides[p]), head.reg_max + 1
    sides = []
    for k in range(4):
        e = box[k * bins:(k + 1) * bins].exp()
        sides.append(sum(i * e[i] for i in range(bins)) / e.sum() * stride)
    return torch.stack([x - sides[0], y - sides[1], x + sides[2], y + sides[3]])


def giou(a, b):
    inter = (torch.min(a[2], b[2]) - torch.max(a[0], b[0])).clamp(min=0) \
        * (torch.min(a[3], b[3]) - torch.max(a[1], b[1])).clamp(min=0)
    union = ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter).clamp(min=1e-6)
    whole = (torch.max(a[2], b[2]) - torch.min(a[0], b[0])) * (torch.max(a[3], b[3]) - torch.min(a[1], b[1]))
    return inter / union - (whole.clamp(min=1e-6) - union) / whole.clamp(min=1e-6)


def level_of(priors):
    return [level for level, size in enumerate(priors.level_sizes) for _ in range(size)]


def plain_bckd(student, teacher, cls, box, only=False, beta=1.0):
    """Sums over anchors and classes, before the weights: of the class loss and of the box loss."""
    assignment, level = student.assignment, level_of(student.assignment.priors)
    present = {level[p] for _, p in assignment.positive.nonzero().tolist()}
    classes = boxes = 0.0
    for i in range(cls.shape[0]):
        for p in range(cls.shape[1]):
            weight = float(assignment.label_weights[i, p])
            if weight == 0 or only and level[p] not in present:
                continue
            gap = 0.0
            for s, t in zip(cls[i, p], teacher.outputs.cls[i, p].tolist()):
                t, score = 1 / (1 + math.exp(-t)), 1 / (1 + (-s).exp())
                classes += weight * (t - score).abs() ** beta * -(t * score.log() + (1 - t) * (1 - score).log())
                gap = max(gap, abs(t - score.item()))
            own = decoded(box[i, p], student.head, assignment.priors, p)
            other = decoded(teacher.outputs.box[i, p], teacher.head, assignment.priors, p)
            boxes += weight * gap * (1 - giou(own, other))
    counts = [int(row.sum()) for row in assignment.positive]  # FCOS counts at least one in all, the others per image
    fcos = type(student.head).__name__ == "FCOSHead"
    number = max(1, sum(counts)) if fcos else sum(max(1, count) for count in counts)
    return classes / number, boxes / number


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_bckd(head, only):
    batch = make_batch(sizes=((64, 96), (20, 30)), counts=(3, 0), ignored=1)
    losses, student, teacher = run({"type": "BCKD", "only_levels_with_positives": only}, head, batch)
    assert losses.keys() == {"loss_cls_kd", "loss_reg_kd"}
    assert bool((student.assignment.label_weights == 0).any()) == (head != "FCOSHead")
    cls, box = copies(student.outputs.cls, student.outputs.box)
    classes, boxes = plain_bckd(student, teacher, cls, box, only)
    seen = [student.outputs.cls, student.outputs.box]
    same(losses["loss_cls_kd"], classes, seen, [cls, box])
    same(losses["loss_reg_kd"], 4.0 * boxes, seen, [cls, box])


def test_levels_without_positives_are_left_out_only_if_asked_for():
    every, only = (run({"type": "BCKD", "only_levels_with_positives": value})[0] for value in (False, True))
    assert all(0 < only[key] < every[key] for key in every)
    empty = make_batch(counts=(0, 0))
    every, only = (run({"type": "BCKD", "only_levels_with_positives": value}, batch=empty)[0]
                   for value in (False, True))
    assert all(only[key] == 0 < every[key] for key in every)


def test_bckd_with_other_losses_and_another_number_of_bins():
    """Only decoded boxes are compared, so two GFL heads may have different numbers of bins."""
    method = {"type": "BCKD", "loss_kd": {"type": "KDQualityFocalLoss", "beta": 2.0, "loss_weight": 3.0},
              "loss_score_kd": {"type": "DIoULoss", "loss_weight": 2.0}}
    losses, student, teacher = run(method, teacher=teacher_entry(head_={"reg_max": 5}))
    assert student.outputs.box.shape[-1] == 36 and teacher.outputs.box.shape[-1] == 24
    cls, box = copies(student.outputs.cls, student.outputs.box)
    classes, _ = plain_bckd(student, teacher, cls, box, beta=2.0)
    same(losses["loss_cls_kd"], 3.0 * classes, [student.outputs.cls], [cls])
    assert losses["loss_reg_kd"] > 0


def test_the_defaults_of_bckd_are_those_of_its_code():
    method = small_distiller({"type": "BCKD"}).methods[0][0]
    assert method.weights() == {"loss_kd": 1.0, "loss_score_kd": 4.0} and method.loss_kd.beta == 1
    assert type(method.loss_score_kd).__name__ == "GIoULoss" and not method.only_levels_with_positives


def plain_classes(student, teacher, cls, chosen, T):
    """KL divergence of softmaxes times T^2, the mean over classes and over each level's chosen anchors."""
    level, total = level_of(student.assignment.priors), 0.0
    for each in set(level):
        anchors = [(i, p) for i, p in chosen if level[p] == each]
        for i, p in anchors:
            s, t = cls[i, p] / T, teacher.outputs.cls[i, p] / T
            q, r = s.exp() / s.exp().sum(), (t.exp() / t.exp().sum()).tolist()
            kl = sum(r[k] * (math.log(r[k]) - q[k].log()) for k in range(len(r))) / len(r)
            total += T * T * kl / len(anchors)
    return total


def test_the_classes_of_ld():
    """Main KD and VLR KD of LD: each level counts alike, however many anchors it has."""
    method = {"type": "LD", "loss_kd": KL, "loss_kd_vlr": KL | {"loss_weight": 3.0, "T": 4.0}}
    images, targets = make_batch(sizes=((192, 224), (90, 100)), counts=(4, 2))
    targets[0]["boxes"][2:] = torch.tensor([[8.0, 8.0, 130.0, 150.0], [20.0, 12.0, 220.0, 190.0]])
    model = small_distiller(method)
    student, (teacher,), _ = model.passes(images, targets)
    losses = model.methods[0][0](student, teacher)
    assert losses.keys() == {"loss_ld", "loss_kd", "loss_kd_vlr"}
    region = (model.methods[0][0].valuable_region(student) > 0).nonzero().tolist()
    positives, level = student.assignment.positive.nonzero().tolist(), level_of(student.assignment.priors)
    assert len({level[p] for _, p in positives}) > 1 and len({level[p] for _, p in region}) > 1
    for name, chosen, weight, T in (("loss_kd", positives, 10, 2.0), ("loss_kd_vlr", region, 3, 4.0)):
        cls, = copies(student.outputs.cls)
        same(losses[name], weight * plain_classes(student, teacher, cls, chosen, T), [student.outputs.cls], [cls])


def test_the_parts_of_ld_do_not_change_each_other():
    whole = run({"type": "LD", "vlr_weight": 0.25, "loss_kd": KL, "loss_kd_vlr": KL})[0]
    assert whole.keys() == {"loss_ld", "loss_ld_vlr", "loss_kd", "loss_kd_vlr"}
    for part in ({}, {"vlr_weight": 0.25}, {"loss_kd": KL}, {"loss_kd_vlr": KL}):
        losses = run({"type": "LD"} | part)[0]
        assert len(losses) == 1 + len(part) and all(torch.equal(losses[key], whole[key]) for key in losses)
    assert run({"type": "LD", "loss_kd": KL, "loss_kd_vlr": KL}, batch=make_batch(counts=(0, 0)))[0]["loss_kd"] == 0


def gi_cells(student, teacher, top, iou_threshold):
    """Indices of LD's code among the anchors of all images, for each level: NMS of torchvision on the GI boxes."""
    priors, found, start = student.assignment.priors, [], 0
    for size in priors.level_sizes:
        scores, boxes = [], []
        for i in range(student.outputs.cls.shape[0]):
            for p in range(start, start + size):
                own, other = ([1 / (1 + math.exp(-v)) for v in seen.outputs.cls[i, p].tolist()]
                              for seen in (student, teacher))
                gaps = [b - a for a, b in zip(own, other)]
                best = max(range(len(gaps)), key=lambda k: abs(gaps[k]))
                seen = teacher if gaps[best] >= 0 else student
                scores.append(abs(gaps[best]))
                boxes.append(decoded(seen.outputs.box[i, p].detach(), seen.head, priors, p))
        found.append(nms(torch.stack(boxes), torch.tensor(scores, dtype=torch.float64), iou_threshold)[:top])
        start += size
    return found


@pytest.mark.parametrize("options", [{}, {"top": 4, "iou_threshold": 0.05, "loss_weight": 1.5},
                                     {"only_levels_with_positives": False}], ids=lambda o: "-".join(o) or "defaults")
@pytest.mark.parametrize("head, width", [("GFLHead", 16), ("RetinaHead", 16), ("ATSSHead", 24), ("FCOSHead", 16)])
def test_gi(head, width, options):
    model = small_distiller({"type": "GI", **options}, head=head, teacher=teacher_entry(head, width=width))
    student, (teacher,), _ = model.passes(*make_batch())
    student.features = copies(*student.features)  # one level is computed from another
    method, found = model.methods[0][0], model.methods[0][0](student, teacher)["loss_im"]
    settings = {"top": 10, "iou_threshold": 0.3, "loss_weight": 2.0, "only_levels_with_positives": True} | options
    anchors, leaves = student.head.prior_generator.num_anchors, copies(*student.features)
    level, total, suppressed = level_of(student.assignment.priors), 0.0, 0
    present = {level[p] for _, p in student.assignment.positive.nonzero().tolist()}
    cells = gi_cells(student, teacher, settings["top"], settings["iou_threshold"])
    chosen, real = method.choose(student, teacher)
    for number, (own, other, adapt) in enumerate(zip(leaves, teacher.features, method.pairs.adapters, strict=True)):
        assert chosen[number, :int(real[number].sum())].tolist() == cells[number].tolist()
        suppressed += len(cells[number]) < min(settings["top"], own.shape[0] * own[0, 0].numel() * anchors)
        if settings["only_levels_with_positives"] and number not in present:
            continue
        own = F.conv2d(own, adapt.weight, adapt.bias) if width == 24 else own
        own, other = (x.permute(0, 2, 3, 1).reshape(-1, width)[cells[number] // anchors] for x in (own, other))
        total = total + ((own - other) ** 2).sum() / own.numel()
    assert suppressed and len(present) < 5
    same(found, settings["loss_weight"] * total, student.features, leaves)


def test_gi_without_boxes():
    """Without any positive, GI of the authors' code has no loss; over all levels it still has one."""
    empty = make_batch(counts=(0, 0))
    found = [run({"type": "GI", "only_levels_with_positives": only}, batch=empty)[0]["loss_im"]
             for only in (True, False)]
    assert found[0] == 0 < found[1] and found[0].requires_grad


@pytest.mark.parametrize("method, student, teacher, message", [
    ({"type": "BCKD"}, "GFLHead", teacher_entry("ATSSHead"), "BCKD compares predictions one by one.*the class times"),
    ({"type": "BCKD"}, "RetinaHead", teacher_entry("ATSSHead"), "number of anchors per cell is 9, the teacher's 1"),
    ({"type": "BCKD"}, "GFLHead", teacher_entry(head_={"num_classes": 4}), "class_map"),
    ({"type": "BCKD", "loss_kd": {"type": "FocalLoss"}}, "GFLHead", teacher_entry(), "loss_kd.type: .*KDQualityFocal"),
    ({"type": "BCKD", "loss_score_kd": KL}, "GFLHead", teacher_entry(), "loss_score_kd.type: .* use IoULoss, GIoU"),
    ({"type": "BCKD", "loss_kd": None}, "GFLHead", teacher_entry(), "loss_kd"),
    ({"type": "GI"}, "FCOSHead", teacher_entry("GFLHead"), "GI compares predictions one by one"),
    ({"type": "GI", "iou_threshold": 1.5}, "GFLHead", teacher_entry(), "iou_threshold: must be a number from 0 to 1|0"),
    ({"type": "LD", "loss_kd": {"type": "KDQualityFocalLoss"}}, "GFLHead", teacher_entry(), "loss_kd.type"),
    ({"type": "LD", "loss_kd": {"type": KL["type"], "T": 0.5}}, "GFLHead", teacher_entry(), "loss_kd.T"),
])
def test_what_makes_no_sense_is_refused(method, student, teacher, message):
    with pytest.raises(ConfigError, match=message) as error:
        build_distiller({"model": small_config(student), "distill": {"teacher": teacher, "methods": [method]}})
    assert str(error.value).startswith("distill.methods.0") and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", [{"type": "BCKD"}, {"type": "GI"},
                                    {"type": "LD", "loss_kd": KL, "loss_kd_vlr": KL, "vlr_weight": 0.25}],
                         ids=lambda m: m["type"])
def test_mixed_precision(method, dtype):
    """Under autocast the losses are float32 and near those without it; all gradients are finite."""
    model = small_distiller(method, dtype=torch.float32)
    images, targets = make_batch(dtype=torch.float32)
    expected = model.loss(images, targets)
    with torch.autocast("cpu", dtype):
        losses = model.loss(images, targets)
    for key in losses.keys() - {"loss_im"}:  # GI chooses other cells after rounding
        torch.testing.assert_close(losses[key], expected[key], rtol=0.1, atol=1e-3)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
