"""Parameter groups and the learning rate."""
import pytest
import torch
from torch import nn

from kd.optim import ScheduleConfig, build_optimizer, load_optimizer, lr_factor
from models import ConfigError


def model():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 1, 1]), nn.Conv2d(4, 2, 1))
    net[0].requires_grad_(False)
    return net


def test_frozen_parameters_are_left_out_and_all_others_decay_by_default():
    optimizer = build_optimizer({"lr": 0.1, "weight_decay": 0.01}, model(), batch=4)
    assert [len(g["params"]) for g in optimizer.param_groups] == [4]
    assert optimizer.param_groups[0]["weight_decay"] == 0.01


def test_norm_and_bias_can_be_spared():
    groups = build_optimizer({"decay_norm_and_bias": False, "weight_decay": 0.01}, model(), 4).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.01), (3, 0.0)]


def test_biases_can_have_their_own_rate_and_decay_and_those_of_norms_keep_the_plain_ones():
    net = model()
    groups = build_optimizer({"lr": 0.1, "weight_decay": 0.01, "bias_lr_mult": 2, "bias_decay_mult": 0}, net,
                             4).param_groups
    plain, bias = groups
    assert (plain["lr"], plain["initial_lr"], plain["weight_decay"]) == (0.1, 0.1, 0.01)
    assert (bias["lr"], bias["initial_lr"], bias["weight_decay"]) == (0.2, 0.2, 0.0)
    assert len(plain["params"]) == 3 and bias["params"] == [net[2].bias]


def test_the_learning_rate_scales_with_the_batch_if_asked():
    assert build_optimizer({"lr": 0.01, "base_batch_size": 16}, model(), 4).param_groups[0]["lr"] == 0.0025
    assert build_optimizer({"lr": 0.01}, model(), 4).param_groups[0]["lr"] == 0.01


def test_what_a_configuration_cannot_say():
    with pytest.raises(ConfigError, match="optimizer.base_batch_size: must be at least 1, not 0"):
        build_optimizer({"base_batch_size": 0}, model(), 4)
    with pytest.raises(ConfigError, match="optimizer.batch: unknown key"):  # it follows from the data and the processes
        build_optimizer({"batch": 4}, model(), 4)


def test_adamw():
    assert isinstance(build_optimizer({"type": "AdamW", "lr": 1e-4}, model(), 4), torch.optim.AdamW)


def test_schedule():
    schedule = ScheduleConfig(warmup_steps=5, warmup_factor=0.001, milestones=[2, 3], gamma=0.1)
    factors = [lr_factor(schedule, step, steps_per_epoch=10) for step in range(40)]
    assert factors[0] == 0.001
    assert factors[2] == pytest.approx(0.001 + 0.999 * 2 / 4)
    assert factors[4] == 1 and factors[19] == 1
    assert factors[20] == pytest.approx(0.1) and factors[29] == pytest.approx(0.1)
    assert factors[30] == pytest.approx(0.01)


def test_a_constant_warm_up_ends_at_once():
    schedule = ScheduleConfig(warmup_steps=5, warmup_factor=0.25, warmup="constant", milestones=[2], gamma=0.1)
    factors = [lr_factor(schedule, step, steps_per_epoch=3) for step in range(7)]
    assert factors == pytest.approx([0.25, 0.25, 0.25, 0.25, 1, 1, 0.1])


@pytest.fixture
def memory_of_nan():
    """New memory holds NaN instead of random values."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_first_step_that_overflows_leaves_nothing_behind(kind, memory_of_nan):
    def weights(losses):
        torch.manual_seed(0)
        net = nn.Linear(4, 2)
        optimizer = build_optimizer({"type": kind, "lr": 0.1}, net, 4)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for factor in losses:
            optimizer.zero_grad()
            scaler.scale(factor * net(torch.ones(1, 4)).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    assert torch.equal(weights([float("inf"), 1.0, 1.0]), weights([1.0, 1.0]))


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_an_optimiser_goes_on_with_weights_in_another_memory_format(kind):
    def weights(later):
        torch.manual_seed(0)
        net, images = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 8, 8)
        state = None
        for memory_format in (torch.contiguous_format, later):
            optimizer = build_optimizer({"type": kind, "lr": 0.1}, net.to(memory_format=memory_format), 4)
            if state is not None:
                load_optimizer(optimizer, state)
            for _ in range(2):
                optimizer.zero_grad()
                net(images).square().mean().backward()
                optimizer.step()
            state = optimizer.state_dict()
        return net.weight.detach()

    torch.testing.assert_close(weights(torch.channels_last), weights(torch.contiguous_format), rtol=1e-4, atol=1e-6)
