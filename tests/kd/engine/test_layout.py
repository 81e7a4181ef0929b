"""The memory layout of a run: `train.channels_last`."""
import json
from dataclasses import asdict

import pytest
import torch
from caches import CROSSKD, run_config, without_teacher
from runs import config, config_with, model
from torch import nn

from data import generate_scenes
from kd.cache.fingerprint import in_channels_last
from kd.config import parse_config
from kd.engine import check, layout
from kd.engine.layout import Choice, Layout, choose_layout, common_size, kept_layout, measure
from kd.engine.run import build_run
from kd.engine.train import train
from kd.inference import precision
from kd.inference.precision import place, pointwise_pays, route_pointwise
from kd.processes.timing import interleave
from kd.work_dir.checkpoint import read_checkpoint

CPU = torch.device("cpu")
DISTILL = {"teacher": {"model": model(16), "checkpoint": None}, "methods": [CROSSKD]}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp("scenes"), train=6, val=2, size=(40, 60))


@pytest.fixture
def timed(monkeypatch):
    """Times in place of those of the clock, in seconds: ordinary, channels_last. Every call runs once."""
    times = [0.4, 0.5]

    def stand_in(calls, rounds, before, clock):
        for name, call in calls.items():
            before(name)
            call()
        return {name: [times[name] * torch.get_num_threads()] * rounds for name in calls}  # CPU time
    monkeypatch.setattr(layout, "interleave", stand_in)
    return times


def auto(scenes, distill=None, **train_section):
    return config_with(config(scenes, 1, distill), train={"channels_last": "auto", "check_images": 0} | train_section)


@pytest.mark.parametrize(("ordinary", "other", "chosen"), [
    (0.90, 1.0, False), (0.96, 1.0, False), (0.98, 1.0, True), (1.0, 1.0, True), (2.0, 1.0, True)])
def test_the_ordinary_layout_is_chosen_only_if_it_is_clearly_faster(timed, ordinary, other, chosen):
    timed[:] = ordinary, other
    found = measure(nn.Conv2d(1, 1, 1), lambda: None, CPU)
    assert found.channels_last is chosen and found.why == "measured"
    assert found.ms == pytest.approx({"ordinary": 1e3 * ordinary, "channels_last": 1e3 * other})


def test_a_run_keeps_what_it_has_chosen(scenes, tmp_path, timed, monkeypatch):
    cfg = auto(scenes, DISTILL)
    train(cfg, tmp_path / "a", CPU)
    chosen = json.loads((tmp_path / "a" / "run.json").read_text())["layout"]
    assert chosen["student"] == {"channels_last": False, "why": "measured",
                                 "ms": {"ordinary": 400, "channels_last": 500}}
    assert [teacher["channels_last"] for teacher in chosen["teachers"]] == [False]
    line = "train.channels_last: auto chose for the student ordinary (ordinary 400 ms, channels_last 500 ms)"
    assert line in (tmp_path / "a" / "train.log").read_text()
    state = read_checkpoint(tmp_path / "a" / "last.pth")
    assert state["layout"] == chosen

    monkeypatch.setattr(layout, "measure", lambda *_: pytest.fail("it was measured again"))
    timed[:] = 0.5, 0.4
    train(config_with(cfg, train={"epochs": 2}), tmp_path / "a", CPU, tmp_path / "a" / "last.pth")
    again = json.loads((tmp_path / "a" / "run.json").read_text())["layout"]
    assert again["student"]["channels_last"] is False and again["teachers"][0]["channels_last"] is False
    assert "student ordinary, as when the run was started" in (tmp_path / "a" / "train.log").read_text()
    # A setting in words replaces it.
    run = build_run(parse_config(auto(scenes, DISTILL, channels_last=True)), tmp_path, CPU, state)
    assert run.layout.student == Choice(True) and in_channels_last(run.student) and not run.layout.describe()[1:]


