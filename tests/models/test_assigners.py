"""Assigners agree with slow versions of the published algorithms: one image, its valid anchors, box by box."""
import pytest
import torch

from models import assigners
from models.anchors import AnchorGenerator
from models.assigners import IGNORED, NEGATIVE, ATSSAssigner, FCOSAssigner, MaxIoUAssigner
from models.build import ConfigError

HEIGHT, WIDTH = 96, 128
SIZES = [(12, 16), (6, 8), (3, 4)]
STRIDES = [8, 16, 32]
ONE = AnchorGenerator(STRIDES, [1.0], octave_base_scale=8, scales_per_octave=1)
NINE = AnchorGenerator(STRIDES, [0.5, 1.0, 2.0], octave_base_scale=4, scales_per_octave=3)


def get_priors(generator):
    return generator(SIZES, torch.float64, torch.device("cpu"))


def make_boxes(n, seed, whole, largest=90):
    """(n, 4) boxes. With whole numbers there are many ties: equal distances of centres and equal overlaps."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g, dtype=torch.float64) * torch.tensor([WIDTH - 20, HEIGHT - 20])
    size = 3 + largest * torch.rand(n, 2, generator=g, dtype=torch.float64) ** 2
    boxes = torch.cat([corner, corner + size], dim=1)
    if whole:
        boxes = (boxes / 4).round() * 4
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 4)
        boxes = boxes[torch.arange(n) % max(1, -(-n // 2))]  # every box twice: ties also between boxes
    return boxes


def make_batch(seed, whole, counts=(6, 0, 11, 1), ignored_counts=(2, 1, 0, 3)):
    """All arguments of an assigner except the priors, and lists of each image's boxes and ignored regions."""
    boxes = [make_boxes(n, 10 * seed + i, whole) for i, n in enumerate(counts)]
    ignored = [make_boxes(n, 1000 + 10 * seed + i, whole) for i, n in enumerate(ignored_counts)]

    def pad(rows, least):
        width = max(least, *map(len, rows))
        padded, real = torch.zeros(len(rows), width, 4, dtype=torch.float64), torch.zeros(len(rows), width).bool()
        for i, row in enumerate(rows):
            padded[i, :len(row)], real[i, :len(row)] = row, True
        return padded, real

    return (*pad(boxes, 1), *pad(ignored, 0)), boxes, ignored


def make_valid(priors, n, partial):
    """(n, P) bool: all anchors, or with `partial` those inside images of different padded sizes."""
    valid = torch.ones(n, len(priors.boxes), dtype=torch.bool)
    if partial:
        for i, (h, w) in enumerate([(64, 128), (96, 96), (96, 128), (32, 32)]):
            valid[i] = (priors.cells[:, 0] < w) & (priors.cells[:, 1] < h)
    return valid


# --- the published algorithms ---

def area(box):
    return (box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1])


def intersection(box, boxes):
    x = (torch.minimum(box[2], boxes[:, 2]) - torch.maximum(box[0], boxes[:, 0])).clamp(min=0)
    y = (torch.minimum(box[3], boxes[:, 3]) - torch.maximum(box[1], boxes[:, 1])).clamp(min=0)
    return x * y


def iou_matrix(boxes, anchors):
    return torch.stack([intersection(b, anchors) / (area(b) + area(anchors) - intersection(b, anchors)) for b in boxes])


def ignored_anchors(anchors, ignored, threshold, wrt_anchors=True):
    mask = torch.zeros(len(anchors), dtype=torch.bool)
    if threshold > 0:
        for region in ignored:
            mask |= intersection(region, anchors) / (area(anchors) if wrt_anchors else area(region)) > threshold
    return mask


