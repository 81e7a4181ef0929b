"""Batch norms that are folded into convolutions: values, gradients, and that nothing stale is used."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import folding
from models.folding import KEPT, conv_norm, do_not_keep_folded, folded_by_formula


def layers(dtype=torch.float64, bias=False, layout=torch.contiguous_format, learns=True, groups=1):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 6, 3, 2, 1, bias=bias, groups=groups), nn.BatchNorm2d(6).eval()
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean):
            value.normal_()
        norm.running_var.uniform_(0.5, 2)
    pair = nn.ModuleList([conv, norm]).to(dtype, memory_format=layout).requires_grad_(learns)
    return tuple(pair)


def image(dtype=torch.float64):
    return torch.randn(2, 4, 9, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("bias, groups", [(False, 1), (True, 1), (False, 2)])
def test_values_and_gradients(bias, groups, layout):
    conv, norm = layers(bias=bias, groups=groups, layout=layout)
    x, plus = image().to(memory_format=layout).requires_grad_(), torch.randn(2, 6, 5, 4, dtype=torch.float64)
    wanted = [x, *conv.parameters(), *norm.parameters()]
    found, expected = conv_norm(conv, norm, x, nn.ReLU(), plus), F.relu(norm(conv(x)) + plus)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    for mine, theirs in zip(*(torch.autograd.grad(value, wanted, upstream) for value in (found, expected))):
        torch.testing.assert_close(mine, theirs)


def test_a_norm_that_learns_without_its_convolution():
    conv, norm = layers()
    conv.requires_grad_(False)
    x = image()
    for mine, theirs in zip(*(torch.autograd.grad(value.square().sum(), list(norm.parameters()))
                              for value in (conv_norm(conv, norm, x), norm(conv(x))))):
        torch.testing.assert_close(mine, theirs)


def change_in_place(conv, norm):
    with torch.no_grad():
        conv.weight.mul_(2)


def load(conv, norm):
    norm.load_state_dict({name: value + 1 for name, value in norm.state_dict().items()})


def replace(conv, norm):
    conv.weight = nn.Parameter(conv.weight + 1, requires_grad=False)


def set_data(conv, norm):
    norm.running_var = norm.running_var * 2


@pytest.mark.parametrize("change", [change_in_place, load, replace, set_data])
def test_frozen_layers_are_folded_once_until_a_value_changes(change, monkeypatch):
    conv, norm = layers(learns=False)
    x, calls = image(), []
    monkeypatch.setattr(folding, "folded_by_formula", lambda *args: calls.append(1) or folded_by_formula(*args))
    for _ in range(3):
        torch.testing.assert_close(conv_norm(conv, norm, x), norm(conv(x)))
    assert len(calls) == 1
    change(conv, norm)
    torch.testing.assert_close(conv_norm(conv, norm, x), norm(conv(x)))
    assert len(calls) == 2


def test_other_dtype_and_layout():
    conv, norm = layers(torch.float32, learns=False)
    conv_norm(conv, norm, image(torch.float32))
    conv.double(), norm.double()
    torch.testing.assert_close(conv_norm(conv, norm, image()), norm(conv(image())))
    conv.to(memory_format=torch.channels_last)
    conv_norm(conv, norm, image())
    assert KEPT[conv].weight.is_contiguous(memory_format=torch.channels_last)


def test_autocast_gets_weights_of_its_precision():
    conv, norm = layers(torch.float32, learns=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = conv_norm(conv, norm, image(torch.float32))
        weight, bias = folded_by_formula(conv.weight, None, norm.weight, norm.bias, norm.running_mean,
                                         norm.running_var, norm.eps)
        expected = F.conv2d(image(torch.float32), weight, bias, 2, 1)
    assert KEPT[conv].weight.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(conv_norm(conv, norm, image(torch.float32)), norm(conv(image(torch.float32))))


def test_what_is_kept_stays_out_of_states_and_ends_with_its_layer():
    conv, norm = layers(learns=False)
    names, size = list(conv.state_dict()), len(KEPT)
    conv_norm(conv, norm, image())
    assert list(conv.state_dict()) == names and len(KEPT) == size + 1
    assert copy.deepcopy(conv) not in KEPT
    del conv
    assert len(KEPT) == size


def test_nothing_is_kept_of_layers_that_learn_or_are_spread_over_processes():
    for learns in (True, False):
        conv, norm = layers(learns=learns)
        if not learns:
            do_not_keep_folded(nn.ModuleList([conv]))
        with torch.no_grad():
            conv_norm(conv, norm, image())
        assert conv not in KEPT


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fused_relu_and_sum(layout):
    conv, norm = layers(torch.float32, learns=False, layout=layout)
    x, plus = image(torch.float32).to(memory_format=layout), torch.randn(2, 6, 5, 4).to(memory_format=layout)
    given = plus.clone()
    for more in (None, plus):
        found = conv_norm(conv, norm, x, nn.ReLU(), more)
        expected = F.relu(norm(conv(x)) + (0 if more is None else more))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert found.is_contiguous(memory_format=layout)
    assert torch.equal(plus, given)


def test_tensors_that_stand_in_for_a_short_time():
    """A later one may come to be at the address of an earlier one."""
    conv, norm = layers(learns=False)
    for number in range(4):
        weights = {"weight": torch.full_like(conv.weight, number)}
        original = conv.weight
        del conv.weight
        conv.weight = weights.pop("weight")
        torch.testing.assert_close(conv_norm(conv, norm, image()), norm(conv(image())))
        del conv.weight
        conv.weight = original


def test_without_numbers():
    conv, norm = (layer.to("meta") for layer in layers(learns=False))
    assert conv_norm(conv, norm, image().to("meta")).shape == (2, 6, 5, 4) and conv not in KEPT


def test_hooks_see_what_they_are_on():
    conv, norm = layers(torch.float32, learns=False)
    relu, x = nn.ReLU(inplace=True), image(torch.float32)
    for module in (conv, norm, relu):
        seen = []
        hook = module.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.clone()))
        found = conv_norm(conv, norm, x, relu)
        hook.remove()
        assert len(seen) == 1
        torch.testing.assert_close(found, F.relu(norm(conv(x))), rtol=1e-5, atol=1e-6)
