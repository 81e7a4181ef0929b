"""Weights that follow from gradient norms: `weight: {gradient_share: ...}`."""
import math

import pytest
import torch
from processes import together
from small_models import enliven, make_batch, small_distiller, teacher_entry

from kd.gradients import MOST, gradient_norm
from kd.processes import distributed
from models import ConfigError

CROSSKD = {"type": "CrossKD", "reused_teacher_head_idx": 1}
METHODS = (CROSSKD, {"type": "FGD"}, {"type": "PKD"}, {"type": "CWD"}, {"type": "MGD"})


def shared(method: dict, share: float = 0.3, every: int = 1, **options) -> dict:
    return method | {"weight": {"gradient_share": share, "gradient_share_every": every}, **options}


def achieved(model, step: int, batch) -> dict[str, float]:
    """The norm of each method's weighted gradient at the neck over that of the student's own, in one step."""
    model.advance(step, 10, 100)
    torch.manual_seed(step)  # for MGD's mask
    losses, student = model.loss_and_pass(*batch)
    norms = model.gradient_norms(losses, student.features)
    model.zero_grad()
    sum(losses.values()).backward()
    return {name: norm / norms["student"] for name, norm in norms.items() if name != "student"}


@pytest.mark.parametrize("method, every", [*((method, 1) for method in METHODS), ({"type": "FGD"}, 20)],
                         ids=lambda value: value["type"] if isinstance(value, dict) else str(value))
def test_the_share_is_achieved_while_the_student_learns(method, every):
    model, share = small_distiller(shared(method, every=every)), 0.3
    optimizer = torch.optim.SGD(model.parameters(), 1e-5)
    found = []
    for step in range(22):
        found += achieved(model, step, make_batch(seed=step)).values()
        optimizer.step()
    assert found[0] == pytest.approx(share)  # the first step measures
    mean = math.exp(sum(map(math.log, found)) / len(found))
    assert mean == pytest.approx(share, rel=0.05 if every == 1 else 0.15)
    assert 0.4 * share < min(found) <= max(found) < 2.5 * share  # of single batches
    assert model.gradient_shares.times == [22 if every == 1 else 12]


def test_options_and_teachers_multiply_the_share():
    """Two teachers, one with a weight; a method that warms up, and one that runs in every second step."""
    teachers = [teacher_entry(name="a"), teacher_entry(name="b") | {"weight": 2.0}]
    model = small_distiller(shared(CROSSKD, 0.5, warmup_epochs=1.0, name="cross"),
                            shared({"type": "FGD"}, 0.2, every=1, name="fgd") | {"every": 2, "decay": "linear"},
                            {"type": "PKD", "weight": 0.25, "name": "pkd"}, teacher=teachers)
    plain = small_distiller({"type": "PKD", "weight": 0.25, "name": "pkd"}, teacher=teachers)
    batch = make_batch()
    found = [achieved(model, step, batch) for step in range(4)]  # an epoch has 10 steps, a run 100 epochs
    expected = achieved(plain, 0, batch)
    for step, ratios in enumerate(found):
        assert [f"{t}/fgd" in ratios for t in "ab"] == [step % 2 == 0] * 2
        for teacher, factor in (("a", 1.0), ("b", 2.0)):
            assert ratios[f"{teacher}/cross"] == pytest.approx(0.5 * factor * step / 10)
            assert ratios[f"{teacher}/pkd"] == pytest.approx(expected[f"{teacher}/pkd"])
            if step % 2 == 0:
                assert ratios[f"{teacher}/fgd"] == pytest.approx(0.2 * factor * (1 - step / 1000))
    model.advance(3, 10, 100)
    assert model.measured_weights().keys() == {"weight/a/cross", "weight/b/cross"}


def test_the_reported_figures_are_those_of_the_weighted_losses():
    model = small_distiller(shared({"type": "FGD"}))
    losses, _ = model.loss_and_pass(*make_batch())
    plain = small_distiller({"type": "FGD"}).loss(*make_batch())
    weight = model.measured_weights()["weight/FGD0"]
    torch.testing.assert_close(losses["loss_fgd"], weight * plain["loss_fgd"])
    torch.testing.assert_close(model.shares(losses)["share/FGD0"], losses["loss_fgd"] / sum(losses.values()))


def test_measuring_changes_no_gradient():
    """The gradients of a step that measures are those of a step with the same weight as a number."""
    model = small_distiller(shared({"type": "FGD"}), CROSSKD)
    sum(model.loss(*make_batch()).values()).backward()
    weight = model.measured_weights()["weight/FGD0"].item()
    same = small_distiller({"type": "FGD", "weight": weight}, CROSSKD)
    sum(same.loss(*make_batch()).values()).backward()
    for own, other in zip(model.parameters(), same.parameters()):
        assert (own.grad is None) == (other.grad is None)
        assert own.grad is None or torch.equal(own.grad, other.grad)


