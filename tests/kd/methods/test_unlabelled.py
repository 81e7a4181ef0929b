"""Unlabelled images in a batch: the student's own losses skip them, and only methods that need no labels see them."""
import copy

import pytest
import torch
from method_entries import NEED_LABELS, NEED_NONE, shown
from small_models import HEADS, gradients, make_batch, small_detector, small_distiller, teacher_entry

from kd.distiller import seen_by

SIZES, LABELLED = ((64, 96), (50, 70), (60, 90), (33, 65), (64, 64)), 2


def mixed_batch(ignored=0):
    """Two labelled images and three unlabelled ones, whose targets have nothing but sizes."""
    images, targets = make_batch(SIZES, (4, 2, 3, 1, 2), ignored=ignored)
    bare = [{key: target[key] for key in ("image_size", "original_size")} | {"unlabelled": True}
            for target in targets[LABELLED:]]
    return images, targets[:LABELLED] + bare


def labelled_alone(images, targets):
    return images[:LABELLED], targets[:LABELLED]


def assert_close(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert (value is None) == (second[key] is None), key
        if value is not None:
            torch.testing.assert_close(value, second[key], rtol=1e-12, atol=1e-14, msg=key)


@pytest.mark.parametrize("head", HEADS)
def test_the_students_losses_are_those_of_the_labelled_images(head):
    detector, batch = small_detector(head).train(), mixed_batch(ignored=1)
    mixed, alone = (detector.loss(*each) for each in (batch, labelled_alone(*batch)))
    assert_close(mixed, alone)
    assert_close(gradients(detector, mixed), gradients(detector, alone))
    _, run = detector.loss_and_pass(*batch)
    assert torch.equal(run.positives, detector.loss_and_pass(*labelled_alone(*batch))[1].positives)


def test_the_running_normaliser_of_detectron2_counts_labelled_images_only():
    detectors = [small_detector("RetinaHead", head={"ema_normalizer": 0.9}).train() for _ in range(2)]
    batch = mixed_batch()
    assert_close(detectors[0].loss(*batch), detectors[1].loss(*labelled_alone(*batch)))
    assert torch.equal(*(detector.bbox_head.loss_normalizer for detector in detectors))


@pytest.mark.parametrize("entry", NEED_LABELS, ids=shown)
def test_methods_that_need_labels_see_only_the_labelled_images(entry):
    model, batch = small_distiller(entry), mixed_batch()
    mixed, alone = (model.loss(*each) for each in (batch, labelled_alone(*batch)))
    assert_close(mixed, alone)
    assert_close(gradients(model, mixed), gradients(model, alone))


@pytest.mark.parametrize("entry", NEED_NONE, ids=shown)
def test_methods_that_need_none_learn_from_the_unlabelled_images(entry):
    """Each unlabelled image gets a gradient from the method, and none from the student's own losses."""
    model, (images, targets) = small_distiller(entry), mixed_batch()
    images.requires_grad_()
    torch.manual_seed(0)
    losses = model.loss(images, targets)
    of_method = [value for values in model.by_method(losses).values() for value in values]
    own = [losses[key] for key in losses if not any(losses[key] is value for value in of_method)]
    for values, sees in ((own, False), (of_method, True)):
        gradient, = torch.autograd.grad(sum(values), images, retain_graph=True)
        touched = gradient.flatten(1).abs().amax(1) > 0
        assert touched[:LABELLED].all() and (touched[LABELLED:] == sees).all()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["Mimic", "KD"])
def test_normalisers_count_positives_as_if_all_images_had_as_many(kind, head):
    """So a batch with its own images once more, without their labels, has the same losses on scores and boxes."""
    model, (images, targets) = small_distiller({"type": kind}, head=head), make_batch(ignored=0)
    alone = model.loss(images, targets)
    again = [{key: target[key] for key in ("image_size", "original_size")} | {"unlabelled": True} for target in targets]
    twice = model.loss(torch.cat([images] * 2), targets + again)
    assert alone.keys() == twice.keys()
    # RetinaNet leaves out anchors that are neither objects nor background. Without labels it does not know them.
    exact = head != "RetinaHead"
    for key in alone:  # 1e-7: what is added to a normaliser is not multiplied
        tolerance = 1e-7 if exact or not key.endswith("kd") else 0.2
        torch.testing.assert_close(twice[key], alone[key], rtol=tolerance, atol=1e-12, msg=f"{key} {alone} {twice}")


