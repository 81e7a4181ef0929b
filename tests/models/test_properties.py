"""Properties of boxes, coders, assigners, suppression and heads, for any reasonable input."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import boxes, examples, floats, random_boxes, tensors
from small_models import CLASSES
from torchvision.ops import nms

from models.anchors import AnchorGenerator
from models.assigners import NEGATIVE, ATSSAssigner, FCOSAssigner, MaxIoUAssigner, pairwise_overlap
from models.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder, clip_boxes
from models.heads import HEADS, HeadOutputs
from models.postprocess import class_nms

dtypes = st.sampled_from([torch.float32, torch.float64])
seeds = st.integers(0, 2 ** 32)

# --- boxes ---


@examples(60)
@given(first=boxes(3, least=0), second=boxes(4, least=0), dtype=dtypes)
def test_overlaps(first, second, dtype):
    first, second = first.to(dtype), second.to(dtype)
    iou, iof = pairwise_overlap(first, second), pairwise_overlap(first, second, "iof")
    assert iou.shape == iof.shape == (3, 4)
    for share in (iou, iof):
        assert (share >= 0).all() and (share <= 1 + 1e-5).all()
    assert (iou <= iof + 1e-5).all()
    torch.testing.assert_close(pairwise_overlap(second, first).T, iou)


@examples(60)
@given(values=boxes(3, least=0), height=st.integers(1, 2000), width=st.integers(1, 2000))
def test_clipping(values, height, width):
    clipped = clip_boxes(values, (height, width))
    assert (clipped >= 0).all() and (clipped <= torch.tensor([width, height, width, height])).all()
    assert (clipped[:, 2:] >= clipped[:, :2]).all() and torch.equal(clip_boxes(clipped, (height, width)), clipped)


# --- coders ---

@examples(100)
@given(anchors=boxes(3, least=8, most=500), values=boxes(3, least=8, most=500), means=tensors((4,), -1, 1),
       stds=tensors((4,), 0.05, 2))
def test_delta_coder_round_trip(anchors, values, means, stds):
    coder = DeltaXYWHBBoxCoder(means.tolist(), stds.tolist())  # the ratio of sides is below the coder's limit of 62.5
    torch.testing.assert_close(coder.decode(anchors, coder.encode(anchors, values)), values, rtol=1e-9, atol=1e-6)


@examples(100)
@given(points=tensors((3, 2), -2000, 2000), values=boxes(3), reach=floats(1, 64))
def test_distance_coder_round_trip(points, values, reach):
    coder = DistancePointBBoxCoder()
    distances = coder.encode(points, values)
    torch.testing.assert_close(coder.decode(points, distances), values)
    limited = coder.encode(points, values, reach)
    assert (limited >= 0).all() and (limited < reach).all()


@examples(100)
@given(anchors=boxes(3), deltas=tensors((3, 4), -1e4, 1e4), dtype=dtypes)
def test_any_deltas_are_decoded_to_finite_boxes(anchors, deltas, dtype):
    deltas = deltas.to(dtype).requires_grad_()
    decoded = DeltaXYWHBBoxCoder().decode(anchors.to(dtype), deltas)
    decoded.sum().backward()
    assert decoded.isfinite().all() and deltas.grad.isfinite().all()
    assert (decoded[:, 2:] >= decoded[:, :2]).all()


# --- assigners ---

SIZES, STRIDES = [(12, 16), (6, 8), (3, 4)], [8, 16, 32]
PRIORS = AnchorGenerator(STRIDES, [1.0], octave_base_scale=4, scales_per_octave=1)(
    SIZES, torch.float64, torch.device("cpu"))
VALID, NO_BOXES = torch.ones(1, len(PRIORS.boxes), dtype=torch.bool), torch.zeros(1, 0, 4, dtype=torch.float64)
ASSIGNERS = {
    "atss": ATSSAssigner(), "atss ignore": ATSSAssigner(ignore_iof_thr=0.3),
    "fcos": FCOSAssigner([(-1, 32), (32, 64), (64, 1e8)], True, 1.5),
    "max iou": MaxIoUAssigner(match_low_quality=False),
    "max iou ignore": MaxIoUAssigner(low_quality_to_best=True, ignore_iof_thr=0.3)}


def assign(assigner, values, ignored=NO_BOXES, padding=0):
    padded = torch.cat([values, values.new_full((padding, 4), 50)])[None]
    real = torch.arange(len(values) + padding)[None] < len(values)
    return assigner(PRIORS, VALID, padded, real, ignored, torch.ones(ignored.shape[:2], dtype=torch.bool))[0]


@pytest.mark.parametrize("assigner", ASSIGNERS.values(), ids=ASSIGNERS)
@examples(60)
@given(seed=seeds, data=st.data(), count=st.integers(1, 8))
def test_the_order_of_boxes_does_not_matter(assigner, seed, data, count):
    values = random_boxes(seed, count, 128, 96)
    order = torch.tensor(data.draw(st.permutations(range(count))))
    ignored = random_boxes(seed + 1, 2, 128, 96)[None]
    matched, shuffled = assign(assigner, values, ignored), assign(assigner, values[order], ignored)
    assert ((matched < count) & (matched >= -2)).all()
    assert torch.equal(torch.where(shuffled >= 0, order[shuffled.clamp(min=0)], shuffled), matched)
    assert torch.equal(assign(assigner, values, ignored, padding=3), matched)


@examples(60)
@given(seed=seeds, data=st.data(), count=st.integers(2, 8))
def test_which_anchors_low_quality_matches_make_positive_does_not_depend_on_the_order(seed, data, count):
    # only the box depends on it, if two boxes take one anchor: the last box gets it, as in mmdet
    values = random_boxes(seed, count, 128, 96)
    order = data.draw(st.permutations(range(count)))
    assert torch.equal(assign(MaxIoUAssigner(), values) >= 0, assign(MaxIoUAssigner(), values[order]) >= 0)


@pytest.mark.parametrize("assigner", [*ASSIGNERS.values(), MaxIoUAssigner()], ids=[*ASSIGNERS, "low quality"])
@examples(40)
@given(values=boxes(4, reach=300, least=0, most=400))
def test_any_boxes_are_assigned(assigner, values):
    matched = assign(assigner, values)
    assert ((matched >= -2) & (matched < 4)).all()
    assert (assign(assigner, values[:0], padding=1) == NEGATIVE).all()


# --- suppression ---

@examples(80)
@given(seed=seeds, count=st.integers(0, 60), classes=st.sampled_from([1, 3, 80, 1200]), dtype=dtypes,
       shift=floats(-5000, 5000), threshold=floats(0.1, 0.9))
def test_suppression_of_classes_at_once_is_of_each_by_itself(seed, count, classes, dtype, shift, threshold):
    g = torch.Generator().manual_seed(seed)
    values = random_boxes(seed, count, 400, 300).to(dtype) + shift  # also beyond the image's borders
    scores = torch.rand(count, generator=g, dtype=dtype)
    labels = torch.randint(0, classes, (count,), generator=g) * torch.randint(0, 2, (count,), generator=g)
    kept = class_nms(values, scores, labels, threshold)
    own = []
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        own.append(rows[nms(values[rows].double(), scores[rows].double(), threshold)])
    expected = torch.cat([labels[:0], *own])
    assert torch.equal(kept, expected[scores[expected].argsort(descending=True, stable=True)])


def test_classes_do_not_meet_beyond_the_left_border():
    """torchvision's batched_nms moves the second box by 101, onto the first box, and suppresses it."""
    values = torch.tensor([[-49.0, -49, 100, 100], [-150, -150, 50, 50]])
    assert class_nms(values, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), 0.5).tolist() == [0, 1]