def test_how_often_it_measures():
    model = small_distiller(shared({"type": "FGD"}, every=4), {"type": "PKD"})
    measured = []
    for step in range(60):
        model.advance(step, 10, 10)
        for _ in range(2):  # batches of one step
            if model.gradient_shares.due("FGD0", step):
                measured.append(step)
                model.gradient_shares.times[0] += 1
                model.gradient_shares.last[0] = step
    assert measured == [0, 1, 2, 3, 4, *range(6, 15, 2), *range(17, 30, 3), *range(33, 60, 4)]
    assert not model.gradient_shares.due("PKD1", 99)
    with torch.no_grad():  # nothing can be measured
        model.advance(99, 10, 10)
        assert model.loss(*make_batch())["loss_fgd"] == 0 and model.gradient_shares.times[0] == len(measured)


def feed(shares, *norms: float) -> float:
    """Let it take norms of student and method, and return the ratio that it then applies."""
    shares.update(torch.tensor(norms, dtype=torch.float64))
    return float(shares.weigh("FGD0", 1.0))


def test_norms_that_cannot_be_used_change_nothing():
    shares = small_distiller(shared({"type": "FGD"})).gradient_shares
    assert feed(shares, 1.0, 0.0) == 0 and "WARNING: FGD0: its weight is 0" in shares.describe()[0]
    assert feed(shares, 6.0, 2.0) == pytest.approx(3)
    for norms in ((1.0, 0.0), (0.0, 1.0), (math.inf, 1.0), (1.0, math.inf), (math.nan, 1.0), (1.0, math.nan)):
        assert feed(shares, *norms) == pytest.approx(3)
        shares.scales.fill_(1.0)
    assert feed(shares, 12.0, 1.0) == pytest.approx(6)  # the mean of logarithms
    assert shares.describe() == ["FGD0: its weight is 1.8, for a gradient_share of 0.3"]


@pytest.mark.parametrize("norms, limit", [((1e3, 1e-9), MOST), ((1e-9, 1e3), 1 / MOST)])
def test_the_ratio_has_limits(norms, limit):
    shares = small_distiller(shared({"type": "FGD"})).gradient_shares
    for _ in range(3):  # the first one may only find the scale
        ratio = feed(shares, *norms)
    assert ratio == pytest.approx(limit) and "(the limit)" in shares.describe()[0]


def test_one_odd_batch_counts_little():
    shares = small_distiller(shared({"type": "FGD"})).gradient_shares
    for _ in range(20):
        feed(shares, 1.0, 1.0)
    assert 1 < feed(shares, 1000.0, 1.0) < 10


@pytest.mark.parametrize("loss_scale", [1e-9, 1e9])
def test_gradients_in_fp16_neither_overflow_nor_vanish(loss_scale):
    """A gradient that passes through a tensor in fp16, where numbers above 65504 or below 6e-8 are lost."""
    shares = small_distiller(shared({"type": "FGD"})).gradient_shares.float()
    features = [torch.full((100,), 0.1, requires_grad=True)]
    own = features[0].half().float().square().sum()
    method = loss_scale * (features[0].half().float() ** 3).sum()
    expected = float(gradient_norm(own, features)) / (0.03 * 10 * loss_scale)
    for step in range(10):
        shares.measure(step, own, {"FGD0": method}, features)
    assert float(shares.weigh("FGD0", 1.0)) == pytest.approx(min(max(expected, 1 / MOST), MOST), rel=0.01)
    assert float(shares.logs.abs().max()) <= math.log(MOST) * 1.001


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_measures_what_float32_measures(dtype):
    weights = []
    for enabled in (False, True):
        model = small_distiller(shared(CROSSKD), shared({"type": "FGD", "alpha_fgd": 100.0}), dtype=torch.float32)
        for step in range(6):
            model.advance(step, 10, 10)
            with torch.autocast("cpu", dtype, enabled=enabled):
                model.loss(*make_batch(dtype=torch.float32))
        weights.append([float(value) for value in model.measured_weights().values()])
    assert weights[1] == pytest.approx(weights[0], rel=0.05) and min(weights[0]) > 0


def test_a_student_that_is_its_teacher_waits_for_a_gradient():
    model = small_distiller(shared({"type": "FitNet"}))
    model.student.load_state_dict(model.teacher.state_dict())
    for step in range(2):  # the same features: zero loss, zero gradient
        model.eval().student.train()
        model.train().advance(step, 10, 10)
        for module in model.student.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        losses = model.loss(*make_batch())
        assert all(value.isfinite() for value in losses.values()) and losses["loss_fitnet"] == 0
    assert "WARNING" in model.gradient_shares.describe()[0]
    enliven(model.student, 7)
    with torch.no_grad():
        for parameter in model.student.neck.parameters():
            parameter.mul_(1.5)
    model.advance(2, 10, 10)
    assert model.loss(*make_batch())["loss_fitnet"] > 0


