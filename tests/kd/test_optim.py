"""Parameter groups and the learning rate."""
import pytest
import torch
from runs import ROOT, built
from small_models import small_distiller, teacher_entry
from torch import nn

from kd.config import load_config
from kd.optim import ScheduleConfig, build_optimizer, earlier_names, load_optimizer, lr_factor
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


def test_biases_can_have_their_own_rate_and_decay_and_those_of_norms_only_the_decay():
    net, cfg = model(), {"lr": 0.1, "weight_decay": 0.01, "bias_lr_mult": 2, "bias_decay_mult": 0}
    plain, norm, bias = build_optimizer(cfg, net, 4).param_groups
    assert (plain["lr"], plain["initial_lr"], plain["weight_decay"]) == (0.1, 0.1, 0.01)
    assert (norm["lr"], norm["initial_lr"], norm["weight_decay"]) == (0.1, 0.1, 0.0)
    assert (bias["lr"], bias["initial_lr"], bias["weight_decay"]) == (0.2, 0.2, 0.0)
    assert plain["params"] == [net[1].weight, net[2].weight]
    assert (norm["params"], bias["params"]) == ([net[1].bias], [net[2].bias])
    plain, norm, bias = build_optimizer(cfg | {"norm_decay_mult": 0.5}, net, 4).param_groups
    assert (norm["lr"], norm["weight_decay"], norm["params"]) == (0.1, 0.005, [net[1].weight, net[1].bias])
    assert (plain["params"], bias["params"]) == ([net[2].weight], [net[2].bias])


def mmengine(module, lr, decay, norm_decay_mult=None, bias_lr_mult=None, bias_decay_mult=None, prefix=""):
    """Learning rate and weight decay of each trained parameter by the rules of mmengine 0.7.3 for `paramwise_cfg`."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)
    found = {}
    for name, parameter in module.named_parameters(recurse=False):
        own_lr, own_decay = lr, decay
        if name == "bias" and not isinstance(module, norms) and bias_lr_mult is not None:
            own_lr = lr * bias_lr_mult
        if isinstance(module, norms) and norm_decay_mult is not None:
            own_decay = decay * norm_decay_mult
        elif name == "bias" and bias_decay_mult is not None:
            own_decay = decay * bias_decay_mult
        if parameter.requires_grad:
            found[prefix + name] = own_lr, own_decay
    for name, child in module.named_children():
        found |= mmengine(child, lr, decay, norm_decay_mult, bias_lr_mult, bias_decay_mult, f"{prefix}{name}.")
    return found


def values(optimizer):
    """Learning rate and weight decay of each parameter."""
    return {name: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups
            for name in group["param_names"]}


FCOS = {"bias_lr_mult": 2.0, "bias_decay_mult": 0.0}
PUBLISHED = [path for folder in ("crosskd", "fgd", "ld", "fcos")
             for path in sorted((ROOT / "configs" / folder).iterdir())]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_configurations_train_each_parameter_as_the_originals(path):
    """CrossKD's FCOS sets only the two factors of biases; FGD's FCOS the same, in mmcv 1, where norms' factor is 1.

    The improved FCOS is that of PGD's authors, who set no factors.
    """
    factors = FCOS if "fcos" in path.stem and "improved" not in path.stem else {}
    if "fgd" in path.stem or "normbbox" in path.stem:
        factors = factors | {"norm_decay_mult": 1.0}
    cfg = load_config(path)
    net = built(cfg)
    assert values(build_optimizer(cfg["optimizer"], net, 16)) == mmengine(net, 0.01, 0.0001, **factors)


@pytest.mark.parametrize("head", ["GFLHead", "RetinaHead", "ATSSHead", "FCOSHead"])
@pytest.mark.parametrize("options", [FCOS, FCOS | {"norm_decay_mult": 0.5}, {"decay_norm_and_bias": False}], ids=str)
def test_each_parameter_of_a_student_and_its_methods_as_in_mmengine(head, options):
    """Among them: a head's factors, group norms, CrossKD's and PKD's convolutions, FGD's layer norms."""
    net = small_distiller({"type": "CrossKD", "reused_teacher_head_idx": 1}, {"type": "PKD"}, {"type": "FGD"},
                          head=head, teacher=teacher_entry(head, width=24))
    found = values(build_optimizer({"lr": 0.1, "weight_decay": 0.01, **options}, net, 4))
    factors = options if "bias_lr_mult" in options else {"norm_decay_mult": 0.0, "bias_decay_mult": 0.0}
    assert found == mmengine(net, 0.1, 0.01, **factors)
    assert len(found) == sum(p.requires_grad for p in net.parameters())
    factor = "student.bbox_head.scales.0.scale"
    assert found.get(factor) == (None if head == "RetinaHead" else (0.1, 0.01))


def earlier_groups(net, bias_lr_mult=1, bias_decay_mult=1, decay_norm_and_bias=True):
    """Groups of parameters as they were made before optimisers knew the parameters' names."""
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    groups = {(0.1, 0.01): []}
    for name, parameter in net.named_parameters():
        owner, _, kind = name.rpartition(".")
        of_norm = isinstance(net.get_submodule(owner), norms)
        bias = kind == "bias" and not of_norm
        rate, decay = (0.1 * bias_lr_mult, 0.01 * bias_decay_mult) if bias else (0.1, 0.01)
        spared = not decay_norm_and_bias and (of_norm or parameter.dim() < 2)
        if parameter.requires_grad:
            groups.setdefault((rate, 0.0 if spared else decay), []).append(parameter)
    return list(groups.values())


