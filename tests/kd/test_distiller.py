"""The distiller: what runs, is trained and is saved, names of losses, and what is refused."""
import copy

import pytest
import torch
from small_models import falls, gradients, make_batch, same_losses, small_config, small_detector, teacher_entry
from small_models import small_distiller as make

from kd import METHODS, Method, build_distiller
from kd.methods.crosskd import CrossKD
from losses import rescaled_channels
from models import ConfigError, Preprocess, build_detector

CROSSKD, FGD = {"type": "CrossKD", "reused_teacher_head_idx": 1}, {"type": "FGD"}
CAFFE = {"mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0], "channel_order": "bgr"}


def count_calls(monkeypatch, module, name):
    calls, original = [], getattr(module, name)

    def wrapper(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapper)
    return calls


# --- the teacher's state ---

def test_the_teacher_is_frozen_and_not_registered():
    model = make(CROSSKD, FGD)
    assert not any(p.requires_grad for p in model.teacher.parameters())
    own = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()} | {id(m) for m in model.modules()}
    assert not own & {id(x) for x in [*model.teacher.parameters(), *model.teacher.buffers(), *model.teacher.modules()]}
    assert not any("teacher" in key for key in model.state_dict())
    assert {key.split(".")[0] for key in model.state_dict()} == {"student", "methods"}
    assert sum(p.requires_grad for p in model.student.parameters()) == len(list(model.student.parameters()))


def test_the_students_state_is_a_plain_detectors():
    model = make(CROSSKD, FGD)
    plain = build_detector(small_config())
    assert list(model.student.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.student.state_dict(), strict=True)


@pytest.mark.parametrize("eval_teacher", [None, True, False])
def test_modes(eval_teacher):
    options = {} if eval_teacher is None else {"eval_teacher": eval_teacher}
    backbone = {"norm_eval": False}
    model = make(FGD, teacher=teacher_entry(backbone=backbone), student={"backbone": backbone}, **options)
    for mode in (True, False, True):
        assert model.train(mode) is model and model.training == model.student.training == mode
        expected = mode and eval_teacher is False
        assert all(m.training == expected for m in model.teacher.modules())
    before = copy.deepcopy(model.teacher.state_dict())
    model.loss(*make_batch())
    changed = [key for key, value in model.teacher.state_dict().items() if not torch.equal(value, before[key])]
    assert bool(changed) == (eval_teacher is False) and all("running" in k or "num_batches" in k for k in changed)


def test_the_teacher_follows_to():
    model = make(FGD)
    for move, dtype in ((model.float, torch.float32), (model.double, torch.float64),
                        (lambda: model.to(torch.bfloat16), torch.bfloat16)):
        assert move() is model
        for detector in (model.student, model.teacher):
            assert {p.dtype for p in detector.parameters()} == {dtype}
    model.to("meta")
    assert {p.device.type for p in model.teacher.parameters()} == {"meta"}


# --- what runs ---

@pytest.mark.parametrize("methods", [[CROSSKD], [FGD], [CROSSKD, FGD], [CROSSKD, {**CROSSKD, "name": "two"}, FGD, FGD]])
def test_each_detector_runs_once_per_batch(methods, monkeypatch):
    model = make(*methods)
    calls = [count_calls(monkeypatch, detector, "extract_features") for detector in (model.student, model.teacher)]
    student_head = count_calls(monkeypatch, model.student.bbox_head, "forward")
    assigned = count_calls(monkeypatch, model.student.bbox_head, "assign")
    model.loss(*make_batch())
    assert [len(c) for c in calls] == [1, 1] and len(student_head) == len(assigned) == 1


@pytest.mark.parametrize("methods, runs", [([FGD], 0), ([CROSSKD, FGD], 1)])
def test_the_teachers_head_runs_only_where_it_is_needed(methods, runs, monkeypatch):
    model = make(*methods)
    calls = count_calls(monkeypatch, model.teacher.bbox_head, "forward")
    model.loss(*make_batch())
    assert len(calls) == runs


