"""Losses agree with the values and gradients of the original code."""
import pytest
import torch
from golden_cases import load, relative

from losses import LOSSES
from models.build import build

ARRAYS, META = load("losses")
OTHERS = {"PKDLoss"}  # takes only two maps: tested below

# Largest deviations measured: float64 2e-15; float32 9.3e-7, but 3.7e-6 for the KL divergence at T = 10, whose terms
# nearly cancel.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}


def argument(case, name, dtype):
    """An argument of a case as a tensor; a pair of them as a tuple."""
    def tensor(key):
        value = torch.as_tensor(ARRAYS[key])
        return value.to(dtype) if value.is_floating_point() else value

    key = f"{case}/{name}"
    return tensor(key) if key in ARRAYS else tuple(tensor(f"{key}/{i}") for i in range(2))


def test_no_case_is_forgotten():
    assert {case["config"]["type"] for case in META.values()} - LOSSES.keys() <= OTHERS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", [name for name, case in META.items() if case["config"]["type"] in LOSSES])
def test_value_and_gradient(case, dtype):
    loss = build(META[case]["config"], LOSSES, "loss")
    pred = argument(case, "pred", dtype).requires_grad_()
    extra = {name: argument(case, name, dtype) for name in ("weight", "avg_factor") if f"{case}/{name}" in ARRAYS}
    value = loss(pred, argument(case, "arg0", dtype), **extra)
    value.backward()
    assert value.dtype == pred.grad.dtype == dtype
    assert relative(value, ARRAYS[f"{case}/value"]) < TOLERANCE[dtype]
    assert relative(pred.grad, ARRAYS[f"{case}/grad"]) < TOLERANCE[dtype]


def test_pkd():
    from losses import PKDLoss
    arrays, meta = load("losses")
    pred = torch.tensor(arrays["pkd/pred"], requires_grad=True)
    value = PKDLoss(meta["pkd"]["config"]["loss_weight"])(pred, torch.tensor(arrays["pkd/arg0"]))
    value.backward()
    assert value.item() == pytest.approx(float(arrays["pkd/value"]), rel=1e-6)
    assert (pred.grad - torch.tensor(arrays["pkd/grad"])).abs().max() < 1e-6 * abs(arrays["pkd/grad"]).max()
