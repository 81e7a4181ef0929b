"""Every configuration, and every method between every pair of heads, runs on a GPU as far as that shows without one.

Losses, gradients, inference and a whole training step are on the GPU, and nothing in a step makes the CPU wait for it.
"""
import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from pretended_gpu import on_gpu, pretended_gpu, run_backward, set_gradients, unknown_sizes
from runs import CONFIGS, ROOT, without_size
from small_models import HEADS, VARIANTS, make_batch, small_config, small_distiller, teacher_entry

import models.postprocess
from kd import METHODS
from kd.build import build_model
from kd.config import load_config, parse_config
from kd.engine.average import WeightAverage
from kd.engine.clock import PartsClock
from kd.engine.finite import FiniteWatch
from kd.engine.run import Run
from kd.engine.train import train_step
from kd.optim import build_optimizer
from models.backbones import resnet

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """Stages of one or two blocks: blocks of one kind run the same code."""
    for depth, (block, _) in resnet.DEPTHS.items():
        monkeypatch.setitem(resnet.DEPTHS, depth, (block, (1, 1, 1, 2)))


def build(cfg: dict):
    with CUDA:
        return build_model(parse_config(cfg)).train()


def batch(unlabelled: bool = False):
    images, targets = make_batch(dtype=torch.float32, ignored=1)
    if unlabelled:
        targets = [targets[0], targets[1] | {"unlabelled": True}]
    return images.to("cuda"), on_gpu(targets)


def losses_of(model, waits: list[str], unlabelled: bool = False) -> dict:
    """The losses of a batch; they are on the GPU, and nothing waits for it."""
    images, targets = batch(unlabelled)
    waits.clear()
    losses = model(images, targets)
    assert {value.device.type for value in losses.values()} == {"cuda"} and not waits, waits
    return losses


def assert_trains(model, waits: list[str], unlabelled: bool = False, all_learn: bool = True) -> None:
    """Losses and the gradients of all parameters are on the GPU, and nothing waits for it."""
    set_gradients(model, sum(losses_of(model, waits, unlabelled).values()))
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert {grad.device.type for grad in grads if grad is not None} == {"cuda"} and not waits, waits
    assert not all_learn or all(grad is not None for grad in grads)


def assert_detects(model, waits: list[str], monkeypatch) -> None:
    """Detections are on the GPU, up to suppression, whose number of boxes is not known. For each image, the CPU waits
    once per level for the number of candidates, and once for the number of boxes that are not too small."""
    def first_ones(boxes, scores, labels, iou_threshold):
        assert {x.device.type for x in (boxes, scores, labels)} == {"cuda"}
        return torch.arange(2, device=boxes.device)

    monkeypatch.setattr(models.postprocess, "class_nms", first_ones)
    images, targets = batch()
    waits.clear()
    with torch.no_grad(), unknown_sizes():
        found = model.eval().predict(images, targets)
    assert {value.device.type for each in found for value in each.values()} == {"cuda"}
    assert len(waits) <= len(targets) * (5 + 1), waits


# What may differ between configurations of one kind: sizes, and where weights come from.
SIZES = ("base_channels", "groups", "width_per_group", "out_channels", "feat_channels", "stacked_convs", "init_student",
         "requires_grad", "frozen_stages", "norm_eval", "style", "preprocess", "test", "depth")


def kind(value):
    """What a configuration is without its sizes, and without its numbers, of which only the signs are kept."""
    if isinstance(value, dict):
        return {key: kind(item) for key, item in value.items() if key not in SIZES}
    if isinstance(value, (list, tuple)):
        return [kind(item) for item in value]
    return value if isinstance(value, (str, bool, type(None))) else (value > 0) - (value < 0)


def kinds() -> list:
    """One configuration of each kind; the others differ from one of these in numbers, data and schedule only."""
    found = {}
    for path in CONFIGS:
        cfg = without_size(load_config(path))
        found.setdefault(json.dumps(kind(cfg), sort_keys=True), pytest.param(
            cfg, id=str(path.relative_to(ROOT / "configs").with_suffix(""))))
    return list(found.values())


@pytest.mark.parametrize("cfg", kinds())
def test_a_configuration(cfg, monkeypatch):
    if cfg["model"]["backbone"]["type"] == "TimmBackbone":
        pytest.importorskip("timm", reason="needs the extra timm")
    with pretended_gpu() as waits:
        model = build(cfg)
        if "distill" in cfg:  # a student alone is in another configuration, and methods have their gradients below
            losses_of(model, waits)
        else:
            assert_trains(model, waits)
            assert_detects(model, waits, monkeypatch)


