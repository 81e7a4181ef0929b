"""When a method runs, and the factor of its losses."""
import math

import pytest
import torch
from small_models import make_batch, small_distiller, teacher_entry

from kd.methods.base.options import MethodOptions
from models import ConfigError

CROSSKD, FGD = {"type": "CrossKD", "reused_teacher_head_idx": 1}, {"type": "FGD"}


@pytest.mark.parametrize("options, expected", [  # factors at epochs 0, 0.5, 1, 3 and 3.5 of 4
    ({}, [1, 1, 1, 1, 1]),
    ({"weight": 3.0}, [3, 3, 3, 3, 3]),
    ({"warmup_epochs": 2.0}, [0, 0.25, 0.5, 1, 1]),
    ({"decay": "linear"}, [1, 0.875, 0.75, 0.25, 0.125]),
    ({"decay": "linear", "weight": 2.0, "warmup_epochs": 1.0}, [0, 0.875, 1.5, 0.5, 0.25]),
    ({"decay": "linear", "stop_epoch": 3.5}, [1, 1 - 0.5 / 3.5, 1 - 1 / 3.5, 1 - 3 / 3.5, 0]),
    ({"decay": "linear", "decay_to": 0.5, "weight": 2.0}, [2, 1.875, 1.75, 1.25, 1.125]),
    ({"decay": "cosine"}, [(1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in (0, 0.5, 1, 3, 3.5)]),
    ({"decay": "cosine", "stop_epoch": 3.5},
     [(1 + math.cos(math.pi * epoch / 3.5)) / 2 for epoch in (0, 0.5, 1, 3, 3.5)]),
    # DAMO-YOLO's detector_trainer.py, with epochs in place of steps
    ({"decay": "cosine", "decay_to": 0.1},
     [(1 - math.cos(epoch * math.pi / 4)) / 2 * (0.1 - 1) + 1 for epoch in (0, 0.5, 1, 3, 3.5)])])
def test_factor(options, expected):
    found = [MethodOptions(**options).factor(epoch, 4) for epoch in (0, 0.5, 1, 3, 3.5)]
    assert found == pytest.approx(expected)


def test_runs():
    assert all(MethodOptions().runs(step, step / 2) for step in range(9))
    assert [step for step in range(9) if MethodOptions(every=4).runs(step, 0)] == [0, 4, 8]
    assert [epoch for epoch in (0, 1, 1.9, 2, 3) if MethodOptions(stop_epoch=2).runs(0, epoch)] == [0, 1, 1.9]


@pytest.mark.parametrize("options, message", [
    ({"every": 0}, "every"), ({"stop_epoch": 0}, "stop_epoch"), ({"warmup_epochs": -1.0}, "warmup_epochs"),
    ({"decay": "exponential"}, "decay"), ({"decay_to": 0.1}, "there is none: set decay: linear or cosine"),
    ({"decay": "cosine", "decay_to": 1.5}, "decay_to"), ({"evry": 2}, 'did you mean "every"')])
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        small_distiller({**FGD, **options})
    assert str(error.value).startswith("distill.methods")


def test_weights_multiply_the_losses_and_their_gradients():
    batch, plain = make_batch(), small_distiller(CROSSKD)
    weighted = small_distiller({**CROSSKD, "weight": 0.5}, teacher=teacher_entry() | {"weight": 3.0})
    expected, found = plain.loss(*batch), weighted.loss(*batch)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key] * (1.5 if "kd" in key else 1.0))
    for losses in (expected, found):
        losses["loss_cls_kd"].backward()
    pairs = zip(plain.student.parameters(), weighted.student.parameters())
    compared = [torch.testing.assert_close(b.grad, 1.5 * a.grad) for a, b in pairs if a.grad is not None]
    assert len(compared) > 20


def test_a_schedule_follows_training():
    model, batch = small_distiller({**CROSSKD, "warmup_epochs": 1.0, "stop_epoch": 2.0}), make_batch()
    constant = small_distiller(CROSSKD).loss(*batch)["loss_cls_kd"].item()
    found = []
    for step in range(0, 12, 2):
        model.advance(step, 4, 3)
        losses = model.loss(*batch)
        found.append(losses["loss_cls_kd"].item() / constant if "loss_cls_kd" in losses else None)
    assert found == [pytest.approx(v) for v in (0, 0.5, 1, 1)] + [None, None]


def test_a_teacher_that_nobody_asks_is_not_run(monkeypatch):
    model, batch = small_distiller({**CROSSKD, "every": 3}), make_batch()
    ran, run = [], model.teacher.run
    monkeypatch.setattr(model.teacher, "run", lambda *args, **kwargs: ran.append(model.step) or run(*args, **kwargs))
    for step in range(7):
        model.advance(step, 10, 1)
        assert ("loss_cls_kd" in model.loss(*batch)) == (step % 3 == 0)
    assert ran == [0, 3, 6]


def test_names_stay_when_a_method_pauses():
    """Two methods report the same loss; its names do not depend on whether both run at a step."""
    model, batch = small_distiller(CROSSKD, {"type": "Mimic", "every": 2}), make_batch()
    keys = []
    for step in range(3):
        model.advance(step, 10, 1)
        keys.append({key for key in model.loss(*batch) if "kd" in key})
    assert keys[0] == keys[2] == {f"loss_{x}_kd/{name}" for x in ("cls", "reg") for name in ("CrossKD0", "Mimic1")}
    assert keys[1] == {"loss_cls_kd/CrossKD0", "loss_reg_kd/CrossKD0"}


def test_shares_and_gradient_norms(monkeypatch):
    strides = {"anchor_generator": {"type": "AnchorGenerator", "ratios": [1.0], "scales": [8], "strides": [8, 16, 32]}}
    three = {"neck": {"num_outs": 3}}  # levels that are not made of one another
    model = small_distiller(CROSSKD, {**FGD, "weight": 2.0}, student=three | {"head": strides},
                            teacher=teacher_entry(head_=strides, **three))
    batch = make_batch()
    losses, student = model.loss_and_pass(*batch)
    shares, total = model.shares(losses), sum(losses.values())
    torch.testing.assert_close(shares["share/CrossKD0"], (losses["loss_cls_kd"] + losses["loss_reg_kd"]) / total)
    torch.testing.assert_close(shares["share/FGD1"], losses["loss_fgd"] / total)
    norms = model.gradient_norms(losses, student.features, scale=1024.0)
    expected = {"student": ["loss_cls", "loss_bbox", "loss_dfl"], "CrossKD0": ["loss_cls_kd", "loss_reg_kd"],
                "FGD1": ["loss_fgd"]}
    assert norms.keys() == expected.keys()
    features = [f.detach().requires_grad_() for f in student.features]
    monkeypatch.setattr(model.student, "extract_features", lambda images: features)
    for name, keys in expected.items():
        again = model.loss(*batch)
        found = torch.autograd.grad(sum(again[key] for key in keys), features)
        assert norms[name] == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in found)), rel=1e-9)
