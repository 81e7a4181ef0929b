"""Detectors: training and evaluation, targets, defaults, initialisation, unusual shapes."""
import copy
import math

import pytest
import torch
from small_models import CLASSES, HEADS, enliven, gradients, make_batch, same_losses, small_config, small_detector

from losses import LOSSES
from models import HeadOutputs, build_detector
from models.assigners import IGNORED
from models.build import build
from models.layers import ConvModule, FrozenBatchNorm

every_head = pytest.mark.parametrize("head", ["GFLHead", "RetinaHead"])  # golden files test the others
LOSS_NAMES = {"GFLHead": {"loss_cls", "loss_bbox", "loss_dfl"}, "RetinaHead": {"loss_cls", "loss_bbox"}}


# --- training and evaluation ---

@every_head
def test_forward_gives_losses_in_training_and_detections_in_evaluation(head):
    model, (images, targets) = small_detector(head), make_batch()
    losses = model.train()(images, targets)
    assert losses.keys() == LOSS_NAMES[head] and all(value.shape == () for value in losses.values())
    assert same_losses(losses, model.loss(images, targets))
    with torch.no_grad():
        detections = enliven(model).eval()(images, targets)
        for found, again in zip(detections, model.predict(images, targets), strict=True):
            assert found.keys() == {"boxes", "scores", "labels"} and found["labels"].dtype == torch.int64
            assert len(found["boxes"]) > 0 and all(torch.equal(found[key], again[key]) for key in found)


@every_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_precision_is_the_inputs(head, dtype):
    model, (images, targets) = enliven(small_detector(head, dtype=dtype)), make_batch(dtype=dtype)
    assert all(value.dtype == dtype for value in model.loss(images, targets).values())
    found = model.eval().predict(images, targets)[0]
    assert found["boxes"].dtype == found["scores"].dtype == dtype


@every_head
@pytest.mark.parametrize("counts", [(0, 3), (0, 0)])
def test_images_without_boxes(head, counts):
    model = small_detector(head, dtype=torch.float32).train()
    losses = model.loss(*make_batch(counts=counts, dtype=torch.float32))
    found = gradients(model, losses)
    assert all(value.isfinite() for value in losses.values()) and losses["loss_cls"] > 0
    assert all(grad is not None and grad.isfinite().all() for grad in found.values())
    if counts == (0, 0):
        assert losses["loss_bbox"] == 0


@every_head
def test_losses_are_those_of_the_images_weighted_by_their_normalisers(head):
    """A box in one image has no effect on the anchors of the other image."""
    model, (images, targets) = small_detector(head).train(), make_batch(sizes=((64, 96), (50, 70)))
    run = model.run(images, targets)
    together = model.bbox_head.assign(run.outputs, targets)
    for i in range(2):
        outputs = HeadOutputs(run.outputs.cls[i:i + 1], run.outputs.box[i:i + 1], None, run.outputs.sizes)
        alone = model.bbox_head.assign(outputs, targets[i:i + 1])
        for name in ("matched", "labels", "label_weights", "box_targets", "positive"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i]), name
    assert together.avg_factor == together.positive.sum()


# --- targets ---

def assign(head, targets, sizes=((8, 12), (4, 6), (2, 3), (1, 2), (1, 1)), **options):
    head = small_detector(head, head={**HEADS[head], **options}).bbox_head
    anchors = head.prior_generator.num_anchors * sum(h * w for h, w in sizes)
    nothing = torch.zeros(len(targets), anchors, 4, dtype=torch.float64)
    outputs = HeadOutputs(nothing, nothing, None, list(sizes))
    return head.assign(outputs, targets)


def test_anchors_beyond_pad_size_are_invalid():
    _, targets = make_batch()
    targets[0]["pad_size"] = (64, 64)
    valid = assign("GFLHead", targets).label_weights
    priors = assign("GFLHead", targets).priors
    for i, (height, width) in enumerate([(64, 64), (64, 96)]):  # 50 x 70 is padded to 64 x 96 by default
        expected = (priors.cells[:, 0] < width) & (priors.cells[:, 1] < height)
        assert torch.equal(valid[i] > 0, expected) and (i == 1 or not expected.all())
    everywhere = assign("GFLHead", targets, restrict_to_pad=False)
    assert (everywhere.label_weights == 1).all()


