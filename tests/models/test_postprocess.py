"""From predictions to detections, compared with a slow version of the same steps."""
import pytest
import torch
from small_models import enliven, make_batch, small_detector
from torchvision.ops import nms

from models.postprocess import class_nms

every_head = pytest.mark.parametrize("head", ["GFLHead", "RetinaHead"])  # golden files test the others
TEST = {"score_thr": 0.4, "nms_pre": 60, "nms_iou_threshold": 0.5, "max_per_img": 30}


def detect(head="GFLHead", rescale=True, with_nms=True, **test):
    """Detections with the given `test` section, the model and its batch."""
    model, (images, targets) = enliven(small_detector(head, test=TEST | test)).eval(), make_batch()
    with torch.no_grad():
        return model.predict(images, targets, rescale=rescale, with_nms=with_nms), model, images, targets


def slow_detections(model, images, targets, test, rescale=True, with_nms=True):
    """Anchor by anchor, class by class."""
    with torch.no_grad():
        outputs = model.run(images, targets).outputs
    priors, results = model.bbox_head.priors(outputs), []
    for i, target in enumerate(targets):
        (h, w), (full_h, full_w) = target["image_size"], target["original_size"]
        scores, boxes = outputs.cls[i].sigmoid(), model.bbox_head.decode(outputs.box[i], priors)
        found, start = [], 0
        for size in priors.level_sizes:
            level = [(scores[p, c].item(), p, c) for p in range(start, start + size) for c in range(scores.shape[1])
                     if scores[p, c] > test["score_thr"]]
            level.sort(key=lambda entry: -entry[0])
            found += level[:test["nms_pre"]]
            start += size
        kept = []
        for score, p, c in found:
            x1, y1, x2, y2 = boxes[p].tolist()
            x1, x2 = (min(max(x, 0), w) * (full_w / w if rescale else 1) for x in (x1, x2))
            y1, y2 = (min(max(y, 0), h) * (full_h / h if rescale else 1) for y in (y1, y2))
            if x2 - x1 > 0 and y2 - y1 > 0:
                kept.append(([x1, y1, x2, y2], score, c))
        if with_nms:
            survivors = []
            for c in {c for _, _, c in kept}:  # each class separately
                own = [entry for entry in kept if entry[2] == c]
                keep = nms(torch.tensor([e[0] for e in own]).double(), torch.tensor([e[1] for e in own]).double(),
                           test["nms_iou_threshold"])
                survivors += [own[k] for k in keep]
            kept = sorted(survivors, key=lambda entry: -entry[1])[:test["max_per_img"]]
        results.append(kept)
    return results


@every_head
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("with_nms", [True, False])
def test_against_a_slow_rendering(head, rescale, with_nms):
    found, model, images, targets = detect(head, rescale, with_nms)
    slow = slow_detections(model, images, targets, TEST, rescale, with_nms)
    for mine, expected in zip(found, slow, strict=True):
        assert len(expected) > (10 if with_nms else 60)
        torch.testing.assert_close(mine["boxes"], torch.tensor([e[0] for e in expected]).double())
        torch.testing.assert_close(mine["scores"], torch.tensor([e[1] for e in expected]).double())
        assert mine["labels"].tolist() == [e[2] for e in expected]


def test_rescaling_is_to_the_original_size():
    scaled, _, _, targets = detect(with_nms=False)
    plain = detect(rescale=False, with_nms=False)[0]
    for a, b, target in zip(scaled, plain, targets):
        torch.testing.assert_close(a["boxes"], b["boxes"] * torch.tensor([3.0, 2, 3, 2]).double())
        h, w = target["image_size"]
        assert (b["boxes"] >= 0).all() and (b["boxes"] <= torch.tensor([w, h, w, h])).all()


def test_prediction_without_rescaling_needs_no_original_size():
    _, model, images, targets = detect()
    with torch.no_grad():
        model.predict(images, [{"image_size": t["image_size"]} for t in targets], rescale=False)


def test_scores_are_sorted_and_above_the_threshold():
    for found in detect()[0]:
        assert (found["scores"] > 0.4).all() and torch.equal(found["scores"], found["scores"].sort(descending=True)[0])


def test_a_score_at_the_threshold_is_not_enough():
    _, model, images, targets = detect()
    best = detect(with_nms=False)[0][0]["scores"].max().item()
    model.test.score_thr = best
    assert len(model.predict(images, targets)[0]["boxes"]) == 0
    model.test.score_thr = best - 1e-9
    assert len(model.predict(images, targets)[0]["boxes"]) == 1


@pytest.mark.parametrize("cap", [0, 1, 7, 12])
def test_max_per_img(cap):
    everything = detect(max_per_img=-1)[0]
    for found, every in zip(detect(max_per_img=cap)[0], everything, strict=True):
        assert len(every["boxes"]) > cap
        assert all(torch.equal(found[key], every[key][:cap]) for key in found)


