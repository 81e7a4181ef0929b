"""CrossKD between heads of different kinds, against a plain transcription in float64; and what refuses such pairs."""
import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from small_models import falls, make_batch, small_distiller, teacher_entry

from models import ConfigError

ONE_ANCHOR = {"type": "AnchorGenerator", "ratios": [1.0], "octave_base_scale": 8, "scales_per_octave": 1,
              "strides": [8, 16, 32, 64, 128]}
KINDS = {"GFL": ("GFLHead", {}), "ATSS": ("ATSSHead", {}), "FCOS": ("FCOSHead", {}), "Retina9": ("RetinaHead", {}),
         "Retina1": ("RetinaHead", {"anchor_generator": ONE_ANCHOR})}
PAIRS = list(permutations(KINDS, 2))
SIZES = ((64, 96), (64, 30))  # the second image ends at x = 32, so most heads ignore the cells to the right of it


def batch():
    """Two images; one box has an IoU of 0.45 with some anchors of a 9-anchor RetinaNet, which ignores them then."""
    images, targets = make_batch(SIZES, counts=(4, 1))
    targets[0]["boxes"][0] = torch.tensor([20.0, 16.0, 52.0, 48.0])
    return images, targets


def distiller(student, teacher, method=None, width=16, **options):
    (head, more), (other, its) = KINDS[student], KINDS[teacher]
    return small_distiller(method or {"type": "CrossKD", "reused_teacher_head_idx": 1}, head=head,
                           student={"head": more}, teacher=teacher_entry(other, head_=its, width=width), **options)


# --- the transcription ---

def through_the_teacher(method, student, teacher):
    """The teacher's last maps (classification tower, regression tower) of every level, from the student's features."""
    towers = []
    for side, convs in enumerate((teacher.head.cls_convs, teacher.head.reg_convs)):
        maps = []
        for own, other in zip(student.outputs.cuts[1][side], teacher.outputs.cuts[1][side]):
            if own.shape[1] != other.shape[1]:
                own = F.conv2d(own, method.adapters[side].weight, method.adapters[side].bias)
            channels = []
            for k in range(other.shape[1]):
                mine, its = own[:, k], other[:, k]
                channels.append((mine - mine.mean()) / (mine.std() + 1e-6) * its.std() + its.mean())
            x = torch.stack(channels, 1).clamp(min=0)
            for conv in list(convs)[1:]:
                x = F.conv2d(x, conv.conv.weight, conv.conv.bias, padding=1)
                if conv.norm_name:
                    norm = getattr(conv, conv.norm_name)
                    x = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
                x = x.clamp(min=0)
            maps.append(x)
        towers.append(maps)
    return towers


def rows(maps, width):
    """Maps (N, A * width, H, W) of all levels as (N, P, width), cell by cell."""
    return torch.cat([x.flatten(2).transpose(1, 2).reshape(len(x), -1, width) for x in maps], 1)


def predict(kind, head, cls_maps, reg_maps):
    """Class logits, raw boxes and centerness of one head from its last maps."""
    def out(conv, maps):
        return [F.conv2d(x, conv.weight, conv.bias, padding=1) for x in maps]

    if kind.startswith("Retina"):
        return rows(out(head.retina_cls, cls_maps), 3), rows(out(head.retina_reg, reg_maps), 4), None
    cls, reg, third = {"GFL": ("gfl_cls", "gfl_reg", None), "ATSS": ("atss_cls", "atss_reg", "atss_centerness"),
                       "FCOS": ("conv_cls", "conv_reg", "conv_centerness")}[kind]
    box = [x * scale.scale for x, scale in zip(out(getattr(head, reg), reg_maps), head.scales)]
    box = rows([x.clamp(min=0) for x in box] if kind == "FCOS" else box, 36 if kind == "GFL" else 4)
    center = rows(out(getattr(head, third), reg_maps), 1)[..., 0] if third else None
    return rows(out(getattr(head, cls), cls_maps), 3), box, center


def anchors(kind, sizes):
    """Centre, width, height and stride of every anchor, level by level, cell by cell."""
    found = []
    for (height, width), stride in zip(sizes, (8, 16, 32, 64, 128)):
        shapes = [(8 * stride, 8 * stride)]
        if kind == "Retina9":
            shapes = [(4 * stride * 2 ** (i / 3) / math.sqrt(r), 4 * stride * 2 ** (i / 3) * math.sqrt(r))
                      for r in (0.5, 1.0, 2.0) for i in range(3)]
        middle = 0.5 if kind == "FCOS" else 0.0
        found += [((x + middle) * stride, (y + middle) * stride, w, h, stride)
                  for y in range(height) for x in range(width) for w, h in shapes]
    return torch.tensor(found, dtype=torch.float64)


