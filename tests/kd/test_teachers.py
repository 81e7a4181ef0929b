"""Teachers from other projects: their formats, classes and precision, and what a student inherits."""
import pickle
import re

import pytest
import torch
from runs import ROOT
from small_models import (
    CLASSES,
    enliven,
    falls,
    gradients,
    make_batch,
    small_config,
    small_detector,
    small_distiller,
    teacher_entry,
    without_weights,
)

from kd import build_distiller
from kd.config import load_config
from models import ConfigError, build_detector
from models.checkpoints.convert import convert_checkpoint

CROSSKD = {"type": "CrossKD", "reused_teacher_head_idx": 1}


def narrowed(path, classes):
    """The `model` section of a published teacher, narrow for tests; everything that its format needs is kept.

    torchvision's ResNet always starts with 64 channels.
    """
    model = without_weights(load_config(ROOT / path)["model"])
    start = 64 if "torchvision" in path else 8
    return model | {"backbone": model["backbone"] | {"base_channels": start},
                    "neck": model["neck"] | {"out_channels": 16},
                    "head": model["head"] | {"feat_channels": 16, "num_classes": classes}}


def to_detectron2(weights):
    """Weights under detectron2's names."""
    rules = [(r"bbox_head\.retina_cls", "head.cls_score"), (r"bbox_head\.retina_reg", "head.bbox_pred"),
             (r"bbox_head\.cls_convs\.(\d)\.conv", lambda m: f"head.cls_subnet.{2 * int(m[1])}"),
             (r"bbox_head\.reg_convs\.(\d)\.conv", lambda m: f"head.bbox_subnet.{2 * int(m[1])}"),
             (r"neck\.lateral_convs\.(\d)\.conv", lambda m: f"backbone.fpn_lateral{int(m[1]) + 3}"),
             (r"neck\.fpn_convs\.([012])\.conv", lambda m: f"backbone.fpn_output{int(m[1]) + 3}"),
             (r"neck\.fpn_convs\.([34])\.conv", lambda m: f"backbone.top_block.p{int(m[1]) + 3}"),
             (r"backbone\.(conv1|bn1)\.", r"backbone.bottom_up.stem.\1."),
             (r"backbone\.layer(\d)", lambda m: f"backbone.bottom_up.res{int(m[1]) + 1}"),
             (r"downsample\.0", "shortcut"), (r"downsample\.1", "shortcut.norm"), (r"\.bn(\d)\.", r".conv\1.norm.")]
    renamed = {}
    for name, value in weights.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        if not name.endswith("num_batches_tracked"):
            renamed[name] = value.numpy()
    return renamed


@pytest.mark.parametrize("kind", ["mmdet", "torchvision", "detectron2"])
def test_a_teacher_of_another_project(kind, tmp_path, reported):
    """A teacher with its published configuration and format teaches RetinaNet; a map selects from its 91 classes."""
    path = {"mmdet": "configs/retinanet/retinanet_r50_1x.yaml", "torchvision": "configs/torchvision/retinanet_r50.yaml",
            "detectron2": "configs/detectron2/retinanet_r50_1x.yaml"}[kind]
    classes, class_map = (91, [1, 3, 90]) if kind == "torchvision" else (CLASSES, None)
    section = narrowed(path, classes)
    torch.manual_seed(0)
    original = enliven(build_detector(section))
    file = tmp_path / "teacher.pth"
    if kind == "detectron2":
        file = tmp_path / "teacher.pkl"
        file.write_bytes(pickle.dumps({"model": to_detectron2(original.state_dict()), "__author__": "test"}))
    else:
        torch.save(original.state_dict(), tmp_path / "ours.pth")
        convert_checkpoint(tmp_path / "ours.pth", kind, file)
    student = small_config("RetinaHead", head={"stacked_convs": 4, "anchor_generator": section["head"].get(
        "anchor_generator", {"type": "AnchorGenerator", "octave_base_scale": 4, "scales_per_octave": 3,
                             "ratios": [0.5, 1.0, 2.0], "strides": [8, 16, 32, 64, 128]})})
    model = build_distiller({"model": student, "distill": {
        "teacher": {"model": section, "checkpoint": str(file), "class_map": class_map},
        "methods": [{"type": "CrossKD"}, {"type": "FGD"}]}}).train()
    assert f"loaded {kind}" in reported()
    loaded = model.teacher.state_dict()
    for name, value in original.state_dict().items():
        if "retina_cls" in name and class_map:
            value = value.unflatten(0, (9, 91))[:, class_map].flatten(0, 1)
        if "num_batches" not in name:
            assert torch.equal(loaded[name], value), name
    falls(model)


# --- class maps ---

def test_a_class_map_picks_the_teachers_scores():
    images, targets = make_batch()
    teacher = small_detector("RetinaHead", head={"num_classes": 7})
    enliven(teacher)
    expected = teacher.run(images, targets).outputs
    teacher.bbox_head.select_classes([5, 0, 3])
    found = teacher.run(images, targets).outputs
    # A convolution of another width may use another kernel, which adds in another order.
    torch.testing.assert_close(found.cls, expected.cls[..., [5, 0, 3]], rtol=1e-12, atol=1e-12)
    assert torch.equal(found.box, expected.box)
    labels = torch.cat([d["labels"] for d in teacher.eval().predict(images, targets)])
    assert len(labels) and labels.max() < 3


@pytest.mark.parametrize("teacher, message", [
    (teacher_entry(head_={"num_classes": 7}) | {"class_map": [0, 1]}, "class_map: has 2 entries for the student's 3"),
    (teacher_entry(head_={"num_classes": 7}) | {"class_map": [0, 1, 7]}, "class_map: must name classes among 0..6"),
    (teacher_entry() | {"precision": "int8"}, "precision.*fp32, fp16, bf16")])