def slow_atss(anchors, level_sizes, boxes, ignored, topk=9, ignore_iof_thr=-1.0):
    """Algorithm 1 of arXiv:1912.02424, with mmdet's ignored regions, which have no effect without boxes."""
    assigned = torch.full((len(anchors),), NEGATIVE)
    if len(boxes) == 0:
        return assigned
    skip = ignored_anchors(anchors, ignored, ignore_iof_thr)
    assigned[skip] = IGNORED
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    overlaps = iou_matrix(boxes, anchors)
    best = torch.full((len(anchors),), -1.0, dtype=torch.float64)
    for g, box in enumerate(boxes):
        distance = (centers - (box[:2] + box[2:]) / 2).pow(2).sum(1).sqrt()
        distance[skip] = 1e8
        candidates, start = [], 0
        for size in level_sizes:
            nearest = distance[start:start + size].topk(min(topk, size), largest=False).indices
            candidates += (nearest + start).tolist()
            start += size
        of_candidates = overlaps[g, candidates]
        threshold = of_candidates.mean() + of_candidates.std()
        for p in candidates:
            x, y = centers[p]
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if overlaps[g, p] >= threshold and inside and overlaps[g, p] > best[p]:
                best[p], assigned[p] = overlaps[g, p], g
    return assigned


def slow_max_iou(anchors, boxes, ignored, pos=0.5, neg=(0.0, 0.4), min_pos_iou=0.0, low_quality=True, assign_all=True,
                 to_best=False, ignore_iof_thr=-1.0, wrt_anchors=True):
    """mmdet's MaxIoUAssigner; with `to_best`, detectron2's Matcher: low-quality matches learn their own best box."""
    if len(boxes) == 0:
        return torch.full((len(anchors),), NEGATIVE)
    assigned = torch.full((len(anchors),), IGNORED)
    overlaps = iou_matrix(boxes, anchors)
    overlaps[:, ignored_anchors(anchors, ignored, ignore_iof_thr, wrt_anchors)] = -1
    best = torch.full((len(anchors),), -2.0, dtype=torch.float64)
    best_box = torch.zeros(len(anchors), dtype=torch.long)
    for g, row in enumerate(overlaps):
        best_box[row > best] = g
        best = torch.maximum(best, row)
    assigned[(best >= neg[0]) & (best < neg[1])] = NEGATIVE
    assigned[best >= pos] = best_box[best >= pos]
    if low_quality:
        for g, row in enumerate(overlaps):
            if row.max() >= min_pos_iou:
                taken = (row == row.max()).nonzero()[:, 0] if assign_all else row.argmax()
                assigned[taken] = best_box[taken] if to_best else g
    return assigned


# --- comparison ---

seeds = pytest.mark.parametrize("seed", range(6))
ties = pytest.mark.parametrize("whole", [False, True], ids=["random", "ties"])
partly = pytest.mark.parametrize("partial", [False, True], ids=["all", "padded"])


def check(matched, valid, expected):
    """The assignment is as expected on each image's valid anchors, and no other anchor has a box."""
    positives = 0
    for i, keep in enumerate(valid):
        assert torch.equal(matched[i, keep], expected(i, keep)), f"image {i}"
        assert (matched[i, ~keep] < 0).all()
        positives += (matched[i] >= 0).sum()
    assert positives > 0


@seeds
@ties
@partly
@pytest.mark.parametrize("options", [{}, {"topk": 3}, {"topk": 40}, {"ignore_iof_thr": 0.4}], ids=str)
def test_atss(seed, whole, partial, options):
    priors = get_priors(ONE)
    arguments, boxes, ignored = make_batch(seed, whole)
    valid = make_valid(priors, len(boxes), partial)

    def expected(i, keep):
        levels = [int(level.sum()) for level in keep.split(priors.level_sizes)]
        return slow_atss(priors.boxes[keep], levels, boxes[i], ignored[i], **options)

    check(ATSSAssigner(**options)(priors, valid, *arguments), valid, expected)


