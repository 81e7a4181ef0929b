"""Methods without a reference file against their papers' equations, written out plainly in float64."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_models import make_batch, same_losses, small_distiller, teacher_entry

HEADS = ["GFLHead", "RetinaHead", "ATSSHead", "FCOSHead"]


def run(method, head="GFLHead", **arguments):
    """A method, its losses, and the passes that it saw."""
    model = small_distiller(method, head=head, **arguments)
    student, (teacher,), _ = model.passes(*make_batch())
    return model.methods[0][0], model.methods[0][0](student, teacher), student, teacher


def kl(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q) if a > 0)


def softmax(x, temperature):
    top = max(x)
    e = [math.exp((v - top) / temperature) for v in x]
    return [v / sum(e) for v in e]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def close(value, expected):
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected, rel=1e-6) and expected > 0


@pytest.mark.parametrize("width", [16, 24])
def test_fitnet(width):
    method, losses, student, teacher = run({"type": "FitNet", "loss_weight": 3.0}, teacher=teacher_entry(width=width))
    expected = 0.0
    for adapt, own, other in zip(method.pairs.adapters, student.features, teacher.features):
        own = own if width == 16 else F.conv2d(own, adapt.weight, adapt.bias)
        expected += 3.0 * ((own - other) ** 2).sum().item() / own.numel() / 2
    close(losses["loss_fitnet"], expected)


@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("share", [0.0, 0.65, 1.0])
def test_mgd(share, width):
    model = small_distiller({"type": "MGD", "alpha_mgd": 0.01, "lambda_mgd": share}, teacher=teacher_entry(width=width))
    student, (teacher,), _ = model.passes(*make_batch())
    method = model.methods[0][0]
    torch.manual_seed(7)
    found = method(student, teacher)["loss_mgd"]
    torch.manual_seed(7)
    expected, masked, cells = 0.0, 0, 0
    for adapt, (first, _, last), own, other in zip(method.pairs.adapters, method.generation, student.features,
                                                   teacher.features):
        own = own if width == 16 else F.conv2d(own, adapt.weight, adapt.bias)
        mask = torch.rand(2, 1, *own.shape[-2:]) <= 1 - share  # eq. 2, the same for every channel
        hidden = F.conv2d(own * mask, first.weight, first.bias, padding=1).clamp(min=0)
        made = F.conv2d(hidden, last.weight, last.bias, padding=1)
        expected += 0.01 * ((made - other) ** 2).sum().item() / 2  # two images
        masked, cells = masked + (~mask).sum().item(), cells + mask.numel()
    close(found, expected)
    assert abs(masked / cells - share) < 0.1


def test_mgd_masks_anew_at_every_call():
    model = small_distiller({"type": "MGD"})
    student, (teacher,), _ = model.passes(*make_batch())
    first, second = (model.methods[0][0](student, teacher)["loss_mgd"] for _ in range(2))
    assert first != second


def divergence(own, other, tau):
    """Equation 4 of CWD, a mean over channels and images."""
    total = 0.0
    for own_image, other_image in zip(own.tolist(), other.tolist()):
        for own_map, other_map in zip(own_image, other_image):
            p, q = (softmax(sum(rows, []), tau) for rows in (other_map, own_map))
            total += tau ** 2 * kl(p, q)
    return total / own.shape[0] / own.shape[1]


def test_cwd_on_features():
    _, losses, student, teacher = run({"type": "CWD", "tau": 2.0, "loss_weight": 5.0})
    expected = sum(5.0 * divergence(*pair, 2.0) for pair in zip(student.features, teacher.features))
    close(losses["loss_cwd"], expected)


@pytest.mark.parametrize("head", HEADS)
def test_cwd_on_logits(head):
    """Every class of every anchor is a channel, as in the output of the head's last convolution."""
    _, losses, student, teacher = run({"type": "CWD", "tau": 0.5, "on": "logits"}, head)

    def maps(seen):
        for feature in seen.features:
            for conv in seen.head.cls_convs:
                feature = conv(feature)
            yield getattr(seen.head, seen.head.classifier)(feature)

    expected = sum(5.0 * divergence(*pair, 0.5) for pair in zip(maps(student), maps(teacher)))
    close(losses["loss_cwd"], expected)


@pytest.mark.parametrize("head", HEADS)
def test_kd(head):
    _, losses, student, teacher = run({"type": "KD", "T": 3.0, "loss_weight": 2.0}, head)
    total = 0.0
    rows = zip(student.outputs.cls.flatten(0, 1).tolist(), teacher.outputs.cls.flatten(0, 1).tolist(),
               student.assignment.label_weights.flatten().tolist())
    for own, other, weight in rows:
        for s, t in zip(own, other):
            p, q = sigmoid(t / 3), sigmoid(s / 3)
            total += weight * 9 * kl([p, 1 - p], [q, 1 - q])
    close(losses["loss_kd"], 2.0 * total / float(student.assignment.avg_factor))


