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


def overlaps(box, anchor):
    """Intersection over union, intersection over the anchor's area, and DIoU's penalty for the distance."""
    width = min(box[2], anchor[2]) - max(box[0], anchor[0])
    height = min(box[3], anchor[3]) - max(box[1], anchor[1])
    inter = max(width, 0) * max(height, 0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, anchor)]
    diagonal = (max(box[2], anchor[2]) - min(box[0], anchor[0])) ** 2 \
        + (max(box[3], anchor[3]) - min(box[1], anchor[1])) ** 2
    centers = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (box, anchor)]
    return inter / (sum(areas) - inter), inter / areas[1], math.dist(*centers) ** 2 / diagonal


def region(boxes, anchors, sizes, gamma, overlap):
    """LD's region for one image, box by box and anchor by anchor: the IoU of each anchor, 0 outside the region."""
    found = [0.0] * len(anchors)
    for box in boxes:
        rows = [overlaps(box, anchor) for anchor in anchors]
        high = threshold(box, [row[0] for row in rows], anchors, sizes)
        for p, (iou, iof, penalty) in enumerate(rows):
            diou = {"iof": iof, "iou": iou}[overlap] - penalty
            if gamma * high <= diou < high:
                found[p] = max(found[p], iou)
    return found


def threshold(box, ious, anchors, sizes):
    """ATSS: mean plus deviation of the IoU of the nine nearest anchors of every level."""
    center, chosen, start = torch.tensor([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]).double(), [], 0
    points = torch.tensor(anchors).double().view(-1, 2, 2).mean(1)
    for size in sizes:
        distance = (points[start:start + size] - center).pow(2).sum(1).sqrt()
        nearest = distance.topk(min(9, size), largest=False).indices  # topk also decides between equal distances
        chosen += [ious[start + k] for k in nearest.tolist()]
        start += size
    mean = sum(chosen) / len(chosen)
    return mean + math.sqrt(sum((v - mean) ** 2 for v in chosen) / (len(chosen) - 1))


def plain_region(student, gamma, overlap):
    """`region` for each image, with only the anchors inside the image's own padded size."""
    priors, found = student.assignment.priors, torch.zeros_like(student.assignment.label_weights)
    for i, target in enumerate(student.targets):
        valid = student.assignment.label_weights[i] != 0
        sizes = [int(level.sum()) for level in valid.split(priors.level_sizes)]
        found[i, valid] = torch.tensor(region(target["boxes"].tolist(), priors.boxes[valid].tolist(), sizes, gamma,
                                              overlap), dtype=torch.float64)
    return found


@pytest.mark.parametrize("overlap", ["iof", "iou"])
def test_ld_in_the_valuable_localisation_region(overlap):
    """Algorithm 1 of LD; an anchor of the region counts by its IoU, the sum divided by 16 as in the authors' code."""
    _, losses, student, teacher = run({"type": "LD", "vlr_weight": 0.5, "vlr_gamma": 0.25, "T": 4.0,
                                       "vlr_overlap": overlap})
    bins, total, members = student.head.reg_max + 1, 0.0, 0
    for i, row in enumerate(plain_region(student, 0.25, overlap).tolist()):
        for p, iou in enumerate(row):
            members += iou > 0
            for side in range(4 if iou else 0):
                own, other = (softmax(seen.outputs.box[i, p].tolist()[side * bins:(side + 1) * bins], 4.0)
                              for seen in (student, teacher))
                total += iou * 16 * kl(other, own) / bins  # class_reduction: mean
    assert members > 10
    close(losses["loss_ld_vlr"], 0.5 * total / 16)
    assert losses.keys() == {"loss_ld", "loss_ld_vlr"}


def test_the_valuable_region_on_many_images():
    """Both kinds of overlap choose the region of a plain transcription; the authors' is another one than the paper's.

    Boxes on whole pixels have several anchors at the same distance, and the smaller image has anchors that do not
    count.
    """
    methods = {overlap: small_distiller({"type": "LD", "vlr_weight": 1.0, "vlr_overlap": overlap})
               for overlap in ("iof", "iou")}
    differing, sizes = 0, ((192, 224), (100, 90))
    images, targets = make_batch(sizes, counts=(1, 1))
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        for target, (height, width) in zip(targets, sizes):
            start, size = torch.rand(2, 4, 2, generator=g, dtype=torch.float64) * torch.tensor([width, height]) / 4
            target["boxes"] = (torch.cat([start, start + 2 + 2 * size], 1) / 4).round() * 4
            target["labels"] = torch.zeros(4, dtype=torch.long)
        found = {}
        for overlap, model in methods.items():
            student, _, _ = model.passes(images, targets)
            found[overlap] = model.methods[0][0].valuable_region(student)
            torch.testing.assert_close(found[overlap], plain_region(student, 0.25, overlap), rtol=1e-9, atol=1e-12)
        differing += int(((found["iof"] > 0) != (found["iou"] > 0)).any(1).sum())
    assert differing > 12  # of 24 images