@pytest.mark.parametrize("label", [0, 79])
def test_the_number_of_classes_does_not_change_an_overlap(label):
    """The first two boxes have an IoU slightly above 0.5, or below, if rounded at 80 times the image's width."""
    values = torch.tensor([[481.4, 850.7, 508.2, 880.7], [465.5, 848.6, 504.8, 879.4], [0, 0, 1333, 800]])
    kept = class_nms(values, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([label, label, 1]), 0.5)
    assert kept.tolist() == [0, 2]


# --- heads ---

@pytest.mark.parametrize("kind", HEADS)
@examples(40)
@given(seed=seeds, cls_scale=st.sampled_from([0.0, 1.0, 1e4]), box_scale=st.sampled_from([0.0, 1.0, 1e4]),
       count=st.integers(0, 5), dtype=dtypes, edge=st.sampled_from([0.01, 6.0]))
def test_losses_of_any_predictions_are_finite(kind, seed, cls_scale, box_scale, count, dtype, edge):
    head = HEADS[kind](CLASSES, 8, feat_channels=8, stacked_convs=0, norm_cfg=None)
    sizes = [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]
    anchors = head.prior_generator.num_anchors * sum(h * w for h, w in sizes)
    g = torch.Generator().manual_seed(seed)

    def maps(channels, scale):
        values = scale * torch.randn(1, anchors, channels, generator=g, dtype=dtype)
        return (values.abs() if channels == 4 and kind == "FCOSHead" else values).requires_grad_()

    cls, box, centerness = maps(CLASSES, cls_scale), maps(head.box_channels, box_scale), maps(1, cls_scale)
    outputs = HeadOutputs(cls, box, centerness.squeeze(-1) if kind in ("ATSSHead", "FCOSHead") else None, sizes)
    target = {"boxes": random_boxes(seed, count, 64, 64, edge), "image_size": (64, 64),
              "labels": torch.randint(0, CLASSES, (count,), generator=g)}
    losses = head.losses(outputs, head.assign(outputs, [target]))
    sum(losses.values()).backward()
    assert all(value.isfinite() and value >= 0 for value in losses.values())
    assert all(x.grad is None or x.grad.isfinite().all() for x in (cls, box, centerness))