@pytest.mark.parametrize("options", [{}, FCOS, {"decay_norm_and_bias": False}, FCOS | {"decay_norm_and_bias": False}],
                         ids=str)
def test_states_of_earlier_versions_reach_the_right_parameters(options):
    net = small_distiller({"type": "FGD"}, head="FCOSHead", teacher=teacher_entry("FCOSHead", width=24))
    earlier = torch.optim.SGD([{"params": members} for members in earlier_groups(net, **options)], 0.1, 0.9)
    for parameter in net.parameters():
        earlier.state[parameter]["momentum_buffer"] = torch.randn_like(parameter)
    cfg = {"lr": 0.1, "weight_decay": 0.01, **options}
    optimizer = build_optimizer(cfg, net, 4)
    load_optimizer(optimizer, earlier.state_dict(), earlier_names(net, cfg))
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], earlier.state[p]["momentum_buffer"]) for p in trained)


def test_a_state_is_loaded_into_other_groups_and_not_for_other_parameters():
    net = model()
    plain, other = build_optimizer({}, net, 4), build_optimizer({"bias_lr_mult": 2, "bias_decay_mult": 0}, net, 4)
    for parameter in plain.state:
        plain.state[parameter]["momentum_buffer"].normal_()
    load_optimizer(other, plain.state_dict())
    assert len(other.param_groups) == 3 and [group["lr"] for group in other.param_groups] == [0.01, 0.01, 0.02]
    for parameter in plain.state:
        assert torch.equal(other.state[parameter]["momentum_buffer"], plain.state[parameter]["momentum_buffer"])
    net[2].bias.requires_grad_(False)
    fewer = build_optimizer({}, net, 4)
    with pytest.raises(ValueError, match="only one of the two trains 2.bias"):
        load_optimizer(fewer, plain.state_dict())
    nameless = torch.optim.SGD(plain.param_groups[0]["params"], 0.1).state_dict()
    with pytest.raises(ValueError, match="it has trained 4 parameters, and this run trains 3"):
        load_optimizer(fewer, nameless, earlier_names(net, {}))


def test_the_learning_rate_scales_with_the_batch_if_asked():
    assert build_optimizer({"lr": 0.01, "base_batch_size": 16}, model(), 4).param_groups[0]["lr"] == 0.0025
    assert build_optimizer({"lr": 0.01}, model(), 4).param_groups[0]["lr"] == 0.01


def test_a_learning_rate_per_image():
    optimizer = build_optimizer({"lr": {"per_image": 0.125}, "bias_lr_mult": 2}, model(), 4)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.5, 1.0]
    assert optimizer.defaults["lr"] == 0.5
    adamw = build_optimizer({"type": "AdamW", "lr": {"per_image": 0.125}, "base_batch_size": None}, model(), 2)
    assert adamw.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("override, problem", [
    ("optimizer.lr={per_image: 0.1}", "optimizer.lr: per_image and optimizer.base_batch_size both scale the learning "
     "rate: set optimizer.base_batch_size=null, or give lr as a number"),
    ("optimizer.lr={per_image: -1}", "optimizer.lr.per_image: must be at least 0, not -1"),
    ("optimizer.lr={per_images: 1}", 'optimizer.lr.per_images: unknown key; did you mean "per_image"?'),
    ("optimizer.lr={}", "optimizer.lr.per_image: missing; it has no default"),
    ("optimizer.lr=-1", "optimizer.lr: must be at least 0, not -1 ("),
    ("optimizer.lr=fast", "optimizer.lr: must be a number, not text ('fast'), or must be a mapping of keys to values")])
def test_a_wrong_learning_rate_is_one_line(override, problem):
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "configs/gfl/gfl_r50_1x.yaml", [override])
    assert str(caught.value).startswith(problem) and "\n" not in str(caught.value)
    assert load_config(ROOT / "configs/gfl/gfl_r50_1x.yaml", ["optimizer.lr.per_image=0.1",
                                                              "optimizer.base_batch_size=null"])


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


def test_a_cosine():
    """It halves in the middle, ends at min_factor, goes on there beyond the end, and keeps the warm-up."""
    schedule = ScheduleConfig(warmup_steps=0, type="cosine", min_factor=0.2, milestones=[1])
    factors = [lr_factor(schedule, step, steps_per_epoch=10, epochs=4) for step in range(42)]
    assert factors[0] == 1 and factors[20] == pytest.approx(0.6)
    assert factors[10] == pytest.approx(0.2 + 0.8 * 0.8535533905932737)  # (1 + cos 45 degrees) / 2
    assert factors[40:] == [0.2, 0.2] and all(a > b for a, b in zip(factors, factors[1:41]))
    assert lr_factor(schedule, 100, 10) == 1
    warm = ScheduleConfig(warmup_steps=11, warmup_factor=0.0, type="cosine", min_factor=0.2)
    assert lr_factor(warm, 5, 10, 4) == pytest.approx(factors[5] / 2)
    assert lr_factor(warm, 10, 10, 4) == factors[10]


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
