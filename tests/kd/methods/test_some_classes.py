"""Teachers that know only some of the student's classes: `class_map` with null."""
import pytest
import torch
from small_models import (
    CLASSES,
    falls,
    gradients,
    make_batch,
    small_config,
    small_detector,
    small_distiller,
    teacher_entry,
)

from kd import METHODS, build_distiller
from kd.methods.base import Method
from models import ConfigError

PREDICTION = [{"type": "CrossKD", "reused_teacher_head_idx": 1}, {"type": "Mimic"}, {"type": "KD"}, {"type": "DKD"},
              {"type": "CWD", "on": "logits"}, {"type": "BCKD"}, {"type": "FRS"}]
KL = {"type": "KnowledgeDistillationKLDivLoss", "loss_weight": 10, "T": 2}
LDS = [{"type": "LD"}, {"type": "LD", "vlr_weight": 0.25}]
LD_CLASSES = {"type": "LD", "loss_kd": KL, "loss_kd_vlr": KL}
KNOWN, UNKNOWN = [0, 2], [1]
MAP = [4, None, 1]  # of a teacher with five classes


def name(value):
    return value if isinstance(value, str) else "-".join(str(v) for v in value.values())


def specialist(head="GFLHead", class_map=MAP, classes=5, **more):
    return teacher_entry(head, head_={"num_classes": classes}) | {"class_map": class_map} | more


def columns(distiller, value):
    """Rows of the student's classifier as (anchors, classes, ...)."""
    return value.unflatten(0, (-1, distiller.student.bbox_head.num_classes))


def of_methods(distiller, losses):
    return {str(i): value for i, value in enumerate(sum(distiller.by_method(losses).values(), []))}


@pytest.mark.parametrize("head", ["GFLHead", "RetinaHead", "ATSSHead", "FCOSHead"])
@pytest.mark.parametrize("method", [*PREDICTION[1:], LD_CLASSES], ids=lambda method: name(method)[:12])
def test_no_gradient_in_the_other_classes(method, head):
    if method is LD_CLASSES and head != "GFLHead":
        pytest.skip("LD needs two GFL heads")
    model = small_distiller(method, head=head, teacher=specialist(head))
    losses = model.loss(*make_batch())
    found = gradients(model, of_methods(model, losses))
    for part in ("weight", "bias"):
        grad = columns(model, found[f"student.bbox_head.{model.student.bbox_head.classifier}.{part}"])
        assert (grad[:, UNKNOWN] == 0).all() and (grad[:, KNOWN] != 0).any()


@pytest.mark.parametrize("head", ["GFLHead", "FCOSHead"])
def test_no_gradient_in_the_other_classes_of_crossed_heads(head, monkeypatch):
    model = small_distiller(PREDICTION[0], head=head, teacher=specialist(head))
    method, seen = model.methods[0][0], []
    crossed = method.cross_head

    def watched(*args):
        seen.append(crossed(*args))
        seen[-1].cls.retain_grad()
        return seen[-1]

    monkeypatch.setattr(method, "cross_head", watched)
    model.loss(*make_batch())["loss_cls_kd"].backward()
    grad = seen[0].cls.grad
    assert (grad[..., UNKNOWN] == 0).all() and (grad[..., KNOWN] != 0).any()


@pytest.mark.parametrize("method, key", [(PREDICTION[0], "loss_cls_kd"), (PREDICTION[1], "loss_cls_kd"),
                                         (PREDICTION[2], "loss_kd"), (PREDICTION[5], "loss_cls_kd")], ids=name)
def test_two_specialists_are_as_good_as_one_teacher_of_all(method, key):
    """Their class losses add up to those of a teacher with the same weights that knows all classes."""
    whole = small_distiller(method)
    parts = small_distiller(method, teacher=[specialist(class_map=[0, None, 2], classes=CLASSES, name="a"),
                                             specialist(class_map=[None, 1, None], classes=CLASSES, name="b")])
    parts.student.load_state_dict(whole.student.state_dict())
    for teacher in parts.teachers:
        given, head = whole.teacher.state_dict(), teacher.bbox_head
        for key_, value in teacher.state_dict().items():
            if head.classifier in key_:
                columns(whole, value)[:, head.known.numbers] = columns(whole, given[key_])[:, head.known.numbers]
            else:
                value.copy_(given[key_])
    expected, found = whole.loss(*make_batch())[key], parts.loss(*make_batch())
    torch.testing.assert_close(sum(v for k, v in found.items() if k.startswith(f"{key}/")), expected, rtol=1e-12,
                               atol=0)