def test_a_method_before_the_neck_is_refused():
    modules = {"student_modules": ["backbone.layer3"], "teacher_modules": ["backbone.layer3"]}
    model = small_distiller(shared({"type": "FitNet", **modules, "name": "early"}))
    with pytest.raises(ConfigError, match="distill.methods: early has no gradient at the outputs of the student's "
                                          "neck, so gradient_share cannot set its weight: give it a number"):
        model.loss(*make_batch())


@pytest.mark.parametrize("weight, message", [
    ({"gradient_share": 0}, "weight.gradient_share: must be above 0 and up to 100, not 0"),
    ({"gradient_share": 101}, "weight.gradient_share: must be above 0 and up to 100, not 101"),
    ({"gradient_share": "a"}, "weight.gradient_share: must be a number, not text"),
    ({}, "weight.gradient_share: missing"), (-1, "weight: must be at least 0, not -1"),
    ({"gradient_share": 1, "gradient_share_every": 0}, "weight.gradient_share_every: must be at least 1"),
    ({"gradient_sahre": 1}, 'weight.gradient_sahre: unknown key; did you mean "gradient_share"')])
def test_wrong_weights_are_refused(weight, message):
    with pytest.raises(ConfigError, match=f"distill.methods.0.{message}"):
        small_distiller({"type": "FGD", "weight": weight})


def test_compiled_code_is_measured():
    """Also after a step that does not measure, for which the backward pass was compiled to free its inputs."""
    model, plain = small_distiller(shared({"type": "FGD"})), small_distiller(shared({"type": "FGD"}))
    model.compile(backend="aot_eager")
    for each in (model, plain):
        each.gradient_shares.last[0] = 0
        for step in range(2):
            each.advance(step, 10, 10)
            sum(each.loss(*make_batch()).values()).backward()
            assert each.gradient_shares.times == [step]
    # A neck that is compiled gives all levels at once, so no level's gradient includes that of a coarser one.
    torch.testing.assert_close(model.measured_weights(), plain.measured_weights(), rtol=0.05, atol=0)


SIZES, COUNTS = ((64, 96), (50, 70), (60, 90), (33, 65)), (4, 2, 0, 0)  # the second process has no box


def measured_in_ddp() -> dict:
    """Weights and gradients of this process after two steps with its share of the batch, under DDP."""
    rank, world = distributed.rank(), distributed.world_size()
    images, targets = make_batch(SIZES, COUNTS)
    part = slice(rank * len(images) // world, (rank + 1) * len(images) // world)
    found = []
    for weights in ([shared({"type": "FGD"}), shared(CROSSKD, 0.5)], None):
        numbers = weights or [{**method, "weight": float(weight)} for method, weight in
                              zip(({"type": "FGD"}, CROSSKD), found[0]["weights"].values())]
        model = small_distiller(*numbers, teacher=teacher_entry(width=24))
        wrapped = distributed.data_parallel(model, torch.device("cpu"))
        for step in range(2):
            model.advance(step, 10, 10)
            model.zero_grad()
            sum(wrapped(images[part], targets[part]).values()).backward()
        found.append({"weights": model.measured_weights(), "state": model.gradient_shares.state(), "gradients": {
            name: p.grad for name, p in model.named_parameters() if p.grad is not None}})
    return {"measured": found[0], "with numbers": found[1]["gradients"]}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return together(measured_in_ddp, 2, tmp_path_factory.mktemp("ranks"))


def test_processes_measure_the_same(ranks):
    first, second = (each["measured"] for each in ranks)
    for part in ("weights", "state", "gradients"):
        assert first[part].keys() == second[part].keys() and len(first[part]) > 1
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])
    assert all(float(value) > 0 for value in first["weights"].values())


def test_measuring_does_not_disturb_the_gradients_of_ddp(ranks):
    for each in ranks:
        found, expected = each["measured"]["gradients"], each["with numbers"]
        assert found.keys() == expected.keys() and len(found) > 50
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def test_processes_measure_what_one_process_measures(ranks):
    """Up to what the statistics of CrossKD over a batch differ; FGD has none."""
    alone = measured_in_ddp()["measured"]["weights"]["weight/FGD0"]
    assert float(ranks[0]["measured"]["weights"]["weight/FGD0"]) == pytest.approx(float(alone), rel=1e-6)
