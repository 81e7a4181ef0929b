"""Sliced losses are equal to the losses on all scores at once."""
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
    monkeypatch.setitem(losses.sliced.SLICE, "cpu", 4 * C + 1)
    seen, plain = [], losses.sliced.reduce_loss
    monkeypatch.setattr(losses.sliced, "reduce_loss", lambda *args: seen.append(args) or plain(*args))
    return seen


@pytest.mark.parametrize("name, weight", [
    *((name, weight) for name in ("focal", "kd", "binary") for weight in (None, (N, P), (N, P, C))),
    ("quality", None), ("quality", (N, P))])  # its entries are sums over the classes
def test_value_and_gradient(name, weight, slices):
    torch.manual_seed(0)
    function, other = arguments(name, torch.float64)
    weight = None if weight is None else torch.rand(weight, dtype=torch.float64)
    pred = torch.randn(N, P, C, dtype=torch.float64, requires_grad=True)
    factor = torch.tensor(3.0, dtype=torch.float64)
    value = function(pred, other, weight, avg_factor=factor)
    gradient, = torch.autograd.grad(2 * value, pred)
    assert len(slices) == 7
    whole = function(pred, other, weight, reduction="sum") / (factor + losses.sliced.EPS)
    expected, = torch.autograd.grad(2 * whole, pred)
    torch.testing.assert_close(value, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


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
    assert not value.requires_grad and len(slices) == 7
    torch.testing.assert_close(value, sigmoid_focal_loss(pred, labels, reduction="sum") / 2)


def test_a_target_that_learns_gets_its_gradient():
    """Only losses that need a gradient for the prediction alone are sliced."""
    score = torch.rand(N, P, requires_grad=True)
    quality_focal_loss(torch.randn(N, P, C), (torch.randint(0, C, (N, P)), score), avg_factor=1.0).backward()
    assert score.grad.abs().sum() > 0


def test_second_derivatives_are_refused():
    pred = torch.randn(N, P, C, requires_grad=True)
    gradient, = torch.autograd.grad(sigmoid_focal_loss(pred, torch.zeros(N, P, dtype=torch.long), avg_factor=1.0),
                                    pred, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