def test_the_normaliser_as_a_formula():
    """KD with three unlabelled images: sum over all anchors that take part / (positives * 5 / 2)."""
    model, batch = small_distiller({"type": "KD", "T": 2.0}), mixed_batch()
    student, (teacher,), _ = model.passes(*batch)
    positives = student.labelled.assignment.positive.sum(1).clamp(min=1).sum()
    total = 0.0
    for image in range(5):
        own, other = ((x.outputs.cls[image] / 2).sigmoid() for x in (student, teacher))
        divergence = other * (other / own).log() + (1 - other) * ((1 - other) / (1 - own)).log()
        weight = student.assignment.label_weights[image]
        assert weight.max() == 1 and (image < 2 or set(weight.tolist()) <= {0.0, 1.0})
        total = total + 4 * (divergence.sum(-1) * weight).sum()
    expected = total / (positives * 5 / 2 + torch.finfo(torch.float32).eps)
    assert model.loss(*batch)["loss_kd"].item() == pytest.approx(expected.item(), rel=1e-9)


def test_centerness_is_of_labelled_positives_alone():
    entry = {"type": "Mimic", "loss_center_kd": {"type": "CrossEntropyLoss"}}
    model, batch = small_distiller(entry, head="ATSSHead"), mixed_batch()
    mixed, alone = (model.loss(*each)["loss_center_kd"] for each in (batch, labelled_alone(*batch)))
    torch.testing.assert_close(mixed, alone, rtol=1e-12, atol=0)


def test_labels_of_marked_images_are_not_read():
    model, (images, targets) = small_distiller({"type": "Mimic"}), make_batch(SIZES, (4, 2, 3, 1, 2))
    marked = targets[:LABELLED] + [target | {"unlabelled": True} for target in targets[LABELLED:]]
    first = model.loss(images, marked)
    for target in marked[LABELLED:]:
        target["boxes"], target["labels"] = target["boxes"] + 7, 1 - target["labels"].clamp(max=1)
    assert_close(first, model.loss(images, marked))


def test_a_teacher_whose_methods_need_labels_runs_on_the_labelled_images_alone():
    model = small_distiller({"type": "FGD"}, {"type": "PKD", "every": 2},
                            teacher=[teacher_entry(), teacher_entry(name="other")])
    batch = mixed_batch()
    for step, count in ((0, 5), (1, LABELLED)):
        model.advance(step, 10, 2)
        student, teachers, _ = model.passes(*batch)
        assert [len(teacher.images) for teacher in teachers] == [count] * 2
        assert len(student.images) == 5
        for method in model.methods[0]:
            seen = {len(each.targets) for each in seen_by(method, student, teachers[0])}
            assert seen == {LABELLED} or not method.needs_labels
        model.loss(*batch)


def test_modules_and_cuts_are_cut_too():
    model = small_distiller({"type": "FGD", "student_modules": ["neck.fpn_convs.0.conv"]},
                            {"type": "CrossKD", "reused_teacher_head_idx": 1})
    batch = mixed_batch()
    mixed, alone = (model.loss(*each) for each in (batch, labelled_alone(*batch)))
    torch.testing.assert_close(mixed["loss_fgd"], alone["loss_fgd"], rtol=1e-12, atol=0)
    student, _, _ = model.passes(*batch)
    own = student.labelled
    assert {len(x) for towers in own.outputs.cuts.values() for maps in towers for x in maps} == {LABELLED}
    maps = [*own.features, *own.modules.values(), own.outputs.cls, own.assignment.labels]
    assert {len(x) for x in maps} == {LABELLED}


def test_order_and_batches_without_labels():
    model, (images, targets) = small_distiller({"type": "Mimic"}), mixed_batch()
    for wrong in (targets[::-1], targets[LABELLED:] + targets[LABELLED:LABELLED + 2]):
        with pytest.raises(ValueError, match="at least one labelled image, and its unlabelled images must come last"):
            model.loss(images, wrong)


def test_batch_norms_see_all_images():
    entry = {"type": "PKD"}
    means = []
    for cut in (slice(None), slice(LABELLED)):
        model = small_distiller(entry, student={"backbone": {"norm_eval": False}})
        images, targets = mixed_batch()
        model.loss(images[cut], targets[cut])
        means.append(copy.deepcopy(model.student.backbone.layer4[0].bn1.running_mean))
    assert not torch.allclose(*means)


def test_a_measured_weight_sees_what_the_method_sees():
    """The share is of the gradients that training gets: the student's of labelled images, the method's of all."""
    model, (images, targets) = small_distiller({"type": "PKD", "weight": {"gradient_share": 0.3}}), mixed_batch()
    losses, run = model.loss_and_pass(images, targets)
    norms = model.gradient_norms(losses, run.features)
    assert norms["PKD0"] / norms["student"] == pytest.approx(0.3, rel=1e-6)