@pytest.mark.parametrize("margin, positive", [(0.009, False), (0.011, True)])
def test_an_anchor_of_atss_lies_more_than_a_hundredth_inside_its_box(margin, positive):
    priors = get_priors(ONE)
    row = ((priors.strides == 8) & (priors.cells == 32).all(1)).nonzero()[0, 0]
    box = torch.tensor([[[32 - margin, 26, 38, 38]]]).double()  # its left side is at that anchor's centre
    nothing, yes = torch.zeros(1, 0, 4, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    arguments = priors, make_valid(priors, 1, False), box, yes, nothing, yes[:, :0]
    assert bool(ATSSAssigner()(*arguments)[0, row] == 0) == positive


class OnAccelerator(torch.Tensor):
    """A tensor that claims to be on a GPU, where a batch with invalid anchors is not processed image by image."""

    is_cuda = True


@seeds
@pytest.mark.parametrize("options", [{}, {"topk": 40}, {"ignore_iof_thr": 0.4}], ids=str)
def test_atss_takes_a_batch_at_once_on_an_accelerator(seed, options):
    priors = get_priors(ONE)
    arguments, boxes, _ = make_batch(seed, whole=False)
    valid, assigner = make_valid(priors, len(boxes), partial=True), ATSSAssigner(**options)
    at_once = assigner(priors, valid.as_subclass(OnAccelerator), *arguments).as_subclass(torch.Tensor)
    one_by_one = assigner(priors, valid, *arguments)
    assert torch.equal(at_once[valid], one_by_one[valid]) and (at_once[~valid] < 0).all()


MAX_IOU = [
    ({}, {}),
    ({"match_low_quality": False}, {"low_quality": False}),
    ({"gt_max_assign_all": False}, {"assign_all": False}),
    ({"low_quality_to_best": True}, {"to_best": True}),
    ({"low_quality_to_best": True, "gt_max_assign_all": False}, {"to_best": True, "assign_all": False}),
    ({"pos_iou_thr": 0.6, "neg_iou_thr": 0.6, "min_pos_iou": 0.3}, {"pos": 0.6, "neg": (0, 0.6), "min_pos_iou": 0.3}),
    ({"neg_iou_thr": (0.1, 0.3)}, {"neg": (0.1, 0.3)}),
    ({"ignore_iof_thr": 0.4}, {"ignore_iof_thr": 0.4}),
    ({"ignore_iof_thr": 0.4, "ignore_wrt_candidates": False}, {"ignore_iof_thr": 0.4, "wrt_anchors": False}),
    ({"ignore_iof_thr": 0.4, "low_quality_to_best": True}, {"ignore_iof_thr": 0.4, "to_best": True}),
]


@pytest.mark.parametrize("seed", range(3))
@ties
@partly
@pytest.mark.parametrize("options, slow_options", MAX_IOU, ids=lambda o: None)
def test_max_iou(seed, whole, partial, options, slow_options):
    priors = get_priors(NINE)
    arguments, boxes, ignored = make_batch(seed, whole)
    valid = make_valid(priors, len(boxes), partial)

    def expected(i, keep):
        return slow_max_iou(priors.boxes[keep], boxes[i], ignored[i], **slow_options)

    check(MaxIoUAssigner(**options)(priors, valid, *arguments), valid, expected)


@pytest.mark.parametrize("options", [options for options, _ in MAX_IOU[1:]], ids=str)
def test_every_max_iou_option_changes_something(options):
    priors = get_priors(NINE)
    arguments = make_batch(0, whole=True)[0]
    valid = make_valid(priors, 4, partial=False)
    assert not torch.equal(MaxIoUAssigner(**options)(priors, valid, *arguments),
                           MaxIoUAssigner()(priors, valid, *arguments))


@pytest.mark.parametrize("assigner", [
    ATSSAssigner(), ATSSAssigner(ignore_iof_thr=0.4), MaxIoUAssigner(), MaxIoUAssigner(ignore_iof_thr=0.4)],
    ids=["atss", "atss ignore", "max iou", "max iou ignore"])
@partly
def test_a_batch_is_its_images_one_by_one(assigner, partial):
    priors = get_priors(ONE)
    (boxes, real, ignored, ignored_real), _, _ = make_batch(3, whole=True)
    valid = make_valid(priors, 4, partial)
    together = assigner(priors, valid, boxes, real, ignored, ignored_real)
    for i in range(4):
        g, m = max(1, real[i].sum()), ignored_real[i].sum()  # without the batch's padding
        alone = assigner(priors, valid[i:i + 1], boxes[i:i + 1, :g], real[i:i + 1, :g], ignored[i:i + 1, :m],
                         ignored_real[i:i + 1, :m])
        assert torch.equal(alone[0], together[i])


@ties
@partly
@pytest.mark.parametrize("assigner", [
    ATSSAssigner(), MaxIoUAssigner(), MaxIoUAssigner(low_quality_to_best=True, gt_max_assign_all=False),
    FCOSAssigner([(-1, 32), (32, 64), (64, 1e8)], True, 1.5)], ids=["atss", "max iou", "to best", "fcos"])
@pytest.mark.parametrize("at_once", [1, 4])
def test_boxes_in_runs_are_boxes_at_once(assigner, whole, partial, at_once, monkeypatch):
    priors = get_priors(ONE)
    arguments = make_batch(5, whole)[0]
    valid = make_valid(priors, 4, partial)
    expected = assigner(priors, valid, *arguments)
    monkeypatch.setattr(assigners, "MAX_PAIRS", at_once * valid.numel())
    assert torch.equal(assigner(priors, valid, *arguments), expected) and (expected >= 0).any()


@pytest.mark.parametrize("assigner", [ATSSAssigner(ignore_iof_thr=0.1), MaxIoUAssigner(ignore_iof_thr=0.1)],
                         ids=["atss", "max iou"])
def test_without_boxes_ignored_regions_are_background_too(assigner):
    priors = get_priors(ONE)
    arguments = make_batch(0, whole=False, counts=(0, 0), ignored_counts=(3, 0))[0]
    assert (assigner(priors, make_valid(priors, 2, False), *arguments) == NEGATIVE).all()


def test_an_anchor_is_never_taken_by_a_box_through_an_ignored_region():
    priors = get_priors(ONE)
    box = torch.tensor([[[16.0, 16, 80, 80]]], dtype=torch.float64)
    everywhere = torch.tensor([[[-200.0, -200, 400, 400]]], dtype=torch.float64)
    yes, valid = torch.ones(1, 1, dtype=torch.bool), make_valid(priors, 1, False)
    matched = MaxIoUAssigner(ignore_iof_thr=0.5)(priors, valid, box, yes, everywhere, yes)
    assert (matched == IGNORED).all()


def test_a_box_that_meets_no_anchor_takes_all_that_meet_nothing():
    # As in the original at min_pos_iou 0: the best overlap is zero, so all zeros are equally good.
    priors = get_priors(ONE)
    boxes = torch.tensor([[[16.0, 16, 80, 80], [900, 900, 950, 950]]], dtype=torch.float64)
    nothing, valid = torch.zeros(1, 0, 4, dtype=torch.float64), make_valid(priors, 1, False)
    arguments = priors, valid, boxes, torch.ones(1, 2).bool(), nothing, torch.zeros(1, 0).bool()
    assert (MaxIoUAssigner()(*arguments) == 1).sum() == (iou_matrix(boxes[0], priors.boxes)[1] == 0).sum()
    assert not (MaxIoUAssigner(min_pos_iou=0.1)(*arguments) == 1).any()


def test_max_iou_refuses_crossed_thresholds():
    with pytest.raises(ConfigError, match="neg_iou_thr"):
        MaxIoUAssigner(pos_iou_thr=0.4, neg_iou_thr=0.5)
