"""A deployed detector gives the same detections as the detector."""
import pytest
import torch
from small_models import HEADS, VARIANTS, enliven, small_detector

from models import ConfigError
from models.deploy import DeployedDetector, best, suppress
from models.postprocess import class_nms

TEST = {"score_thr": 0.5, "nms_pre": 60, "max_per_img": 30}


def batch():
    """Pixels, and targets with the sizes before padding."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 96), generator=generator, dtype=torch.uint8)
    return images, [{"image_size": (64, 96)}, {"image_size": (50, 70)}]


@pytest.mark.parametrize("head", [*HEADS, *VARIANTS])
@pytest.mark.parametrize("test", [{}, {"clip": "after", "min_bbox_size": -1}, {"min_bbox_size": 2.0},
                                  {"clip": "after", "min_bbox_size": 2.0}], ids=str)
@pytest.mark.parametrize("preprocess", [{}, {"channel_order": "bgr", "mean": [90.0, 100.0, 110.0],
                                             "std": [50.0, 60.0, 70.0]}], ids=["rgb", "bgr"])
def test_detections_are_the_detectors(head, test, preprocess):
    test = TEST | test | ({"score_thr": 0.25} if head == "GFLv2" else {})  # its scores are products
    detector = enliven(small_detector(head, dtype=torch.float32, test=test, preprocess=preprocess)).eval()
    images, targets = batch()
    sizes = torch.tensor([target["image_size"] for target in targets])
    with torch.no_grad():
        boxes, scores, labels = DeployedDetector(detector)(images, sizes)
        dirty = images.clone()
        dirty[1, :, 50:], dirty[1, :, :, 70:] = 255, 7  # pixels beyond an image have no effect
        again = DeployedDetector(detector)(dirty, sizes)
        expected = detector.predict(detector.preprocess(images, targets), targets, rescale=False)
    assert boxes.shape == (2, 30, 4) and scores.shape == labels.shape == (2, 30) and labels.dtype == torch.int64
    assert torch.equal(again[0], boxes) and torch.equal(again[1], scores)
    for i, one in enumerate(expected):
        real = scores[i] > 0
        assert len(one["scores"]) == real.sum() > 0
        torch.testing.assert_close(scores[i][real], one["scores"])
        torch.testing.assert_close(boxes[i][real], one["boxes"])
        assert torch.equal(labels[i][real], one["labels"])


@pytest.mark.parametrize("head", [*HEADS, *VARIANTS])
def test_without_suppression_all_candidates_come_out(head):
    detector = enliven(small_detector(head, dtype=torch.float32, test=TEST)).eval()
    images, targets = batch()
    with torch.no_grad():
        boxes, scores, labels = DeployedDetector(detector, with_nms=False)(images, torch.tensor([[64, 96], [50, 70]]))
        expected = detector.predict(detector.preprocess(images, targets), targets, rescale=False, with_nms=False)
    assert scores.shape == (2, 5 * 60)
    for i, one in enumerate(expected):
        real = scores[i] > 0
        torch.testing.assert_close(boxes[i][real], one["boxes"])
        torch.testing.assert_close(scores[i][real], one["scores"])
        assert torch.equal(labels[i][real], one["labels"])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("test", [{}, {"clip": "after"}, {"clip": "after", "min_bbox_size": 8.0}, {"max_per_img": 400}],
                         ids=str)
def test_end_to_end_the_detections_are_counted_and_come_first(head, test):
    """The same detections as without the count; the number of entries is fixed, also where there are not as many."""
    detector = enliven(small_detector(head, dtype=torch.float32, test=TEST | test)).eval()
    images, _ = batch()
    sizes = torch.tensor([[64, 96], [3, 3]])
    with torch.no_grad():
        boxes, scores, labels = DeployedDetector(detector)(images, sizes)
        count, *found = DeployedDetector(detector, end2end=True)(images, sizes)
    assert count.shape == (2, 1) and count.dtype == torch.int32 and found[0].shape == (2, detector.test.max_per_img, 4)
    for i, k in enumerate(count.squeeze(1).tolist()):
        real = scores[i] > 0
        assert k == real.sum() and found[2].dtype == torch.int64
        for mine, theirs in zip((boxes, scores, labels), found):
            assert torch.equal(mine[i][real], theirs[i][:k])
        assert not found[0][i][k:].any() and not found[1][i][k:].any() and (found[2][i][k:] == -1).all()
    assert 0 < count[0] and count.min() < detector.test.max_per_img


def test_suppression_is_of_each_class_of_each_image_by_itself():
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(3, 40, 2, generator=generator) * 30 - 10
    boxes = torch.cat([corner, corner + 5 + 10 * torch.rand(3, 40, 2, generator=generator)], dim=-1)
    scores, labels = torch.rand(3, 40, generator=generator), torch.randint(0, 4, (3, 40), generator=generator)
    scores[:, ::5] = 0
    kept = suppress(boxes, scores, labels, 4, 0.3, 100)
    for i in range(3):
        real = (scores[i] > 0).nonzero().squeeze(1)
        keep = real[class_nms(boxes[i][real], scores[i][real], labels[i][real], 0.3)]
        expected = torch.zeros(40)
        expected[keep] = scores[i][keep]
        assert torch.equal(kept[i], expected) and 5 < len(keep) < len(real)
    assert not suppress(boxes, torch.zeros_like(scores), labels, 4, 0.3, 100).any()


@pytest.mark.parametrize("k", [1, 7, 40, 100])
def test_of_equal_scores_the_first_come_first(k):
    scores = torch.randint(0, 5, (3, 100), generator=torch.Generator().manual_seed(0)) / 4  # in the end only ties
    for rows in (scores, torch.zeros(2, 100), scores.double()):
        expected = [sorted(range(100), key=lambda place: -row[place])[:k] for row in rows.tolist()]  # sorted is stable
        kept, places = best(rows, k)
        assert places.tolist() == expected and torch.equal(kept, rows.gather(1, places))


@pytest.mark.parametrize("head", [*HEADS, *VARIANTS])
@pytest.mark.parametrize("with_nms", [True, False])
def test_equal_scores_come_in_the_order_of_level_location_and_class(head, with_nms):
    """A head without weights gives the same score everywhere, so only the order decides."""
    detector = small_detector(head, dtype=torch.float32, test={"score_thr": 0.0, "nms_pre": 7, "max_per_img": 30,
                                                               "min_bbox_size": -1}).eval()
    for parameter in detector.bbox_head.parameters():
        parameter.data.zero_()
    images, targets = batch()
    with torch.no_grad():
        expected = detector.predict(detector.preprocess(images, targets), targets, rescale=False, with_nms=with_nms)
        sizes = torch.tensor([target["image_size"] for target in targets])
        found = DeployedDetector(detector, with_nms)(images, sizes)
    for one, boxes, scores, labels in zip(expected, *found):
        real = scores > 0
        assert torch.equal(boxes[real], one["boxes"]) and torch.equal(labels[real], one["labels"])
        assert len(one["scores"].unique()) == 1 and len(one["scores"]) > 5
        if not with_nms:
            assert one["labels"][:14].tolist() == [0, 1, 2, 0, 1, 2, 0] * 2  # the first seven of two levels
            centers = (boxes[:, :2] + boxes[:, 2:])[:7]
            assert (centers[:, 0].diff() >= 0).all()


@pytest.mark.parametrize("name", ["nms_pre", "max_per_img"])
def test_an_open_number_of_detections_is_refused(name):
    with pytest.raises(ConfigError, match=f"model.test.{name}: must be at least 1"):
        DeployedDetector(small_detector(test={name: -1}))


def test_it_is_in_evaluation_mode_with_all_that_is_in_it():
    detector = small_detector(backbone={"norm_eval": False}).train()
    assert not any(module.training for module in DeployedDetector(detector).modules())
    assert not detector.training