@every_head
def test_assignment_is_consistent(head):
    _, targets = make_batch(counts=(4, 0))
    found = assign(head, targets)
    positive = found.matched >= 0
    assert positive[0].any() and not positive[1].any() and torch.equal(positive, found.positive.bool())
    assert (found.labels[~positive] == CLASSES).all()
    rows = found.matched[0][positive[0]]
    assert torch.equal(found.labels[0][positive[0]], targets[0]["labels"][rows])
    assert torch.equal(found.box_targets[0][positive[0]], targets[0]["boxes"][rows])
    assert torch.equal(found.box_targets[~positive], found.priors.boxes.expand(2, -1, -1)[~positive])
    assert found.avg_factor == positive[0].sum() + 1  # an image without boxes counts as one


@every_head
@pytest.mark.parametrize("pos_weight, expected", [(-1, 1), (0, 1), (2.5, 2.5)])
def test_pos_weight(head, pos_weight, expected):
    found = assign(head, make_batch()[1], pos_weight=pos_weight)
    assert (found.label_weights[found.positive > 0] == expected).all()
    assert (found.label_weights[found.positive == 0] <= 1).all()


@pytest.mark.parametrize("head, assigner", [
    ("GFLHead", {"type": "ATSSAssigner", "ignore_iof_thr": 0.05}),
    ("RetinaHead", {"type": "MaxIoUAssigner", "ignore_iof_thr": 0.05})])
def test_ignored_boxes(head, assigner):
    _, targets = make_batch(ignored=2)
    found, without = assign(head, targets, assigner=assigner), assign(head, targets)
    ignored = found.matched == IGNORED
    assert ignored.sum() > (without.matched == IGNORED).sum()
    assert not found.label_weights[ignored].any() and not found.positive[ignored].any()
    model, (images, targets) = small_detector(head, head={"assigner": assigner}), make_batch(ignored=2)
    targets[1].pop("ignored_boxes")  # may be missing
    plain = [{k: v for k, v in t.items() if k != "ignored_boxes"} for t in targets]
    assert not same_losses(model.loss(images, targets), model.loss(images, plain))


def test_allowed_border():
    _, targets = make_batch()  # the second image is padded by more than the border
    found = assign("GFLHead", targets, allowed_border=10, anchor_generator={
        "type": "AnchorGenerator", "ratios": [1.0], "scales": [2], "strides": [8, 16, 32, 64, 128]})
    x1, y1, x2, y2 = found.priors.boxes.T
    for i, (h, w) in enumerate([(64, 96), (50, 70)]):
        expected = (x1 >= -10) & (y1 >= -10) & (x2 < w + 10) & (y2 < h + 10)
        assert torch.equal(found.label_weights[i] > 0, expected) and expected.any() and not expected.all()


@every_head
def test_allowed_border_that_leaves_no_anchor(head):
    with pytest.raises(ValueError, match="allowed_border"):
        assign(head, make_batch(sizes=((64, 96), (8, 8)))[1], allowed_border=0)


# --- initialisation ---

@every_head
def test_head_initialisation(head):
    model = small_detector(head, width=64)
    classifier, regressor = {"GFLHead": ("gfl_cls", "gfl_reg"), "RetinaHead": ("retina_cls", "retina_reg")}[head]
    classifier, regressor = getattr(model.bbox_head, classifier), getattr(model.bbox_head, regressor)
    assert torch.allclose(classifier.bias.sigmoid(), torch.tensor(0.01).double()) and not regressor.bias.any()
    towers = [conv.conv for conv in [*model.bbox_head.cls_convs, *model.bbox_head.reg_convs]]
    assert len(towers) == 4
    for conv in [classifier, regressor, *towers]:
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.1)
    for conv in towers:
        assert (conv.bias is None) == (head == "GFLHead") and (conv.bias is None or not conv.bias.any())


def test_first_loss_is_small_for_the_prior():
    # With every score at 0.01 and no box, focal loss is about A * C * 0.75 * 0.01^2 * 0.01 per cell.
    model, (images, targets) = small_detector("RetinaHead").train(), make_batch(counts=(0, 0))
    run = model.run(images, targets, assign=True)
    valid = model.bbox_head.assign(run.outputs, targets).label_weights.sum().item()
    expected = valid * CLASSES * 0.75 * 0.01 ** 2 * -math.log(0.99) / 2
    assert model.losses(run)["loss_cls"].item() == pytest.approx(expected, rel=0.2)


# --- defaults ---