@pytest.mark.parametrize("overlap", ["iof", "iou"])
def test_the_valuable_region_of_one_box_by_hand(overlap):
    """A box of 128 pixels, and anchors of 64: the authors' code takes the one in its middle for a full overlap."""
    model = small_distiller({"type": "LD", "vlr_weight": 1.0, "vlr_overlap": overlap})
    images, targets = make_batch(sizes=((128, 128),), counts=(1,))
    targets[0]["boxes"] = torch.tensor([[0.0, 0.0, 128.0, 128.0]], dtype=torch.float64)
    student, _, _ = model.passes(images, targets)
    priors, found = student.assignment.priors, model.methods[0][0].valuable_region(student)[0]
    high = float(student.head.assigner.positive_threshold(
        priors, torch.ones(1, len(priors.boxes), dtype=torch.bool), targets[0]["boxes"].unsqueeze(0)))
    assert 0.4 < high < 0.95
    # anchor: its IoU, intersection / area of the anchor, distance of the centres squared / diagonal squared
    for anchor, iou, iof, penalty in [((32, 32, 96, 96), 64 ** 2 / 128 ** 2, 1.0, 0.0),
                                      ((-32, 32, 32, 96), 2048 / (4096 + 16384 - 2048), 0.5, 64 ** 2 / 41984),
                                      ((-32, -32, 32, 32), 1024 / (4096 + 16384 - 1024), 0.25, 2 * 64 ** 2 / 51200)]:
        diou = {"iof": iof, "iou": iou}[overlap] - penalty
        inside = 0.25 * high <= diou < high
        assert inside == (anchor == {"iof": (-32, 32, 32, 96), "iou": (32, 32, 96, 96)}[overlap])
        assert float(found[priors.boxes.tolist().index(list(anchor))]) == pytest.approx(iou if inside else 0.0)


def test_the_region_is_off_unless_asked_for():
    _, losses, _, _ = run({"type": "LD"})
    assert losses.keys() == {"loss_ld"}


@pytest.mark.parametrize("method", ["CrossKD", "Mimic"])
def test_boxes_of_fcos_are_compared_in_pixels(method):
    """Boxes so small that the 1e-6 in the IoU decides. The original's teacher multiplies distances by the stride."""
    options = {"reused_teacher_head_idx": 1} if method == "CrossKD" else {}
    model = small_distiller({"type": method, **options}, head="FCOSHead")
    with torch.no_grad():
        for detector in (model.student, model.teacher):
            for scale in detector.bbox_head.scales:
                scale.scale.fill_(2e-5)
    student, (teacher,), _ = model.passes(*make_batch())
    assert not teacher.head.training and student.head.training
    one = model.methods[0][0]
    outputs = one.cross_head(student, teacher) if method == "CrossKD" else student.outputs
    total, small = {"strides": 0.0, "pixels": 0.0}, 0
    strides, points = (x.tolist() for x in (student.assignment.priors.strides, student.assignment.priors.centers))
    for i in range(2):
        rows = zip(outputs.box[i].tolist(), teacher.outputs.box[i].tolist(), teacher.outputs.cls[i].tolist())
        for (own, other, scores), stride, (x, y) in zip(rows, strides, points):
            for unit, factor in (("strides", 1.0), ("pixels", stride)):
                (l, t, r, b), (L, T, R, B) = ([x - factor * box[0], y - factor * box[1], x + factor * box[2],
                                               y + factor * box[3]] for box in (own, other))
                inter = max(min(r, R) - max(l, L), 0) * max(min(b, B) - max(t, T), 0)
                union = (r - l) * (b - t) + (R - L) * (B - T) - inter
                total[unit] += sigmoid(max(scores)) * -math.log(max(inter / max(union, 1e-6), 1e-6))
                small += unit == "strides" and 0 < union < 1e-6
    assert small > 50
    normalizer = float(student.head.kd_normalizer(student.assignment))
    close(one(student, teacher)["loss_reg_kd"], 0.75 * total["pixels"] / normalizer)
    assert total["strides"] > 1.02 * total["pixels"]


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