def decoded(kind, box, sizes):
    x, y, w, h, stride = anchors(kind, sizes).unbind(1)
    if kind == "FCOS":
        left, top, right, bottom = (box * stride[:, None]).unbind(-1)
        return torch.stack([x - left, y - top, x + right, y + bottom], -1)
    a, b, c, d = (box * torch.tensor([0.1, 0.1, 0.2, 0.2] if kind == "ATSS" else [1.0] * 4)).unbind(-1)
    most = -math.log(16 / 1000)  # the coder's bound of a size
    cx, cy, w, h = x + a * w, y + b * h, w * c.clamp(-most, most).exp(), h * d.clamp(-most, most).exp()
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)


def box_loss(kind, own, other):
    """The loss (N, P) published for the teacher's kind, with its weight."""
    if kind == "GFL":
        own, other = (x.unflatten(-1, (4, 9)).softmax(-1) for x in (own, other))
        return 4.0 * (other * (other.log() - own.log())).sum((-1, -2)) / 4
    inter = ((torch.minimum(own[..., 2], other[..., 2]) - torch.maximum(own[..., 0], other[..., 0])).clamp(min=0)
             * (torch.minimum(own[..., 3], other[..., 3]) - torch.maximum(own[..., 1], other[..., 1])).clamp(min=0))
    areas = [(b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) for b in (own, other)]
    union = (areas[0] + areas[1] - inter).clamp(min=1e-6)
    if kind == "FCOS":
        return -0.75 * (inter / union).clamp(min=1e-6).log()
    hull = ((torch.maximum(own[..., 2], other[..., 2]) - torch.minimum(own[..., 0], other[..., 0]))
            * (torch.maximum(own[..., 3], other[..., 3]) - torch.minimum(own[..., 1], other[..., 1])))
    return 1 - inter / union + (hull - union) / hull


def normalizer(kind, student):
    """The divisor of the student's own kind: positives, at least one per image; for FCOS the sum of centerness."""
    assignment, total = student.assignment, 0.0
    places = anchors(kind, student.outputs.sizes).tolist()
    for positive, boxes in zip(assignment.positive.tolist(), assignment.box_targets.tolist()):
        total += 0 if kind == "FCOS" else max(sum(positive), 1)
        for (x, y, *_), (x1, y1, x2, y2) in [row[1:] for row in zip(positive, places, boxes) if row[0]]:
            if kind == "FCOS":
                l, t, r, b = x - x1, y - y1, x2 - x, y2 - y
                total += math.sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))
    return total


def per_anchor(values, own, other):
    """What the student's anchors have, for the teacher's: a cell has the largest value if the numbers differ."""
    if own == other:
        return values
    return torch.tensor([[max(row[start:start + own]) for start in range(0, len(row), own) for _ in range(other)]
                         for row in values.tolist()], dtype=torch.float64)


def transcription(kinds, method, student, teacher):
    own_kind, kind = kinds
    sizes, numbers = student.outputs.sizes, [9 if each == "Retina9" else 1 for each in kinds]
    cls, box, center = predict(kind, teacher.head, *through_the_teacher(method, student, teacher))
    target = teacher.outputs
    weight = per_anchor(student.assignment.label_weights, *numbers)
    score = target.cls.sigmoid()
    entropy = -(score * cls.sigmoid().log() + (1 - score) * (1 - cls.sigmoid()).log())
    found = {"loss_cls_kd": ((cls.sigmoid() - score).abs() * entropy).sum(-1) * (0.4 if kind == "FCOS" else 1.0)}
    boxes = (box, target.box) if kind == "GFL" else (decoded(kind, b, sizes) for b in (box, target.box))
    of_box = score.amax(-1) * (weight > 0)
    divisor = normalizer(own_kind, student)
    found = {"loss_cls_kd": (found["loss_cls_kd"] * weight).sum() / divisor,
             "loss_reg_kd": (box_loss(kind, *boxes) * of_box).sum() / (of_box.sum() if kind == "GFL" else divisor)}
    if kind == "ATSS":
        wanted, positive = target.centerness.sigmoid(), per_anchor(student.assignment.positive, *numbers)
        entropy = -(wanted * center.sigmoid().log() + (1 - wanted) * (1 - center.sigmoid()).log())
        at_least = 1 if own_kind == "FCOS" else len(SIZES)
        found["loss_center_kd"] = (entropy * positive).sum() / max(student.assignment.positive.sum(), at_least)
    return found


@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("kinds", PAIRS, ids="<-".join)
def test_values_and_gradients(kinds, width):
    model = distiller(*kinds, width=width)
    student, (teacher,), _ = model.passes(*batch())
    method = model.methods[0][0]
    found, wanted = method(student, teacher), transcription(kinds, method, student, teacher)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value > 0 and found[name].item() == pytest.approx(value.item(), rel=1e-6), name
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.autograd.grad(sum(losses.values()), parameters, retain_graph=True, allow_unused=True)
             for losses in (found, wanted)]
    norm = torch.cat([g.flatten() for g in grads[1] if g is not None]).norm()
    assert norm > 0
    for own, other in zip(*grads):
        assert (own is None) == (other is None) and (own is None or (own - other).norm() < 1e-6 * norm)


