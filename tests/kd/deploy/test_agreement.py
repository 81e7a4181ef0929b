"""Which differences between an exported file and the detector are rounding, and which are faults."""
from dataclasses import replace

import pytest
import torch
from small_models import enliven, small_config, small_detector

from data.inputs.files import make_sample
from kd.config import parse_config
from kd.deploy.agreement import Agreement, Candidates, check_export, compare
from kd.deploy.recipe import make_recipe
from kd.exceptions import ExportError
from models.deploy import DeployedDetector, suppress
from models.postprocess import TestConfig as Settings

SCALE = (96, 64)
TEST = {"score_thr": 0.0, "nms_pre": 1000, "max_per_img": 1000, "nms_iou_threshold": 0.6}


def check(detector, run, **options):
    """Check a function in the place of an exported file on noise and on an image of one colour."""
    noise = torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    samples = [make_sample(image, i, [SCALE]) for i, image in enumerate((noise, torch.full((3, 50, 70), 99).byte()))]
    cfg = parse_config({"model": small_config()})
    with torch.no_grad():
        return check_export(run, detector, samples, make_recipe(cfg, detector, ["a", "b", "c"], **options))


def tampered(detector, change=lambda *outputs: outputs, suppress=suppress, **test):
    deployed = DeployedDetector(detector, suppress=suppress)

    def run(images, sizes):
        own, detector.test = detector.test, replace(detector.test, **test)
        try:
            return list(change(*deployed(images, sizes)))
        finally:
            detector.test = own
    return run


def noisy(boxes, scores, labels):
    """Rounding: nearly equal scores change places."""
    scores = scores * (1 + 1e-5 * torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)))
    return boxes + 1e-5, scores, labels


def suppress_after_noise(boxes, scores, *more):
    return suppress(boxes, noisy(boxes, scores, None)[1], *more)


@pytest.fixture(params=["untrained", "lively"])
def detector(request):
    model = small_detector(dtype=torch.float32, test=TEST).eval()
    return enliven(model) if request.param == "lively" else model


@pytest.mark.parametrize("clip", ["before", "after"])
@pytest.mark.parametrize("cut", [{}, {"nms_pre": 50}, {"max_per_img": 20}, {"nms_iou_threshold": 0.0}], ids=str)
def test_rounding_is_accepted(detector, cut, clip):
    detector.test = replace(detector.test, clip=clip, **cut)
    found = check(detector, tampered(detector, noisy, suppress_after_noise))
    assert found.agrees and found.detections > 5 and 1e-6 < found.box < 1e-4 and found.score < 1e-4


@pytest.mark.parametrize("fixed, batches", [
    ({}, [(1, 64, 96), (1, 64, 96), (2, 64, 96)]), ({"batch": 1}, [(1, 64, 96)] * 2),
    ({"batch": 3, "height": 96, "width": 128}, [(3, 96, 128)] * 3)], ids=str)
def test_a_file_of_fixed_size_gets_that_size(fixed, batches):
    detector, seen = enliven(small_detector(dtype=torch.float32, test=TEST)).eval(), []
    run = tampered(detector)

    def watched(images, sizes):
        seen.append((len(sizes), *images.shape[2:]))
        return run(images, sizes)

    found = check(detector, watched, fixed=fixed)
    assert found.agrees and found.images == 2 and seen == batches


@pytest.mark.parametrize("clip", ["before", "after"])
@pytest.mark.parametrize("fault", [
    {"change": lambda boxes, scores, labels: (boxes + 0.02, scores, labels)},
    {"change": lambda boxes, scores, labels: (boxes, (scores + 0.002) * (scores > 0), labels)},
    {"change": lambda boxes, scores, labels: (boxes, scores, (labels + 1) % 3)},
    {"change": lambda boxes, scores, labels: (boxes, scores * (torch.arange(scores.shape[1]) != 5), labels)},
    {"suppress": lambda boxes, scores, *more: scores}, {"nms_iou_threshold": 0.3}, {"nms_iou_threshold": 0.8},
], ids=["boxes", "scores", "classes", "one is missing", "no suppression", "too much", "too little"])
def test_a_fault_is_refused(detector, fault, clip):
    detector.test = replace(detector.test, clip=clip)
    with pytest.raises(ExportError, match="does not agree with PyTorch"):
        check(detector, tampered(detector, **fault))


@pytest.mark.parametrize("fault", [{"nms_pre": 100}, {"nms_pre": 10}, {"score_thr": 0.7}, {"score_thr": 0.55}],
                         ids=str)
def test_another_limit_is_refused(fault):
    detector = enliven(small_detector(dtype=torch.float32, test=TEST | {"score_thr": 0.6, "nms_pre": 50})).eval()
    with pytest.raises(ExportError, match="does not agree with PyTorch"):
        check(detector, tampered(detector, **fault))


A, B, WEAK = ([0.0, 0, 9, 9], 0.9, 0), ([5.0, 5, 20, 20], 0.8, 1), ([1.0, 1, 2, 2], 0.0505, 2)
TWIN = ([1.0, 0, 9, 9], 0.9002, 0)  # suppresses A, and A suppresses it
NEXT = ([3.0, 0, 9, 9], 0.85, 0)    # A suppresses it, TWIN does not: 0.75 is more than their overlap


def found(*rows):
    boxes, scores, labels = zip(*rows)
    return {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}


def agreement(mine, theirs, *others, cap=6):
    """Compare detections where all of `mine` and `others` are candidates; only WEAK is at a limit."""
    every = found(*mine, *others)
    possible = Candidates(every["boxes"], every["boxes"], every["scores"], every["labels"], every["scores"] > 0.06)
    result = Agreement()
    compare(found(*mine), found(*theirs), possible, Settings(nms_iou_threshold=0.6, max_per_img=cap), result)
    return result


@pytest.mark.parametrize("theirs, agrees", [
    ([A, B], True), ([B, A], True), ([A, B, WEAK], True), ([A], False), ([A, B, B], False),
    ([TWIN, B], True), ([A, TWIN, B], False), ([NEXT, B], False), ([A, B, ([30.0, 30, 40, 40], 0.5, 0)], False),
    ([([0.0, 0, 9, 9.0009], 0.9, 0), B], True), ([([0.0, 0, 9, 9.002], 0.9, 0), B], False),
    ([([0.0, 0, 9, 9], 0.9009, 0), B], True), ([([0.0, 0, 9, 9], 0.902, 0), B], False),
    ([([0.0, 0, 9, 9], 0.9, 1), B], False)])
def test_comparing(theirs, agrees):
    assert agreement([A, B], theirs, WEAK, TWIN, NEXT).agrees == agrees


def test_the_largest_differences_are_said():
    result = agreement([A, B], [([0.0, 0, 9, 9.002], 0.9, 0), ([5.0, 5, 20, 20], 0.8004, 1)])
    assert not result.agrees and result.box == pytest.approx(0.002, rel=1e-3)
    assert result.score == pytest.approx(0.0004, rel=1e-3)


def test_comparing_at_the_cap():
    """Of those that end at the cap the last may be others."""
    rows, last = [A, B, ([21.0, 21, 28, 28], 0.7, 0)], ([40.0, 40, 50, 50], 0.6, 0)
    for score, agrees in ((0.6004, True), (0.64, False)):
        other = ([60.0, 60, 70, 70], score, 0)
        assert agreement([*rows, other], [*rows, last], last, cap=4).agrees == agrees