PUBLISHED = {
    "GFLHead": {
        "stacked_convs": 4, "feat_channels": 256, "reg_max": 16, "norm_cfg": {"type": "GN", "num_groups": 32},
        "anchor_generator": {"type": "AnchorGenerator", "ratios": [1.0], "octave_base_scale": 8, "scales_per_octave": 1,
                             "strides": [8, 16, 32, 64, 128]},
        "loss_cls": {"type": "QualityFocalLoss", "use_sigmoid": True, "beta": 2.0, "loss_weight": 1.0},
        "loss_dfl": {"type": "DistributionFocalLoss", "loss_weight": 0.25},
        "loss_bbox": {"type": "GIoULoss", "loss_weight": 2.0}, "assigner": {"type": "ATSSAssigner", "topk": 9},
        "allowed_border": -1, "pos_weight": -1},
    "RetinaHead": {
        "stacked_convs": 4, "feat_channels": 256,
        "anchor_generator": {"type": "AnchorGenerator", "octave_base_scale": 4, "scales_per_octave": 3,
                             "ratios": [0.5, 1.0, 2.0], "strides": [8, 16, 32, 64, 128]},
        "bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0, 0.0, 0.0, 0.0],
                       "target_stds": [1.0, 1.0, 1.0, 1.0]},
        "loss_cls": {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0},
        "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
        "assigner": {"type": "MaxIoUAssigner", "pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0,
                     "ignore_iof_thr": -1},
        "allowed_border": -1, "pos_weight": -1}}
PUBLISHED_TEST = {"GFLHead": 0.6, "RetinaHead": 0.5}


@every_head
def test_a_head_of_a_type_and_a_class_count_is_the_published_one(head):
    base = small_config(head, neck={"out_channels": 256})
    brief = base | {"head": {"type": head, "num_classes": CLASSES}}
    full = base | {
        "head": {"type": head, "num_classes": CLASSES, "in_channels": 256} | PUBLISHED[head],
        "preprocess": {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "channel_order": "rgb"},
        "test": {"score_thr": 0.05, "nms_pre": 1000, "nms_iou_threshold": PUBLISHED_TEST[head], "max_per_img": 100,
                 "min_bbox_size": 0}}
    before = copy.deepcopy(brief)
    one, other = build_detector(brief).double(), build_detector(full).double()
    assert brief == before  # the configuration is not changed
    assert one.state_dict().keys() == other.state_dict().keys()
    enliven(one)
    other.load_state_dict(one.state_dict())
    images, targets = make_batch()
    assert same_losses(one.train().loss(images, targets), other.train().loss(images, targets))
    assert one.test == other.test and torch.equal(one.preprocess.mean, other.preprocess.mean)
    with torch.no_grad():
        for mine, theirs in zip(one.eval().predict(images, targets), other.eval().predict(images, targets)):
            assert len(mine["boxes"]) and all(torch.equal(mine[key], theirs[key]) for key in mine)


# --- unusual shapes ---

@every_head
def test_without_tower_the_head_predicts_from_the_features(head):
    model, (images, targets) = small_detector(head, head={"stacked_convs": 0, "feat_channels": 99}), make_batch()
    assert len(model.bbox_head.cls_convs) == 0 and model.bbox_head.tower_channels == 16
    found = gradients(model, model.train().loss(images, targets))
    assert all(grad.isfinite().all() for name, grad in found.items())


@every_head
def test_without_neck(head):
    strides = {"GFLHead": {"ratios": [1.0], "scales": [4]}, "RetinaHead": {"ratios": [0.5, 1.0], "scales": [4]}}[head]
    cfg = small_config(head, neck=None, backbone={"out_indices": [2]}, head={
        "anchor_generator": {"type": "AnchorGenerator", "strides": [16], **strides}})
    for variant in (cfg, {k: v for k, v in cfg.items() if k != "neck"}):
        model, (images, targets) = build_detector(variant).double(), make_batch()
        assert model.neck is None and model.feature_channels == [32]
        assert [tuple(x.shape) for x in model.extract_features(images)] == [(2, 32, 4, 6)]
        assert all(value.isfinite() for value in model.train().loss(images, targets).values())
        assert len(enliven(model).eval().predict(images, targets)) == 2