def test_nms_pre_is_per_level():
    for k in (1, 5):
        found = detect(nms_pre=k, with_nms=False, score_thr=0.0)[0]
        assert all(len(f["boxes"]) == sum(min(k, 3 * cells) for cells in (96, 24, 6, 2, 1)) for f in found)
    assert all(len(f["boxes"]) == 3 * 129 for f in detect(nms_pre=-1, with_nms=False, score_thr=0.0)[0])


def test_nms_threshold():
    counts = [len(detect(nms_iou_threshold=thr, max_per_img=-1)[0][0]["boxes"]) for thr in (0.2, 0.5, 0.9)]
    assert counts == sorted(counts) and len(set(counts)) == 3


@pytest.mark.parametrize("head, expected", [("GFLHead", 0.6), ("RetinaHead", 0.5)])
def test_nms_threshold_is_the_heads_own_where_not_said(head, expected):
    for test in ({}, {"nms_iou_threshold": None}, {"score_thr": 0.1}):
        assert small_detector(head, test=test).test.nms_iou_threshold == expected


def test_min_bbox_size_is_in_output_pixels():
    everything = detect(with_nms=False)[0][0]["boxes"]
    sides = everything[:, 2:] - everything[:, :2]
    limit = sides.min(1)[0].median().item()
    found = detect(with_nms=False, min_bbox_size=limit)[0][0]["boxes"]
    assert torch.equal(found, everything[(sides > limit).all(1)]) and 0 < len(found) < len(everything)


def test_negative_min_bbox_size_keeps_boxes_without_area():
    # A box beyond the image has no area after clipping. It is dropped, unless all boxes are kept.
    model, (images, targets) = enliven(small_detector(test=TEST | {"min_bbox_size": -1})).eval(), make_batch()
    for target in targets:
        target["image_size"] = (10, 10)
    kept = model.predict(images, targets, with_nms=False)[0]["boxes"]
    model.test.min_bbox_size = 0
    dropped = model.predict(images, targets, with_nms=False)[0]["boxes"]
    area = (kept[:, 2:] - kept[:, :2]).prod(1)
    assert (area == 0).any() and torch.equal(dropped, kept[area > 0])


def test_clipping_after_nms():
    """detectron2's order: boxes are first suppressed and limited in number, then clipped and scaled."""
    found, model, images, targets = detect(clip="after", min_bbox_size=-1, max_per_img=20)
    with torch.no_grad():
        outputs = model.run(images, targets).outputs
    boxes = model.bbox_head.decode(outputs.box[0], model.bbox_head.priors(outputs))
    assert (boxes < 0).any()
    wide = [t | {"image_size": (10 ** 6, 10 ** 6)} for t in targets]  # no clipping at the right and bottom
    before = detect(min_bbox_size=-1, max_per_img=20)[0]
    assert any(len(a["boxes"]) != len(b["boxes"]) or not torch.equal(a["scores"], b["scores"])
               for a, b in zip(found, before))
    unclipped = model.predict(images, wide, rescale=False)
    for mine, other, target in zip(found, unclipped, targets):
        assert torch.equal(mine["scores"], other["scores"])  # the image size has no effect on the boxes kept
        h, w = target["image_size"]
        expected = torch.minimum(other["boxes"], torch.tensor([w, h, w, h]).double())
        torch.testing.assert_close(mine["boxes"], expected * torch.tensor([3.0, 2, 3, 2]).double())


def test_of_equal_scores_the_first_stays():
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 0, 29, 9], [1, 0, 10, 9], [20, 1, 29, 10], [40, 0, 49, 9]])
    for scores, keep in (([0.5] * 5, [0, 1, 4]), ([0.5, 0.5, 0.6, 0.5, 0.6], [2, 4, 1])):
        kept = class_nms(boxes, torch.tensor(scores), torch.tensor([0, 1, 0, 1, 0]), 0.5)
        assert kept.tolist() == keep
    many = torch.arange(1000.0)[:, None] * 10 + torch.tensor([0.0, 0, 9, 9])  # a sort that is not stable mixes so many
    assert class_nms(many, torch.full((1000,), 0.5), torch.zeros(1000).long(), 0.5).tolist() == list(range(1000))


def test_nothing_above_the_threshold():
    for found in detect(score_thr=0.9999)[0]:
        assert found["boxes"].shape == (0, 4) and len(found["scores"]) == len(found["labels"]) == 0


def test_one_anchor_may_be_detected_as_several_classes():
    found = detect(with_nms=False, score_thr=0.0, nms_pre=-1)[0][0]
    assert len(found["boxes"].unique(dim=0)) <= 129 and len(found["labels"].unique()) == 3