@pytest.mark.parametrize("distill", [None, DISTILL])
def test_a_measurement_changes_nothing_else(scenes, tmp_path, distill):
    """Weights, statistics of norms and random numbers; and it takes fewer than ten steps."""
    cfg = parse_config(auto(scenes, distill, channels_last=True))
    run = build_run(cfg, tmp_path, CPU)
    student = run.student
    before = {name: value.clone() for name, value in student.state_dict().items()}
    steps, original = [], student.run
    student.run = lambda *args, **more: steps.append(args[0].shape) or original(*args, **more)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    found = choose_layout(run.model, parse_config(auto(scenes, distill)), CPU, (64, 96), 4)
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(value.grad is None for value in run.model.parameters())
    assert 6 <= len(steps) < 10 and set(steps) == {(4, 3, 64, 96)}
    assert found.student.why == "measured" and min(found.student.ms.values()) > 0
    assert in_channels_last(student) == found.student.channels_last
    if distill:
        teacher, = found.teachers
        assert in_channels_last(run.distiller.teacher) == teacher.channels_last and set(teacher.ms) == set(
            found.student.ms)


def test_student_and_teacher_may_differ(scenes, tmp_path):
    run = build_run(parse_config(auto(scenes, DISTILL, channels_last=True)), tmp_path, CPU)
    batch = next(iter(run.train_loader))
    both = []
    for chosen in ((True, True), (True, False), (False, True), (False, False)):
        Layout("cpu", 1, Choice(chosen[0]), [Choice(chosen[1])], False).apply(run.model)
        assert (in_channels_last(run.student), in_channels_last(run.distiller.teacher)) == chosen
        images = run.student.preprocess(*batch)
        both.append(torch.stack([value for value in run.model.loss(images, batch[1]).values()]))
    for other in both[1:]:
        torch.testing.assert_close(other, both[0], rtol=1e-4, atol=1e-6)


def test_all_processes_use_the_choice_of_the_first(scenes, tmp_path, timed, monkeypatch):
    def first(value):  # what the first process sends: there, channels_last was faster
        if isinstance(value, Layout):
            value = Layout("cpu", 1, Choice(True), [Choice(True)], False)
        return value
    monkeypatch.setattr(layout.distributed, "from_first", first)
    run = build_run(parse_config(auto(scenes, DISTILL)), tmp_path, CPU)
    assert run.layout.student == Choice(True) and in_channels_last(run.student)
    assert in_channels_last(run.distiller.teacher)


def test_checkpoints_of_earlier_versions_had_one_setting(scenes):
    assert kept_layout({"config": {}}, CPU, 1).teachers == [Choice(True)]
    assert kept_layout({"config": {"train": {"channels_last": False}}}, CPU, 0).student == Choice(False)
    saved = {"layout": asdict(Layout("cuda", 1, Choice(True), [], False))}
    assert kept_layout(saved, CPU, 0) is None and kept_layout(saved, torch.device("cuda", 1), 0).student == Choice(True)
    assert kept_layout(saved, torch.device("cuda"), 1) is None
    assert kept_layout({"layout": {"device": "cpu"}}, CPU, 0) is None  # damaged


def test_stored_answers_decide_for_the_teacher(scenes, tmp_path, timed, monkeypatch):
    methods, cache = [CROSSKD], {"dir": str(tmp_path / "cache")}
    cfg = config_with(run_config(tmp_path, scenes, methods, 1, cache=cache), train={"channels_last": False})
    train(cfg, tmp_path / "first", CPU)
    timed[:] = 0.5, 0.4  # channels_last is faster, and its answers would have to be computed
    cfg = parse_config(config_with(cfg, train={"channels_last": "auto"}))
    run = build_run(cfg, tmp_path / "second", CPU)
    assert [run.layout.student.channels_last, run.layout.teachers[0].channels_last] == [True, False]
    assert "auto chose for the teacher ordinary, because distill.cache holds its answers in this layout" in (
        "\n".join(run.layout.describe()))
    batch = next(iter(run.train_loader))
    without_teacher(run.distiller).loss(run.student.preprocess(*batch), batch[1])
    # With answers in both layouts, the times decide.
    monkeypatch.setattr(run.distiller.caches[0], "stored_layouts", lambda: [True, False])
    assert layout.stored_layout(run.model, 0) is None