@every_head
def test_head_outputs_are_in_the_order_of_the_anchors(head):
    """A change in one feature changes the predictions only for its cell and the cells next to it."""
    model = enliven(small_detector(head, head={"stacked_convs": 0})).bbox_head
    sizes = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    maps = [torch.zeros(1, 16, h, w, dtype=torch.float64) for h, w in sizes]
    plain = model(maps)
    maps[1][0, :, 2, 3] += 1
    moved = model(maps)
    priors, level = model.priors(plain), slice(plain.cls.shape[1] * 96 // 129, None)
    changed = (moved.cls != plain.cls).any(-1)[0]
    expected = (priors.strides == 16) & ((priors.cells - torch.tensor([48, 32])).abs().amax(-1) <= 16)
    assert torch.equal(changed, expected) and changed[level].any()


@every_head
def test_run_from_a_cut_goes_on_as_the_head_itself_does(head):
    model, (images, _) = enliven(small_detector(head)), make_batch()
    features = model.extract_features(images)
    outputs = model.bbox_head(features, cuts=(0, 1, 2))
    assert outputs.cuts.keys() == {0, 1, 2}
    assert all(torch.equal(a, b) for a, b in zip(outputs.cuts[0][0], features))
    for cut, (cls_feats, reg_feats) in outputs.cuts.items():
        again = model.bbox_head.run_from(cut, cls_feats, reg_feats)
        assert torch.equal(again.cls, outputs.cls) and torch.equal(again.box, outputs.box)
    # A cut at k holds the activated output of the k-th convolution.
    assert all((x >= 0).all() for side in outputs.cuts[1] + outputs.cuts[2] for x in side)


@every_head
def test_comparing_where_no_anchor_counts_gives_zero(head):
    model, (images, targets) = enliven(small_detector(head)), make_batch()
    run = model.run(images, targets, assign=True)
    own, other = (model.bbox_head.comparable_boxes(run.outputs, run.assignment.priors) for _ in range(2))
    nothing = torch.zeros_like(run.assignment.label_weights)
    loss = build(model.bbox_head.kd_defaults["loss_reg_kd"], LOSSES, "loss_reg_kd")
    assert model.bbox_head.compare(own, other + 1, nothing, run.assignment.avg_factor, loss) == 0


def test_modules_outputs_are_kept_by_name_for_one_pass():
    model, (images, targets) = small_detector(), make_batch()
    run = model.run(images, targets, modules=("backbone.layer2", "neck"))
    assert run.modules.keys() == {"backbone.layer2", "neck"} and run.modules["backbone.layer2"].shape == (2, 16, 8, 12)
    assert all(torch.equal(a, b) for a, b in zip(run.modules["neck"], run.features))
    assert not any(module._forward_hooks for module in model.modules())
    assert model.run(images, targets, with_head=False).outputs is None


def test_names_are_the_references():
    model = small_detector()
    for name in ("backbone.layer1.0.conv1.weight", "neck.lateral_convs.0.conv.weight", "bbox_head.gfl_cls.weight",
                 "bbox_head.cls_convs.0.conv.weight", "bbox_head.cls_convs.0.gn.weight", "bbox_head.scales.0.scale"):
        assert name in model.state_dict()
    assert not any("preprocess" in key for key in model.state_dict())


def test_detectron2s_normaliser_is_a_running_mean():
    model, (images, targets) = small_detector("RetinaHead", head={"ema_normalizer": 0.9}).train(), make_batch()
    plain = small_detector("RetinaHead").train()
    plain.load_state_dict(model.state_dict(), strict=False)
    positives = plain.bbox_head.assign(plain.run(images, targets).outputs, targets).avg_factor
    expected = 100.0
    for _ in range(2):
        losses = model.loss(images, targets)
        expected = 0.9 * expected + 0.1 * positives
        torch.testing.assert_close(losses["loss_cls"], plain.loss(images, targets)["loss_cls"] * positives / expected)
    assert model.state_dict()["bbox_head.loss_normalizer"].item() == pytest.approx(float(expected))


def test_decoded_boxes_can_be_compared_in_place_of_deltas():
    images, targets = make_batch()
    head = {"reg_decoded_bbox": True, "loss_bbox": {"type": "GIoULoss"}}
    model = small_detector("RetinaHead", head=head).train()
    run = model.run(images, targets, assign=True)
    losses = model.losses(run)
    positive = run.assignment.positive > 0
    boxes = model.bbox_head.decode(run.outputs.box, run.assignment.priors)[positive]
    from torchvision.ops import generalized_box_iou_loss
    expected = generalized_box_iou_loss(boxes, run.assignment.box_targets[positive], reduction="mean")
    torch.testing.assert_close(losses["loss_bbox"], expected, rtol=1e-5, atol=0)


def test_frozen_batch_norm_in_a_detector_stays_as_it_is():
    model, (images, targets) = small_detector(backbone={"norm_cfg": "FrozenBN", "norm_eval": False}), make_batch()
    before = copy.deepcopy(model.backbone.state_dict())
    gradients(model, model.train()(images, targets))
    assert all(not m.training for m in model.modules() if isinstance(m, FrozenBatchNorm))
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())


def test_conv_module_has_a_bias_only_where_no_norm_follows():
    assert ConvModule(4, 4, 3).conv.bias is not None
    assert ConvModule(4, 4, 3, norm_cfg="BN").conv.bias is None
    assert ConvModule(4, 4, 3, norm_cfg="BN", bias=True).conv.bias is not None
