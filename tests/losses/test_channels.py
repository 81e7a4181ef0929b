"""Channels that are rescaled by the kernels of batch norm have the values and gradients of the formula."""
import pytest
import torch

import losses.channels
from losses import pkd_loss, rescaled_channels

FORMATS = [torch.contiguous_format, torch.channels_last]


def maps(layout: torch.memory_format, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = [(2, 8, 10, 13), (2, 8, 3, 1), (3, 8, 1, 1)]
    found = [(3 * torch.randn(size, generator=g, dtype=torch.float64) + 0.5).to(memory_format=layout) for size in sizes]
    found[0][:, 1] = 0.25  # a constant channel
    found[1][:, 2] *= 1e-7  # here the deviation is less than what is added to it
    return found


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("aligned", [False, True])
def test_values_and_gradients(layout, aligned):
    own, like = [x.requires_grad_() for x in maps(layout)], maps(layout, 1) if aligned else None
    found = rescaled_channels(own, like)
    expected = [losses.channels.by_formula(x, like[i] if aligned else None, 1e-6) for i, x in enumerate(own)]
    upstream = maps(layout, 2)
    gradients, exact = (torch.autograd.grad(values, own, upstream) for values in (found, expected))
    for each, other in (*zip(found, expected), *zip(gradients, exact)):
        torch.testing.assert_close(each, other, rtol=1e-9, atol=1e-9)
        assert each.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_a_gradient_in_another_layout(layout):
    own, like = maps(layout)[0].requires_grad_(), maps(layout, 1)[0]
    upstream = maps(layout, 2)[0]
    other = upstream.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    gradients = [torch.autograd.grad(rescaled_channels([own], [like]), own, each)[0] for each in (upstream, other)]
    torch.testing.assert_close(*gradients)


def test_single_values_have_deviation_zero():
    """On the coarsest level of one image there may be one value per channel; batch norm itself refuses that."""
    own, like = torch.randn(1, 4, 1, 1).requires_grad_(), torch.randn(1, 4, 1, 1)
    found, = rescaled_channels([own], [like])
    torch.testing.assert_close(found, like, rtol=1e-6, atol=1e-6)
    gradient, = torch.autograd.grad(found.sum(), own)
    assert gradient.isfinite().all()


def test_pkd_of_half_precision_is_computed_in_float32():
    own, other = (x.half() for x in maps(FORMATS[0])[:1] + maps(FORMATS[0], 1)[:1])
    found = pkd_loss(own[:, 3:], other[:, 3:])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), pkd_loss(own[:, 3:].double(), other[:, 3:].double()), rtol=1e-4, atol=0)