@pytest.mark.parametrize("head", HEADS)
def test_dkd(head):
    _, losses, student, teacher = run(
        {"type": "DKD", "alpha": 0.5, "beta": 4.0, "T": 2.0, "loss_weight": 1.5}, head)
    total = 0.0
    positives = student.assignment.positive.nonzero().tolist()
    for i, anchor in positives:
        label = int(student.assignment.labels[i, anchor])
        own, other = (softmax(seen.outputs.cls[i, anchor].tolist(), 2.0) for seen in (student, teacher))
        true = kl([other[label], 1 - other[label]], [own[label], 1 - own[label]])
        rest = kl(*([p / (1 - probabilities[label]) for k, p in enumerate(probabilities) if k != label]
                    for probabilities in (other, own)))
        total += (0.5 * true + 4.0 * rest) * 4
    assert positives
    close(losses["loss_dkd"], 1.5 * total / float(student.assignment.avg_factor))


def iou_and_diou(box, anchor):
    width = min(box[2], anchor[2]) - max(box[0], anchor[0])
    height = min(box[3], anchor[3]) - max(box[1], anchor[1])
    inter = max(width, 0) * max(height, 0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, anchor)]
    diagonal = (max(box[2], anchor[2]) - min(box[0], anchor[0])) ** 2 \
        + (max(box[3], anchor[3]) - min(box[1], anchor[1])) ** 2
    centers = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (box, anchor)]
    iou = inter / (sum(areas) - inter)
    return iou, iou - math.dist(*centers) ** 2 / diagonal


def test_ld_in_the_valuable_localisation_region():
    """Algorithm 1 of LD; an anchor of the region counts by its IoU, the sum divided by 16 as in the authors' code."""
    _, losses, student, teacher = run({"type": "LD", "vlr_weight": 0.5, "vlr_gamma": 0.25, "T": 4.0})
    priors = student.assignment.priors
    anchors = priors.boxes.tolist()
    bins = student.head.reg_max + 1
    total, members = 0.0, 0
    for i, target in enumerate(student.targets):
        overlaps = [[iou_and_diou(box, anchor) for anchor in anchors] for box in target["boxes"].tolist()]
        thresholds = [threshold(box, row, priors) for box, row in zip(target["boxes"].tolist(), overlaps)]
        for p in range(len(anchors)):
            near = [row[p][0] for row, t in zip(overlaps, thresholds) if 0.25 * t <= row[p][1] < t]
            if not near:
                continue
            members += 1
            for side in range(4):
                own, other = (softmax(seen.outputs.box[i, p].tolist()[side * bins:(side + 1) * bins], 4.0)
                              for seen in (student, teacher))
                total += max(near) * 16 * kl(other, own) / bins  # class_reduction: mean
    assert members > 10
    close(losses["loss_ld_vlr"], 0.5 * total / 16)
    assert losses.keys() == {"loss_ld", "loss_ld_vlr"}


def threshold(box, row, priors):
    """ATSS: mean plus deviation of the IoU of the nine nearest anchors of every level."""
    center, chosen, start = torch.tensor([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]).double(), [], 0
    for size in priors.level_sizes:
        distance = (priors.centers[start:start + size] - center).norm(dim=1)
        chosen += [row[start + k][0] for k in distance.argsort(stable=True)[:9].tolist()]
        start += size
    mean = sum(chosen) / len(chosen)
    return mean + math.sqrt(sum((v - mean) ** 2 for v in chosen) / (len(chosen) - 1))


def test_the_region_is_off_unless_asked_for():
    _, losses, _, _ = run({"type": "LD"})
    assert losses.keys() == {"loss_ld"}


def test_predictions_in_half_precision_are_compared_in_float32():
    """No loss rounds its inputs further: it is the same for outputs that are promoted first."""
    distiller = small_distiller({"type": "Mimic"}, head="ATSSHead", dtype=torch.float32)
    student, (teacher,), _ = distiller.passes(*make_batch(dtype=torch.float32))
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for seen in (student, teacher):
            outputs = seen.outputs
            seen.outputs = replace(outputs, cls=outputs.cls.to(dtype), centerness=outputs.centerness.to(dtype))
        found.append(distiller.methods[0][0](student, teacher))
    assert same_losses(*found)