def test_the_two_images_have_cells_that_do_not_count():
    """What the transcription compares: ignored cells, and cells of which only some anchors are ignored."""
    student, _, _ = distiller("Retina9", "GFL").passes(*batch())
    ignored = (student.assignment.label_weights == 0).unflatten(1, (-1, 9))
    assert ignored.all(-1).any() and (ignored.any(-1) & ~ignored.all(-1)).any()
    student, _, _ = distiller("GFL", "Retina9").passes(*batch())
    assert (student.assignment.label_weights == 0).any()


@pytest.mark.parametrize("kinds", PAIRS, ids="<-".join)
def test_every_pair_learns(kinds):
    falls(distiller(*kinds, dtype=torch.float32))


def test_a_class_map_and_other_distances():
    teacher = teacher_entry("RetinaHead", head_={"num_classes": 7}) | {"class_map": [5, 0, 3]}
    falls(small_distiller({"type": "CrossKD", "reused_teacher_head_idx": 1}, teacher=teacher, dtype=torch.float32))
    falls(small_distiller({"type": "CrossKD", "reused_teacher_head_idx": 1}, teacher=teacher_entry(
        head_={"reg_max": 16}), dtype=torch.float32))


def test_a_weight_of_positives_goes_to_the_whole_cell():
    model = small_distiller({"type": "CrossKD", "reused_teacher_head_idx": 1}, student={"head": {"pos_weight": 3.0}},
                            teacher=teacher_entry("RetinaHead"))
    student, (teacher,), _ = model.passes(*batch())
    assert student.assignment.label_weights.unique().tolist() == [0, 1, 3]
    method = model.methods[0][0]
    for name, value in transcription(("GFL", "Retina9"), method, student, teacher).items():
        assert method(student, teacher)[name].item() == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize("kinds", [("GFL", "Retina9"), ("Retina9", "GFL"), ("GFL", "ATSS"), ("ATSS", "GFL"),
                                   ("Retina1", "Retina9"), ("FCOS", "Retina9")], ids="<-".join)
@pytest.mark.parametrize("method", [{"type": "Mimic"}, {"type": "KD"}, {"type": "DKD"}, {"type": "LD"},
                                    {"type": "CWD", "on": "logits"}], ids=lambda m: m["type"])
def test_methods_on_the_students_own_predictions_refuse_and_name_crosskd(method, kinds):
    with pytest.raises(ConfigError, match="do not mean the same: .*; for such a pair use CrossKD$") as error:
        distiller(*kinds, method=method)
    assert "\n" not in str(error.value) and str(error.value).startswith("distill.methods.0: ")


@pytest.mark.parametrize("teacher", ["FCOS", "Retina9"])
def test_a_batch_without_objects_has_no_huge_loss_for_an_fcos(teacher):
    """The sum of its centerness is zero then, and the divisor one."""
    model = distiller("FCOS", teacher)
    method, found = model.methods[0][0], []
    for counts in ((0, 0), (4, 1)):
        student, (seen,), _ = model.passes(*make_batch(SIZES, counts=counts))
        found.append(float(student.head.kd_normalizer(student.assignment)))
    assert found[0] == 1.0 and found[1] == pytest.approx(normalizer("FCOS", student), rel=1e-6)
    losses = method(*model.passes(*make_batch(SIZES, counts=(0, 0)))[:1], seen)
    assert 0 < losses["loss_cls_kd"] < 1e4 and 0 < losses["loss_reg_kd"] < 1e4


def test_links_say_what_is_compared():
    model = distiller("GFL", "Retina9", width=24)
    student, (teacher,), _ = model.passes(*batch())
    assert model.methods[0][0].links(student, teacher)[2:] == [
        "through the teacher's layers 2.. of its head: student class scores (2, 1161, 3) <- teacher class scores "
        "(2, 1161, 3)",
        "through the teacher's layers 2.. of its head: student boxes (2, 1161, 4) <- teacher boxes (2, 1161, 4)",
        "the student has a GFLHead, the teacher a RetinaHead: both predictions come from the teacher's head",
        "1 anchor per cell of the student, 9 of the teacher: a cell counts unless the student ignores all of its "
        "anchors there"]
    for kinds, count in ((("Retina1", "Retina9"), 5), (("GFL", "ATSS"), 5), (("GFL", "GFL"), 4)):
        model = distiller(*kinds)
        student, (teacher,), _ = model.passes(*make_batch())
        assert len(model.methods[0][0].links(student, teacher)) == count
