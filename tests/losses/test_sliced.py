"""Losses that compute their own gradient are equal to the same formulas with autograd."""
import pytest
import torch

import losses.sliced
from losses import binary_kd_loss, kd_quality_focal_loss, quality_focal_loss, sigmoid_focal_loss

N, P, C = 2, 13, 5


def arguments(name: str, dtype: torch.dtype) -> tuple:
    labels, scores = torch.randint(0, C + 1, (N, P)), torch.rand(N, P, dtype=dtype)
    other = torch.randn(N, P, C, dtype=dtype)
    return {"focal": (sigmoid_focal_loss, labels), "quality": (quality_focal_loss, (labels, scores)),
            "kd": (kd_quality_focal_loss, other), "binary": (binary_kd_loss, other)}[name]


@pytest.fixture
def slices(monkeypatch):
    """Slices of four rows, so that the last slice is shorter. The result lists the slices."""
    monkeypatch.setattr(losses.sliced, "MOST", 4 * C + 1)
    seen, plain = [], losses.sliced.background
    monkeypatch.setattr(losses.sliced, "background", lambda *args: seen.append(args) or plain(*args))
    return seen


@pytest.mark.parametrize("name, options", [
    *(("focal", {"gamma": gamma, "alpha": alpha}) for gamma, alpha in ((2, 0.25), (0, 0.5), (0.5, 0.9), (1.5, 0.0))),
    *((name, {"beta": beta}) for name in ("quality", "kd") for beta in (0, 0.5, 1, 2, 2.5)),
    ("binary", {"T": 1.0}), ("binary", {"T": 3.0})])
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient(name, options, weighted, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(losses.sliced, "MOST", 4 * C + 1)
    function, other = arguments(name, torch.float64)
    weight = torch.rand(N, P, dtype=torch.float64) if weighted else None
    pred = (3 * torch.randn(N, P, C, dtype=torch.float64)).requires_grad_()
    factor = torch.tensor(3.0, dtype=torch.float64)
    value = function(pred, other, weight, avg_factor=factor, **options)
    gradient, = torch.autograd.grad(2 * value, pred)
    whole = function(pred, other, weight, reduction="sum", **options) / (factor + losses.sliced.EPS)
    expected, = torch.autograd.grad(2 * whole, pred)
    torch.testing.assert_close(value, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-14)


def test_weights_of_single_entries():
    """They are left to autograd."""
    torch.manual_seed(0)
    pred, weight = torch.randn(N, P, C, requires_grad=True), torch.rand(N, P, C)
    for name in ("focal", "kd", "binary"):
        function, other = arguments(name, torch.float32)
        value = function(pred, other, weight, avg_factor=2.0)
        torch.testing.assert_close(value, function(pred, other, weight, reduction="sum") / 2)


@pytest.mark.parametrize("name, options", [("focal", {}), ("quality", {}), ("kd", {}), ("kd", {"beta": 0.5})])
def test_extreme_scores_have_finite_losses_and_gradients(name, options):
    function, _ = arguments(name, torch.float32)
    pred = torch.tensor([-200.0, -50, 0, 50, 200]).repeat(C, 1).requires_grad_()
    labels = torch.arange(C)
    other = {"focal": labels, "quality": (labels, torch.rand(C)), "kd": pred.detach().T}[name]
    value = function(pred, other, avg_factor=1.0, **options)
    gradient, = torch.autograd.grad(value, pred)
    assert value.isfinite() and gradient.isfinite().all()
    exact = pred.detach().double().requires_grad_()
    other = other.double() if name == "kd" else other
    expected, = torch.autograd.grad(function(exact, other, reduction="sum", **options), exact)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


def test_half_precision_loses_no_small_gradient(slices):
    """Gradients that a loss scale saves from fp16's underflow must not be rounded to zero before it."""
    pred = torch.full((1, P, C), -7.0, dtype=torch.float16, requires_grad=True)
    labels, scale = torch.full((1, P), C), 2.0 ** 30
    value = sigmoid_focal_loss(pred, labels, avg_factor=1.0)
    gradient, = torch.autograd.grad(scale * value, pred)
    exact = pred.detach().double().requires_grad_()
    expected, = torch.autograd.grad(scale * sigmoid_focal_loss(exact, labels, reduction="sum"), exact)
    assert value.dtype == torch.float32 and gradient.dtype == torch.float16 and gradient.min() > 0
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-3, atol=0)


def test_without_gradient(slices):
    pred, labels = torch.randn(N, P, C), torch.randint(0, C + 1, (N, P))
    with torch.no_grad():
        value = sigmoid_focal_loss(pred, labels, avg_factor=2.0)
    assert not value.requires_grad and len(slices) == 2 * 7  # each slice whole, and its own classes
    torch.testing.assert_close(value, sigmoid_focal_loss(pred, labels, reduction="sum") / 2)


def test_a_target_that_learns_gets_its_gradient():
    """It is left to autograd."""
    score = torch.rand(N, P, requires_grad=True)
    quality_focal_loss(torch.randn(N, P, C), (torch.randint(0, C, (N, P)), score), avg_factor=1.0).backward()
    assert score.grad.abs().sum() > 0


def test_second_derivatives_are_refused():
    pred = torch.randn(N, P, C, requires_grad=True)
    gradient, = torch.autograd.grad(sigmoid_focal_loss(pred, torch.zeros(N, P, dtype=torch.long), avg_factor=1.0),
                                    pred, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
