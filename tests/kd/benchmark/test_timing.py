"""Times of calls in turn, and the shares of a call's time."""
import time

import pytest
import torch
from torch import nn

from kd.benchmark.timing import shares, with_flops
from kd.processes.timing import interleave, medians_ms

CPU = torch.device("cpu")


def test_calls_are_timed_in_turn():
    seen = []
    seconds = interleave({"a": lambda: seen.append("a"), "b": lambda: (seen.append("b"), time.sleep(0.01))},
                         rounds=3, warmup=2)
    assert "".join(seen) == "ababababab"
    assert [len(seconds[name]) for name in "ab"] == [3, 3]
    assert min(seconds["b"]) >= 0.01 > max(seconds["a"]) > 0


def test_medians():
    assert medians_ms({"a": [0.001, 0.1, 0.002], "b": [0.003]}) == {"a": 2, "b": 3}


@pytest.fixture
def step():
    """Forward and backward of a convolution, a norm and something else."""
    net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.GroupNorm(4, 16), nn.BatchNorm2d(16))
    x = torch.randn(2, 16, 64, 64)
    return lambda: net(x).exp().sum().backward()


def test_shares_add_up_and_name_what_is_neither_convolution_nor_norm(step):
    step()
    found = shares(step, 2, CPU)
    assert found["convolution"] + found["norm"] + found["overhead"] == pytest.approx(1)
    assert min(found["convolution"], found["norm"], found["overhead"]) > 0
    assert {"aten::exp", "aten::mul", "between operators"} <= set(found["largest"])  # mul: backward of exp
    assert not any("conv" in name or "norm" in name for name in found["largest"] if name.startswith("aten::"))
    assert sum(found["largest"].values()) <= found["overhead"] + 1e-9
    # Operators inside a convolution or norm, for example allocations, count as part of it.
    assert shares(lambda: nn.functional.conv2d(torch.ones(1, 1, 99, 99), torch.ones(1, 1, 9, 9)).detach(), 3,
                  CPU)["largest"].keys() <= {"between operators", "aten::ones", "aten::empty", "aten::fill_",
                                             "aten::detach", "detach"}


def test_flops_of_forward_and_backward():
    net = nn.Conv2d(3, 4, 3, bias=False)
    x = torch.randn(2, 3, 10, 12, requires_grad=True)
    forward = 2 * (3 * 3 * 3) * (2 * 4 * 8 * 10)
    result, flops = with_flops(lambda: net(x))
    assert flops == forward and torch.equal(result, net(x))
    assert with_flops(lambda: net(x).sum().backward())[1] == 3 * forward  # to the input, and to the weight