def test_evaluation_is_the_students_alone(monkeypatch):
    model = make(CROSSKD, FGD).eval()
    calls = count_calls(monkeypatch, model.teacher, "extract_features")
    images, targets = make_batch()
    with torch.no_grad():
        found = [model(images, targets), model.predict(images, targets)]
        expected = model.student.predict(images, targets)
    for detections in found:
        assert all(torch.equal(mine[key], own[key]) for mine, own in zip(detections, expected) for key in own)
    assert not calls


def test_forward_in_training_gives_the_losses():
    model, batch = make(CROSSKD), make_batch()
    assert same_losses(model(*batch), model.loss(*batch))


# --- losses ---

def test_methods_add_to_the_students_losses():
    batch, model = make_batch(), make(CROSSKD, FGD)
    losses = model.loss(*batch)
    assert losses.keys() == {"loss_cls", "loss_bbox", "loss_dfl", "loss_cls_kd", "loss_reg_kd", "loss_fgd"}
    assert all(value.shape == () and value > 0 for value in losses.values())
    plain = model.student.loss(*batch)
    assert all(torch.equal(losses[key], plain[key]) for key in plain)
    for method in (CROSSKD, FGD):
        alone = make(method)
        alone.student.load_state_dict(model.student.state_dict())
        alone.teacher.load_state_dict(model.teacher.state_dict())
        if method is FGD:
            alone.methods[0][0].load_state_dict(model.methods[0][1].state_dict())
        found = alone.loss(*batch)
        assert len(found) < len(losses) and all(torch.equal(value, losses[key]) for key, value in found.items())


def test_colliding_names_get_a_suffix():
    cuts = [{**CROSSKD, "reused_teacher_head_idx": cut} for cut in (0, 2)]
    expected = {"loss_cls", "loss_bbox", "loss_dfl", "loss_fgd"}
    expected |= {f"loss_{x}_kd/{name}" for x in ("cls", "reg") for name in ("early", "late")}
    named = make({**cuts[0], "name": "early"}, {**cuts[1], "name": "late"}, FGD)
    losses = named.loss(*make_batch())
    assert losses.keys() == expected
    assert losses["loss_cls_kd/early"] != losses["loss_cls_kd/late"]
    assert {"loss_cls_kd/CrossKD0", "loss_cls_kd/CrossKD1"} <= make(*cuts).loss(*make_batch()).keys()
    alone = make({**CROSSKD, "name": "early"}).loss(*make_batch())
    assert "loss_cls_kd" in alone  # a suffix only where it is needed


def test_two_methods_of_one_name_are_refused_or_kept_apart():
    """No loss may be lost because another one has the same name."""
    cuts = [{**CROSSKD, "reused_teacher_head_idx": cut, "name": "same"} for cut in (0, 2)]
    try:
        losses = make(*cuts).loss(*make_batch())
    except ConfigError as error:
        assert "name" in str(error)
    else:
        assert len([key for key in losses if key.startswith("loss_cls_kd")]) == 2


def test_several_teachers(monkeypatch):
    entries = [teacher_entry(), teacher_entry(width=16, depth=50, name="big")]
    model = make(CROSSKD, FGD, teacher=entries)
    assert len(model.teachers) == 2 and model.teacher is model.teachers[0]
    assert len(model.teachers[1].backbone.layer1) == 3
    assert not any(p.requires_grad for teacher in model.teachers for p in teacher.parameters())
    calls = [count_calls(monkeypatch, d, "extract_features") for d in (model.student, *model.teachers)]
    losses = model.loss(*make_batch())
    assert [len(c) for c in calls] == [1, 1, 1]
    kd = {key for key in losses if "kd" in key or "fgd" in key}
    assert kd == {f"{key}/{name}" for key, method in (
        ("loss_cls_kd", "CrossKD0"), ("loss_reg_kd", "CrossKD0"), ("loss_fgd", "FGD1"))
        for name in (f"teacher0/{method}", f"big/{method}")}
    one = make(CROSSKD, FGD, teacher=entries[:1])
    one.student.load_state_dict(model.student.state_dict())
    one.teacher.load_state_dict(model.teacher.state_dict())
    assert torch.equal(one.loss(*make_batch())["loss_cls_kd"], losses["loss_cls_kd/teacher0/CrossKD0"])