def load_pairs():
    """The module test_pairs.py, which knows which methods work between which heads."""
    spec = importlib.util.spec_from_file_location("pairs", Path(__file__).parent / "methods" / "test_pairs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAIRS = load_pairs()


def given(test, names: str) -> list:
    """The values that a test is parametrized with."""
    return next(mark.args[1] for mark in test.pytestmark if mark.args[0] == names)


def cases() -> list:
    """(student's head, teacher's head, methods) for all pairs of test_pairs.py."""
    same = PAIRS.test_heads_of_one_kind
    found = [(head, head, given(same, "method") + PAIRS.FEATURE) for head in given(same, "head")]
    found += [(head, head, given(PAIRS.test_ld, "method")) for head in given(PAIRS.test_ld, "head")]
    for test in (PAIRS.test_feature_methods_between_any_heads, PAIRS.test_prediction_methods_from_a_variant,
                 PAIRS.test_prediction_methods_between_heads_that_mean_the_same):
        found += [(*pair, given(test, "method")) for pair in given(test, "student, teacher")]
    return [pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[2][0]['type']}") for case in found]


@pytest.mark.parametrize("student, teacher, methods", cases())
def test_methods_between_heads(student, teacher, methods):
    """All methods of the pair at once."""
    def section(head: str, other: str) -> dict:
        same_anchors = head == "RetinaHead" and other != head and methods[0] in PAIRS.PREDICTION
        return small_config(head, head=PAIRS.ONE_ANCHOR if same_anchors else {})

    with pretended_gpu() as waits:
        assert_trains(build({"model": section(student, teacher), "distill": {
            "teacher": {"model": section(teacher, student), "checkpoint": None},
            "methods": [method | {"name": f"{i}"} for i, method in enumerate(methods)]}}), waits)


PREDICTIONS = [method for method in PAIRS.PREDICTION if method["type"] != "GI"]
TEACHERS = {
    "torchvision": ({"torchvision": "retinanet_resnet50_fpn", "checkpoint": None}, PAIRS.FEATURE[:5]),
    "factory": ({"factory": "feature_networks:build", "checkpoint": None}, PAIRS.FEATURE[:5]),
    "some classes": (teacher_entry(head_={"num_classes": 2}) | {"class_map": [1, None, 0]},
                     [method for method in PREDICTIONS if METHODS[method["type"]].some_classes]),
    "more classes": (teacher_entry(head_={"num_classes": 7}) | {"class_map": [5, 0, 3]}, PREDICTIONS),
    "wide": (teacher_entry(width=24), [*PAIRS.FEATURE, PAIRS.PREDICTION[0]]),
    "transformer": (teacher_entry() | {"model": small_config() | {"backbone": PAIRS.SWIN}}, [{"type": "FGD"}]),
    "bf16": (teacher_entry() | {"precision": "bf16"}, [PAIRS.PREDICTION[0], {"type": "FGD"}]),
    "two": ([teacher_entry(), teacher_entry(name="second")], [PAIRS.PREDICTION[0], {"type": "FGD"}])}


@pytest.mark.parametrize("unlabelled", [False, True], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize("name", TEACHERS)
def test_teachers(name, unlabelled):
    teacher, methods = TEACHERS[name]
    with pretended_gpu() as waits:
        model = build({"model": small_config(), "distill": {"teacher": teacher, "methods": [
            method | {"name": f"{i}"} for i, method in enumerate(methods)]}})
        assert_trains(model, waits, unlabelled, all_learn=False)


@pytest.mark.parametrize("head", [*HEADS, *VARIANTS])
def test_detections(head, monkeypatch):
    with pretended_gpu() as waits:
        assert_detects(build({"model": small_config(head)}), waits, monkeypatch)


@pytest.mark.parametrize("settings", [
    {"grad_clip": 35}, {"amp": "bf16", "ema": 0.9, "accumulate": 2}, {"amp": "fp16", "grad_clip": 35}],
    ids=lambda settings: "-".join(settings))
def test_a_whole_training_step(settings, monkeypatch, tmp_path):
    """With measured weights, images without labels, the batch moved from the CPU, and the optimiser."""
    methods = [{"type": "CrossKD", "reused_teacher_head_idx": 1, "weight": {"gradient_share": 0.3}}, {"type": "FGD"}]
    cfg = parse_config({"model": small_config(), "train": settings, "optimizer": {"decay_norm_and_bias": False},
                        "distill": {"teacher": teacher_entry(), "methods": methods}})
    with pretended_gpu() as waits:
        model, other = build(cfg), build(cfg)
        run = Run(cfg, CUDA, tmp_path, model, build_optimizer(cfg.optimizer, model, 2),
                  torch.amp.GradScaler("cuda", enabled=settings.get("amp") == "fp16"), None, None, FiniteWatch(CUDA),
                  None, PartsClock(torch.device("cpu")), None)
        monkeypatch.setattr(Run, "steps_per_epoch", 10)
        if cfg.train.ema:
            monkeypatch.setattr(copy, "deepcopy", lambda _: other.student)  # a fake tensor cannot be copied
            run.average = WeightAverage(model.student, cfg.train.ema)
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: set_gradients(model, loss))
        images, targets = make_batch(ignored=1)
        batches = [(images.to(torch.uint8), [targets[0], targets[1] | {"unlabelled": True}])] * cfg.train.accumulate
        for _ in range(2):
            waits.clear()
            losses, _ = train_step(run, model, batches)
            assert {value.device.type for value in losses.values()} == {"cuda"}
        assert not waits, waits


def test_gradients_are_those_of_the_engine():
    """What stands in for PyTorch's engine computes the same."""
    distiller = small_distiller({"type": "CrossKD", "reused_teacher_head_idx": 1}, {"type": "FGD"})
    trained = {name: p for name, p in distiller.named_parameters() if p.requires_grad}
    loss = sum(distiller(*make_batch()).values())
    expected = torch.autograd.grad(loss, trained.values(), retain_graph=True)
    for name, one, other in zip(trained, expected, run_backward(loss, trained.values())):
        torch.testing.assert_close(one, other, msg=name)