def test_refused(teacher, message):
    with pytest.raises(ConfigError, match=message):
        small_distiller(CROSSKD, teacher=teacher)


def test_a_wrong_combination_is_refused_before_weights_are_read(monkeypatch, tmp_path):
    """Neither the student's backbone weights nor the teacher's checkpoint are downloaded or read; both are read once
    for a right one.
    """
    def no(*args, **kwargs):
        raise AssertionError("weights are read")

    torch.save(small_detector().state_dict(), tmp_path / "teacher.pth")
    torch.save(small_detector().backbone.state_dict(), tmp_path / "backbone.pth")
    weights = {"teacher": teacher_entry() | {"checkpoint": str(tmp_path / "teacher.pth")},
               "student": {"backbone": {"weights": str(tmp_path / "backbone.pth")}}}
    small_distiller(CROSSKD, **weights)
    drawn = torch.rand(1)
    small_distiller(CROSSKD)
    assert torch.equal(drawn, torch.rand(1))  # the check draws no random numbers
    monkeypatch.setattr("models.weights.read_checkpoint", no)
    monkeypatch.setattr("kd.build.check_teacher_file", no)
    with pytest.raises(ConfigError, match="reused_teacher_head_idx"):
        small_distiller({"type": "CrossKD", "reused_teacher_head_idx": 9}, **weights)
    with pytest.raises(AssertionError, match="weights are read"):
        small_distiller(CROSSKD, **weights)


def test_a_class_map_needs_the_teachers_class_count():
    teacher = teacher_entry() | {"class_map": [0, 1, 3]}  # three in another order need none
    del teacher["model"]["head"]["num_classes"]
    with pytest.raises(ConfigError, match="class_map: needs the teacher's own class count"):
        small_distiller(CROSSKD, teacher=teacher)


# --- precision ---

@pytest.mark.parametrize("outer", [None, torch.bfloat16])
@pytest.mark.parametrize("precision, inside", [("bf16", torch.bfloat16), ("fp32", torch.float32), (None, None)])
def test_a_teachers_own_precision(precision, inside, outer):
    model = small_distiller(CROSSKD, teacher=teacher_entry() | {"precision": precision}, dtype=torch.float32)
    seen = {}
    for name, detector in (("student", model.student), ("teacher", model.teacher)):
        detector.bbox_head.gfl_cls.register_forward_hook(
            lambda module, args, output, name=name: seen.setdefault(name, set()).add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=outer is not None):
        losses = model.loss(*make_batch(((128, 128), (96, 128)), dtype=torch.float32))
    assert seen["student"] == {outer or torch.float32}
    assert seen["teacher"] == {inside or outer or torch.float32}  # in its own pass and in CrossKD's
    assert all(value.dtype == torch.float32 for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.student.parameters() if p.grad is not None)


def test_a_bf16_teacher_gives_nearly_the_same_losses():
    batch = make_batch(((128, 128), (96, 128)), dtype=torch.float32)
    exact = small_distiller(CROSSKD, dtype=torch.float32).loss(*batch)
    found = small_distiller(CROSSKD, teacher=teacher_entry() | {"precision": "bf16"}, dtype=torch.float32).loss(*batch)
    assert torch.equal(found["loss_cls"], exact["loss_cls"])
    assert found["loss_cls_kd"] != exact["loss_cls_kd"]
    torch.testing.assert_close(found["loss_cls_kd"], exact["loss_cls_kd"], rtol=0.05, atol=0)


def test_an_fp16_teacher_loses_no_gradient_on_the_way_back():
    """The gradient is as small as with many anchors, and there is no loss scale."""
    found = []
    for precision in ("fp32", "fp16"):
        model = small_distiller(CROSSKD | {"weight": 1e-5}, teacher=teacher_entry() | {"precision": precision},
                                dtype=torch.float32)
        losses = model.loss(*make_batch(dtype=torch.float32))
        of_method = {str(i): value for i, value in enumerate(sum(model.by_method(losses).values(), []))}
        found.append(torch.cat([g.flatten() for g in gradients(model, of_method).values() if g is not None]))
    assert (found[1] - found[0]).norm() < 0.02 * found[0].norm()


# --- the inheriting strategy ---

def test_a_student_inherits_neck_and_head(reported):
    teacher = teacher_entry(backbone={"base_channels": 16})  # so the neck's lateral convolutions have another shape
    model = build_distiller({"model": small_config(), "distill": {
        "teacher": teacher, "methods": [{"type": "FGD"}], "init_student": True}})
    given = model.teacher.state_dict()
    for name, value in model.student.state_dict().items():
        if name.startswith("bbox_head.") or name.startswith("neck.fpn_convs") or name.endswith("lateral_convs.bias"):
            assert torch.equal(value, given[name])
        elif name.startswith("neck.lateral_convs") and name.endswith("weight"):
            assert value.shape != given[name].shape
    line = reported()
    assert "left as they were" in line and "3 (neck.lateral_convs.0.conv.weight" in line
    assert model.student.bbox_head.gfl_cls.weight is not model.teacher.bbox_head.gfl_cls.weight
    assert model.student.bbox_head.gfl_cls.weight.requires_grad


def test_a_student_of_its_own_does_not_inherit():
    model = build_distiller({"model": small_config(), "distill": {"teacher": teacher_entry(), "methods": []}})
    assert not torch.equal(model.student.bbox_head.gfl_cls.weight, model.teacher.bbox_head.gfl_cls.weight)