def test_an_image_without_boxes_gives_finite_gradients():
    for head in ("GFLHead", "RetinaHead"):
        model = make(CROSSKD, FGD, head=head, dtype=torch.float32)
        losses = model.loss(*make_batch(counts=(0, 0), dtype=torch.float32))
        found = gradients(model, losses)
        assert all(grad.isfinite().all() for grad in found.values() if grad is not None)
        assert all(value.isfinite() for value in losses.values())


# --- gradients ---

@pytest.mark.parametrize("head", ["GFLHead", "RetinaHead"])
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_crosskd_teaches_the_students_tower_through_the_teachers_head(head, cut):
    model = make({**CROSSKD, "reused_teacher_head_idx": cut}, head=head)
    losses = model.loss(*make_batch())
    found = gradients(model.student, {key: losses[key] for key in ("loss_cls_kd", "loss_reg_kd")})
    assert all(p.grad is None for p in model.teacher.parameters())
    for name, grad in found.items():
        in_tower = name.startswith(("bbox_head.cls_convs", "bbox_head.reg_convs"))
        reached = int(name.split(".")[2]) < cut if in_tower else not name.startswith("bbox_head")
        assert (grad is not None) == reached, name
        # A bias gets no gradient, because means are aligned; nor does a block whose last norm starts at zero.
        assert not reached or "bias" in name or "backbone" in name or grad.any(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_crosskd_aligns_features_in_float32(dtype):
    """Half precision holds these features but not their squares; the losses under AMP equal those without it."""
    g = torch.Generator().manual_seed(0)
    maps = [(scale * torch.randn(2, 3, 4, 4, generator=g)).to(dtype) for scale in (1e4, 5e3)]
    with torch.autocast("cpu", dtype):
        aligned, = rescaled_channels(maps[:1], maps[1:])
    assert aligned.dtype == torch.float32
    exact, = rescaled_channels([maps[0].double()], [maps[1].double()])
    torch.testing.assert_close(aligned, exact.float(), rtol=1e-4, atol=1)

    model = make(CROSSKD, dtype=torch.float32)
    for head in (model.student.bbox_head, model.teacher.bbox_head):
        for norm in (head.cls_convs[0].gn, head.reg_convs[0].gn):
            norm.weight.data *= 1e3
        for layer in (head.cls_convs[1].conv, head.reg_convs[1].conv):
            layer.weight.data *= 1e-1
    batch = make_batch(sizes=((128, 128), (128, 120)), dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        found = model(*batch)
    for name, wanted in model(*batch).items():
        assert found[name].dtype == torch.float32 and found[name].isfinite()
        torch.testing.assert_close(found[name], wanted, rtol=0.1, atol=1e-3)


def test_fgd_teaches_backbone_neck_and_its_own_convolutions():
    model = make(FGD, teacher=teacher_entry(width=24, head="GFLHead"))
    losses = model.loss(*make_batch())
    found = gradients(model, {"loss_fgd": losses["loss_fgd"]})
    assert all((grad is None) == name.startswith("student.bbox_head") for name, grad in found.items())
    assert any("methods.0.0.losses.0.align" in name for name in found)
    assert all(p.grad is None for p in model.teacher.parameters())


# --- pixel statistics ---

def test_a_teacher_sees_what_it_saw_in_training(monkeypatch):
    model = make(CROSSKD, teacher=teacher_entry(preprocess=CAFFE))
    pixels = torch.randint(0, 256, (2, 3, 64, 96), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    _, targets = make_batch()
    seen, run = [], model.teacher.run

    def watched(images, *args, **kwargs):
        seen.append(images)
        return run(images, *args, **kwargs)

    monkeypatch.setattr(model.teacher, "run", watched)
    images = model.student.preprocess(pixels, targets, torch.float64)
    before = images.clone()
    losses = model.loss(images, targets)
    torch.testing.assert_close(seen[0], Preprocess(**CAFFE)(pixels, targets, torch.float64), rtol=0, atol=1e-10)
    assert torch.equal(images, before)
    same = make(CROSSKD)
    same.student.load_state_dict(model.student.state_dict())
    same.teacher.load_state_dict(model.teacher.state_dict())
    assert same.loss(images, targets)["loss_cls_kd"] != losses["loss_cls_kd"]


# --- what is refused ---

def anchors(ratios=(1.0,), strides=(8, 16, 32, 64, 128)):
    return {"type": "AnchorGenerator", "ratios": list(ratios), "scales": [8], "strides": list(strides)}


@pytest.mark.parametrize("method, student, teacher, message", [
    ({"type": "Mimic"}, {}, teacher_entry("RetinaHead"),
     "GFLHead and the teacher's RetinaHead do not mean the same.*the IoU.*for such a pair use CrossKD$"),
    (CROSSKD, {}, teacher_entry(head_={"num_classes": 4}), "number of classes is 3, the teacher's 4; .* class_map"),
    ({"type": "Mimic"}, {}, teacher_entry(head_={"reg_max": 16}), "distributions over 9 distances.*over 17.*CrossKD$"),
    (CROSSKD, {}, teacher_entry(
        head_={"anchor_generator": anchors(strides=(4, 8, 16, 32, 64))}, neck={"start_level": 0}), "strides"),
    ({**CROSSKD, "reused_teacher_head_idx": 3}, {}, teacher_entry(), "from 0 to 2, .* the student's towers, not 3"),
    ({**CROSSKD, "reused_teacher_head_idx": -1}, {}, teacher_entry(), "not -1"),
    ({**CROSSKD, "reused_teacher_head_idx": 2}, {}, teacher_entry(head_={"stacked_convs": 1}),
     "from 0 to 1, .* the teacher's towers, not 2"),
    ({"type": "CrossKD"} | {"adapter_kernel": 2}, {}, teacher_entry(), "adapter_kernel.*1, 3"),
    ({"type": "FGD", "levels": [5]}, {}, teacher_entry(), "levels.*0..4"),
    ({"type": "CrosKD"}, {}, teacher_entry(), 'did you mean "CrossKD"'),
    ({**CROSSKD, "loss_center_kd": {"type": "CrossEntropyLoss"}}, {}, teacher_entry(), "loss_center_kd.*not predicted"),
    ({"type": "FGD", "alpha": 1.0}, {}, teacher_entry(), 'methods.0.alpha: unknown key'),
    ({"type": "CrossKD", "loss_cls_kd": {"type": "KDQualityFocaLoss"}}, {}, teacher_entry(), "KDQualityFocalLoss"),
    (FGD, {}, {"model": small_config()}, "checkpoint"),
    (FGD, {}, {"checkpoint": None}, "distill.teacher: give either cfg"),
    (FGD, {}, teacher_entry() | {"checkpiont": None}, 'did you mean "checkpoint"'),
])
def test_refuses(method, student, teacher, message):
    with pytest.raises(ConfigError, match=message) as error:
        build_distiller({"model": small_config(**student), "distill": {"teacher": teacher, "methods": [method]}})
    assert str(error.value).startswith("distill.")


def test_a_cut_at_the_towers_end_is_allowed():
    losses = make({**CROSSKD, "reused_teacher_head_idx": 2}).loss(*make_batch())
    assert losses["loss_cls_kd"] > 0


def test_a_teacher_has_the_students_classes_unless_it_says_otherwise():
    cfg = small_config()
    del cfg["head"]["num_classes"]
    model = make(CROSSKD, teacher={"model": cfg, "checkpoint": None})
    assert model.teacher.bbox_head.num_classes == model.student.bbox_head.num_classes


@pytest.mark.parametrize("head, expected", [
    ("GFLHead", ("KnowledgeDistillationKLDivLoss", 4.0)), ("RetinaHead", ("GIoULoss", 1.0))])
def test_crosskd_defaults_are_the_published_ones(head, expected):
    model = make({"type": "CrossKD"}, head=head, teacher=teacher_entry(head, head_={"stacked_convs": 4}),
                 student={"head": {"stacked_convs": 4}})
    method = model.methods[0][0]
    assert isinstance(method, CrossKD) and method.cut == 3
    boxes, classes = method.losses["loss_reg_kd"], method.losses["loss_cls_kd"]
    assert (type(boxes).__name__, boxes.loss_weight) == expected
    assert (type(classes).__name__, classes.loss_weight) == ("KDQualityFocalLoss", 1.0)
    if head == "GFLHead":
        assert (boxes.T, boxes.class_reduction) == (1, "sum")


def test_the_table_of_methods_names_its_classes():
    assert all(METHODS[name].__name__ == name for name in METHODS)


def test_a_new_method_is_a_class_and_a_line_in_the_table(monkeypatch):
    class ScoreGap(Method):
        teacher_head = True

        def __init__(self, student, teacher, loss_weight: float = 1.0):
            super().__init__()
            self.loss_weight = loss_weight

        def forward(self, student, teacher):
            return {"loss_gap": self.loss_weight * (student.outputs.cls - teacher.outputs.cls).square().mean()}

    monkeypatch.setitem(METHODS, "ScoreGap", ScoreGap)

    model = make({"type": "ScoreGap", "loss_weight": 2.0, "weight": 3.0}, CROSSKD, head="FCOSHead", dtype=torch.float32)
    batch = make_batch(dtype=torch.float32)
    student, (teacher,), _ = model.passes(*batch)
    expected = 6 * (student.outputs.cls - teacher.outputs.cls).square().mean()
    torch.testing.assert_close(model.loss(*batch)["loss_gap"], expected)
    assert model.methods[0][0].weights() == {"loss_weight": 2.0}
    assert "class scores" in model.methods[0][0].links(student, teacher)[0]
    falls(model)
    with pytest.raises(ConfigError, match='did you mean "loss_weight"'):
        make({"type": "ScoreGap", "los_weight": 2.0})


@pytest.mark.parametrize("head", ["RetinaHead", "FCOSHead", "GFLv2"])
def test_compiled_it_gives_the_same(head):
    def losses_and_gradients(compiled):
        distiller = make(CROSSKD, FGD, head=head)
        if compiled:
            distiller.compile(backend="aot_eager")
        losses = distiller(*make_batch())
        return losses, gradients(distiller, losses)

    (losses, grads), (plain, plain_grads) = losses_and_gradients(True), losses_and_gradients(False)
    for name, value in plain.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-9, atol=0)
    for name, value in plain_grads.items():
        assert (grads[name] is None) == (value is None)
        if value is not None:
            torch.testing.assert_close(grads[name], value, rtol=1e-6, atol=1e-9)


def test_compiled_code_gives_no_outputs_of_modules():
    distiller = make({"type": "FGD", "student_modules": ["neck.fpn_convs.0.conv"]})
    with pytest.raises(ConfigError, match="train.compile: FGD needs the outputs of named modules"):
        distiller.compile()


@pytest.mark.parametrize("module", ["backbone.layer1.0.bn1", "backbone.layer1.0.bn2", "bbox_head.cls_convs.0.gn"])
def test_what_a_module_gave_is_kept_as_it_was(module):
    """The activation after the module, and the sum with the shortcut, work in place."""
    detector = small_detector(backbone={"zero_init_residual": False}).train()
    images, targets = make_batch()
    seen = detector.run(images, targets, modules=[module]).modules[module]
    with torch.no_grad():
        outputs = []
        hook = detector.get_submodule(module).register_forward_hook(lambda *args: outputs.append(args[2].clone()))
        detector.run(images, targets)
        hook.remove()
    assert seen.min() < 0
    torch.testing.assert_close(seen.detach(), outputs[-1])