def passes(method, **more):
    model = small_distiller(method, teacher=specialist(**more))
    student, (teacher,), _ = model.passes(*make_batch())
    return model.methods[0][0], student, teacher


def test_the_box_loss_leaves_out_anchors_of_other_classes():
    """CrossKD's box loss, written out: KL divergence of the sides, weighted by the teacher's best known score."""
    method, student, teacher = passes({"type": "Mimic"})
    labels, total, weights = student.assignment.labels, 0.0, 0.0
    assert {1} < set(labels.unique().tolist())
    own, other = (seen.outputs.box.unflatten(-1, (4, 9)).log_softmax(-1) for seen in (student, teacher))
    for image, anchor in zip(*torch.where(student.assignment.label_weights != 0)):
        if labels[image, anchor] in UNKNOWN:
            continue
        weight = teacher.outputs.cls[image, anchor, KNOWN].sigmoid().max()
        p, q = other[image, anchor], own[image, anchor]
        total, weights = total + weight * (p.exp() * (p - q)).sum() / 4, weights + weight
    torch.testing.assert_close(method(student, teacher)["loss_reg_kd"], 4.0 * total / weights, rtol=1e-6, atol=0)


def test_dkd_is_a_softmax_over_the_known_classes():
    method, student, teacher = passes({"type": "DKD"})
    assignment, total = student.assignment, 0.0
    for image, anchor in zip(*torch.where(assignment.positive > 0)):
        label = int(assignment.labels[image, anchor])
        if label in UNKNOWN:
            continue
        true, rest = KNOWN.index(label), 1 - KNOWN.index(label)
        p, q = ((seen.outputs.cls[image, anchor, KNOWN] / 4).softmax(-1) for seen in (teacher, student))
        # Among the others there is one class only, so its share is 1 on both sides.
        total = total + 16 * sum(p[k] * (p[k] / q[k]).log() for k in (true, rest))
    torch.testing.assert_close(method(student, teacher)["loss_dkd"], total / assignment.avg_factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", LDS, ids=name)
def test_ld_leaves_out_boxes_of_other_classes(method):
    """With a target of another class alone, there is no loss; with one that the teacher knows, there is."""
    model = small_distiller(method, teacher=specialist())
    for label in range(CLASSES):
        images, targets = make_batch()
        for target in targets:
            target["labels"] = torch.full_like(target["labels"], label)
        losses = model.loss(images, targets)
        found = [value for key, value in losses.items() if key.startswith("loss_ld")]
        assert len(found) == len(method)
        assert all((value == 0) == (label in UNKNOWN) for value in found)


@pytest.mark.parametrize("xi", [0.8, 1.0])  # with 1, the teacher's score of the class plays no part
def test_pgd_leaves_out_objects_of_other_classes(xi):
    """Their key regions are missing, and their cells are no background."""
    method, student, teacher = passes({"type": "PGD", "topk": 5, "xi_cls": xi, "xi_reg": xi})
    found = method.regions(student, teacher)
    whole = student.targets
    student.targets = [target | {key: target[key][target["labels"] != UNKNOWN[0]] for key in ("boxes", "labels")}
                       for target in whole]
    without = method.regions(student, teacher)
    teacher.head.known = None
    student.targets = [target | {"labels": torch.zeros_like(target["labels"])} for target in whole]
    of_all = method.regions(student, teacher)
    assert torch.equal(found.cls, without.cls) and torch.equal(found.reg, without.reg) and (found.cls > 0).any()
    assert torch.equal(found.background, of_all.background) and (without.background > found.background).any()


@pytest.mark.parametrize("method", [*PREDICTION, *LDS, LD_CLASSES, {"type": "GI"}, {"type": "PGD"}, {"type": "FGD"},
                                    {"type": "PKD"}],
                         ids=lambda method: f"{name(method)[:12]}{len(method)}")
def test_it_learns_without_objects_that_the_teacher_knows(method):
    """All objects are of a class that it does not know, or there are none: losses and gradients are finite."""
    model = small_distiller(method, teacher=specialist())
    for counts in ((4, 2), (0, 0)):
        images, targets = make_batch(counts=counts)
        for target in targets:
            target["labels"] = torch.full_like(target["labels"], UNKNOWN[0])
        losses = model.loss(images, targets)
        assert all(value.isfinite() for value in losses.values())
        assert all(g is None or g.isfinite().all() for g in gradients(model, losses).values())


@pytest.mark.parametrize("method", [*PREDICTION[:4], {"type": "FGD"}], ids=name)
def test_two_specialists_train_one_student(method):
    falls(small_distiller(method, teacher=[specialist(class_map=[0, None, 1], classes=2, name="a"),
                                           specialist(class_map=[1, 2, None], classes=4, name="b")],
                          dtype=torch.float32))


@pytest.mark.parametrize("head", ["GFLHead", "RetinaHead", "FCOSHead"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_detects_no_class_that_it_does_not_know(head, dtype):
    detector = small_detector(head, head={"num_classes": 5}, test={"score_thr": 0.0}).eval()
    detector.bbox_head.select_classes(MAP)
    images, targets = make_batch()
    with torch.no_grad():
        outputs = detector.to(dtype).run(images.to(dtype), targets).outputs
        assert (outputs.cls.sigmoid()[..., UNKNOWN] == 0).all() and outputs.cls.half().isfinite().all()
        found = torch.cat([d["labels"] for d in detector.double().predict(images, targets)])
    assert set(found.tolist()) == set(KNOWN)


def test_its_head_gives_the_student_only_what_it_knows(reported):
    entry = specialist(class_map=[0, None, 2], classes=CLASSES)
    model = build_distiller({"model": small_config(), "distill": {
        "teacher": entry, "methods": [{"type": "FGD"}], "init_student": True}})
    head, teacher = model.student.bbox_head, model.teacher.bbox_head
    for ours, theirs in ((head.gfl_cls.weight, teacher.gfl_cls.weight), (head.gfl_cls.bias, teacher.gfl_cls.bias)):
        assert torch.equal(ours[KNOWN], theirs[KNOWN]) and not torch.equal(ours[UNKNOWN], theirs[UNKNOWN])
    assert head.gfl_cls.bias.min() > -10 and torch.equal(head.gfl_reg.weight, teacher.gfl_reg.weight)
    assert head.known is None and "of gfl_cls only the classes that the teacher knows" in reported()


@pytest.mark.parametrize("entry, message", [
    (specialist(class_map=[None, None, None]), "class_map: is null for every class"),
    (specialist(class_map=[0, None, 5]), r"class_map: must name classes among 0\.\.4, not \[0, null, 5\]"),
    (specialist(class_map=[0, None]), "class_map: has 2 entries for the student's 3 classes"),
    (specialist(class_map=[0, None, -1]), "class_map.2: must be at least 0"),
    (specialist(class_map=[0, None, "a"]), "class_map.2: must be an integer")])
def test_maps_that_are_refused(entry, message):
    with pytest.raises(ConfigError, match=f"^distill.teacher.{message}") as caught:
        small_distiller({"type": "KD"}, teacher=entry)
    assert "\n" not in str(caught.value)


def test_a_map_with_null_needs_the_teachers_class_count():
    entry = specialist(class_map=[0, None, 1])
    del entry["model"]["head"]["num_classes"]
    with pytest.raises(ConfigError, match="class_map: needs the teacher's own class count"):
        small_distiller({"type": "KD"}, teacher=entry)


def test_methods_that_need_more_classes(monkeypatch):
    with pytest.raises(ConfigError, match="loss_kd: compares classes .* the teacher knows only one: remove this loss"):
        small_distiller(LD_CLASSES, teacher=specialist(class_map=[0, None, None]))
    with pytest.raises(ConfigError, match="methods.0: DKD compares classes .* the teacher knows only one; use KD"):
        small_distiller({"type": "DKD"}, teacher=specialist(class_map=[None, None, 1]))

    class ScoreGap(Method):
        teacher_head = True

        def __init__(self, student, teacher):
            super().__init__()

    monkeypatch.setitem(METHODS, "ScoreGap", ScoreGap)
    with pytest.raises(ConfigError, match="methods.0: ScoreGap compares all classes, and .* null for some"):
        small_distiller({"type": "ScoreGap"}, teacher=specialist())
    assert small_distiller({"type": "ScoreGap"}).methods


def test_what_is_compared_is_shown():
    method, student, teacher = passes({"type": "Mimic"})
    anchors = student.outputs.cls.shape[1]
    assert method.links(student, teacher)[0] == (f"student class scores (2, {anchors}, 2) <- teacher class scores "
                                                 f"(2, {anchors}, 2)")