def test_check_shows_what_is_chosen(scenes, timed):
    text = check.check(parse_config(auto(scenes)), CPU)
    assert "auto chose for the detector ordinary (ordinary 400 ms, channels_last 500 ms)" in text


def test_the_measured_size_is_that_of_most_batches(scenes, tmp_path):
    run = build_run(parse_config(config(scenes)), tmp_path, CPU)
    assert common_size(run.train_loader.dataset) == (64, 64)


def test_a_wrong_word_is_named(tmp_path, scenes):
    with pytest.raises(ValueError, match="train.channels_last: must be true or false, .* or must be one of auto"):
        parse_config(auto(scenes, channels_last="fast"))


# --- 1x1 convolutions with one thread ---

def pointwise_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 1, stride=2), nn.Conv2d(16, 8, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pointwise_convolutions_compute_the_same_in_onednn(dtype):
    """Forward and backward; only those of stride 1 change."""
    net, other = pointwise_net().to(dtype), pointwise_net().to(dtype)
    route_pointwise(other)
    assert [conv.dilation for conv in other] == [(2, 2), (1, 1), (1, 1)]
    x = torch.randn(2, 8, 9, 11, dtype=dtype)
    for each in (net, other):
        each(x).square().sum().backward()
    for own, same in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(same.grad, own.grad)


def test_pointwise_convolutions_are_measured_where_there_is_a_choice(monkeypatch):
    monkeypatch.setattr(precision, "_dilated_is_faster", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert pointwise_pays(CPU, "none", None)
    assert not pointwise_pays(torch.device("cuda"), "none")
    assert not pointwise_pays(CPU, "bf16") and not pointwise_pays(CPU, "none", "bf16")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not pointwise_pays(CPU, "none")


@pytest.mark.parametrize("pays", [True, False])
def test_a_run_and_a_detector_use_the_faster_kernel(scenes, tmp_path, monkeypatch, pays):
    for module in (precision, layout):
        monkeypatch.setattr(module, "pointwise_pays", lambda *_: pays)
    run = build_run(parse_config(config_with(config(scenes, 1, DISTILL), model={"neck": {
        "type": "FPN", "out_channels": 16, "start_level": 1, "num_outs": 5}})), tmp_path, CPU)
    expected = (2, 2) if pays else (1, 1)
    for detector in (run.student, run.distiller.teacher):
        assert detector.neck.lateral_convs[0].conv.dilation == expected
    assert any("oneDNN" in line for line in run.layout.describe()) == pays
    fresh = build_run(parse_config(config(scenes)), tmp_path, CPU).student
    assert place(fresh, CPU, run.cfg.train).neck.lateral_convs[0].conv.dilation == expected


def test_the_kernel_stays_when_a_run_goes_on(scenes, tmp_path, monkeypatch):
    cfg = parse_config(config(scenes))
    saved = {"layout": asdict(Layout("cpu", torch.get_num_threads(), Choice(True), [], True))}
    monkeypatch.setattr(layout, "pointwise_pays", lambda *_: False)
    assert build_run(cfg, tmp_path, CPU, saved).student.neck.lateral_convs[0].conv.dilation == (2, 2)
    saved["layout"]["threads"] += 1
    assert build_run(cfg, tmp_path, CPU, saved).student.neck.lateral_convs[0].conv.dilation == (1, 1)


def test_preparation_is_not_timed():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    interleave(calls, 2, 1, lambda name: seen.append(f"<{name}"))
    assert "".join(seen) == "<aa<bb" * 3
