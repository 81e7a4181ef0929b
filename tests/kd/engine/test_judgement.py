"""What `--check` says in the end: its words and its figures."""
import json
from types import SimpleNamespace

import pytest
import torch
from runs import (
    assert_they_end,
    config,
    config_with,
    model,
    run_script,
    start_processes,
    write_checkpoint,
    write_config,
)

from data import generate_scenes
from kd.config import parse_config
from kd.engine.check.costs import Cost, Costs, labelled, measure_costs, put_back
from kd.engine.check.influence import Influence, influences
from kd.engine.check.judgement import in_words, judge_run
from kd.engine.check.pixels import Trial
from kd.engine.check.quality import Quality
from kd.engine.check.subjects import Subject
from kd.engine.run import build_run
from models.preprocess import Preprocess

CPU = torch.device("cpu")
BGR = {"mean": [103.53, 116.28, 123.675], "std": [57.375, 57.12, 58.395], "channel_order": "bgr"}
COSTS = Costs(Cost(0.64, 2 ** 31), Cost(0.4, 2 ** 30), 0.05, 0.01, 8, 1000, 500, 2, False)
METHODS = [{"type": "CrossKD", "reused_teacher_head_idx": 1}, {"type": "FGD", "weight": 0.5}]


def quality(ap=0.5, own=0.5, **more) -> Quality:
    """Of 60 images with objects; those of one detector differ."""
    each = {i: own + 0.1 * (i % 3 - 1) for i in range(60)}
    values = {"found": 0.93, "found_by_class": {"cell": 0.95, "plate": 0.7},
              "found_by_size": {"small": 0.4, "medium": 0.9, "large": None}} | more
    return Quality(60, 0.05, ap, {"cell": 0.6, "plate": 0.4}, 300, own=each, **values)


def subject(name="teacher 0", **more) -> Subject:
    where = "model.preprocess in teacher.yaml"
    return Subject(name, SimpleNamespace(preprocess=Preprocess()), where, **({"source": "a.pth"} | more))


STUDENT = subject("student", source=None, without="it starts untrained")


def said(*subjects, costs=COSTS, acts=(), of_images=60):
    run = SimpleNamespace(val_loader=SimpleNamespace(dataset=range(of_images)), distiller=SimpleNamespace(caches=[]))
    judgement = judge_run(run, [*subjects, *([] if subjects[-1].name == "student" else [STUDENT])], costs, dict(acts))
    json.dumps(judgement.content(), allow_nan=False)
    return str(judgement).strip().splitlines(), judgement


def test_a_good_teacher():
    acts = {"CrossKD0": Influence(0.4, 0.8, False), "FGD1": Influence(0.1, 3.0, False)}
    lines, judgement = said(subject(quality=quality(), trial=Trial(10, 40)), acts=acts)
    assert lines == [
        "JUDGEMENT",
        "  good     teacher 0: AP 50.0 on all 60 images of data.val; cell 60.0, plate 40.0",
        "  good     teacher 0 finds 93% of 300 objects (IoU 0.5, score 0.05 or more); cell 95%, plate 70%; small 40%, "
        "medium 90%",
        "  note     student: it starts untrained, so it has no AP yet",
        "  good     teacher 0: its pixel statistics and channel order look right: none of 10 others is clearly better "
        "on 40 images",
        "  cost     a step of 8 images takes 1.6 times one without distillation (0.64 s and 0.4 s)",
        "  cost     all 1000 steps take about 11 min, 7 min without distillation; evaluations add 5 s",
        "  cost     peak memory 2.00 GiB, about 1.00 GiB without distillation",
        "  good     CrossKD0: 40% of the loss after a few steps, its gradient is 80% of the student's own",
        "  good     FGD1: 10% of the loss after a few steps, its gradient is 3 times the student's own",
        "  => nothing looks wrong"]
    assert judgement.content()["detectors"]["teacher 0"]["quality"]["found_by_class"] == {"cell": 0.95, "plate": 0.7}
    assert judgement.content()["costs"]["training_seconds"] == pytest.approx(640)
    assert "of the first" not in lines[1] and "the first 60 of 90 images" in said(
        subject(quality=quality()), of_images=90)[0][1]


def warnings(*subjects, **more):
    lines, judgement = said(*subjects, **more)
    found = [line.removeprefix("  WARNING  ") for line in lines if line.startswith("  WARNING")]
    assert len(found) == judgement.warnings == judgement.content()["warnings"]
    assert lines[-1].startswith(f"  => {len(found)} warning" if found else "  => nothing")
    return found


def test_teachers_that_look_wrong():
    line, = warnings(subject(quality=quality(), trial=Trial(10, 40, BGR, 0.31, 0.02)))
    assert line == ("teacher 0: its pixel statistics or channel order look wrong. With {mean: [103.53, 116.28, 123.675]"
                    ", std: [57.375, 57.12, 58.395], channel_order: bgr} its AP of 40 images is 31.0 points higher on "
                    "average (standard error 2.0) than with {mean: [123.675, 116.28, 103.53], std: [58.395, 57.12, "
                    "57.375], channel_order: rgb}: change model.preprocess in teacher.yaml")
    line, = warnings(subject(quality=quality(), recorded=BGR, trial=Trial(10, 40)))
    assert "its checkpoint was trained with {mean: [103.53, " in line
    assert "detects next to nothing" in warnings(subject(quality=quality(ap=0.004)))[0]
    assert "finds 30% of 300 objects" in warnings(subject(quality=quality(found=0.3)))[0]
    hardly = quality(found_by_class={"cell": 0.99, "plate": 0.05})
    assert "It hardly finds plate" in warnings(subject(quality=hardly))[0]
    assert "no AP, because it is untrained" in warnings(subject(source=None, without="it is untrained"))[0]


def test_a_teacher_that_is_worse_than_the_student():
    start = subject("student", quality=quality(own=0.7), source=None)
    line, = warnings(subject(quality=quality(own=0.5)), start)
    assert line.startswith("teacher 0 is worse than the student is before training: its AP of single images is 20.0 ")
    assert not warnings(subject(quality=quality(own=0.7)), start)
    lines, _ = said(subject(quality=quality(own=0.7)), start)
    assert any("not clearly better than the student" in line for line in lines)
    assert "  note     student: AP 50.0 before training; cell 60.0, plate 40.0" in lines


def test_many_classes_are_cut_short():
    many = {f"class {i}": i / 100 for i in range(80)}
    found = quality(found_by_class=many)
    found.per_class = many
    lines, _ = said(subject(quality=found))
    assert lines[1].endswith("; the lowest of 80 classes are class 0 0.0, class 1 1.0, class 2 2.0, class 3 3.0, "
                             "class 4 4.0")
    assert "It hardly finds class 0, class 1, " in lines[2] and max(map(len, lines)) < 400


@pytest.mark.parametrize("act, expected", [
    (Influence(0.004, 0.003, False), "0.4% of the loss after a few steps, its gradient is 0.3% of the student's own: "
                                     "it hardly changes the student. Set its weight: {gradient_share: 0.3}"),
    (Influence(0.9, 25.0, False), "its gradient is 25 times the student's own: the student hardly learns from its "
                                  "labels. Set its weight: {gradient_share: 0.3}, or a smaller number"),
    (Influence(0.004, 0.003, True), None), (Influence(0.4, None, False), None), (Influence(0.4, 9.9, False), None)])
def test_weights_that_are_far_too_small_or_large(act, expected):
    start = subject("student", quality=quality(own=0.3), source=None)
    found = warnings(subject(quality=quality()), start, acts={"FGD0": act})
    assert found == [] if expected is None else len(found) == 1 and found[0].endswith(expected)


def test_gradients_beside_an_untrained_student():
    """Its own are small at first, so a method may be many times stronger, but not any times."""
    teacher = subject(quality=quality())
    for gradient, count in ((0.003, 1), (116.0, 0), (5000.0, 1)):
        assert len(warnings(teacher, acts={"FGD0": Influence(0.4, gradient, False)})) == count
    lines, _ = said(teacher, acts={"FGD0": Influence(0.4, 116.0, False)})
    assert ("  note     FGD0: 40% of the loss after a few steps, its gradient is 116 times the student's own, which is "
            "small while a student is untrained") in lines


def test_slow_loading_and_times():
    costs = Costs(Cost(0.1, None), None, 0.5, None, 8, 36000, 0, 2, True)
    found = warnings(subject("student", source=None, without="it starts untrained"), costs=costs)
    assert len(found) == 1 and "loading the images of a step takes 0.5 s" in found[0]
    lines, _ = said(STUDENT, costs=costs)
    assert "  cost     all 36000 steps take about 5.0 h" in lines and "  cost     peak memory not measured" in lines
    assert any("busy" in line for line in lines)
    costs.workers = 0
    assert costs.training(costs.run) == pytest.approx(36000 * 0.6)
    assert (in_words(44.4), in_words(91), in_words(5401)) == ("44 s", "2 min", "1.5 h")


# --- measurements ---

@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp("scenes"), train=8, val=3, size=(64, 64))


def built(scenes, tmp_path, methods=METHODS, **train):
    distill = {"teacher": {"model": model(), "checkpoint": None}, "methods": methods}
    run = build_run(parse_config(config_with(config(scenes, 1, distill), train=train)), tmp_path, CPU)
    run.model.train()
    return run, [[batch] for batch in run.train_loader]


def test_a_share_that_is_set_is_the_share_that_is_found(scenes, tmp_path):
    """The gradients agree with those of training; weights scale them; a share is what it says."""
    run, groups = built(scenes, tmp_path, [*METHODS, {"type": "PKD", "weight": {"gradient_share": 0.25}},
                                           {"type": "FGD", "name": "loud", "weight": 500.0, "warmup_epochs": 1},
                                           {"type": "FGD", "name": "shown", "weight": 0}])
    batches = [batch for group in groups for batch in group]
    found = influences(run, batches[:1])
    assert found["loud"].gradient == pytest.approx(1000 * found["FGD1"].gradient, rel=1e-3)
    assert found["PKD2"].gradient == pytest.approx(0.25) and found["PKD2"].chosen and not found["loud"].chosen
    assert found["shown"].gradient == found["shown"].loss == 0 and found["shown"].chosen
    assert 0 < sum(each.loss for each in found.values()) < 1

    from kd.engine.step import compute_losses, to_device
    images, targets = to_device(*batches[0], run.student, CPU)
    losses, _, student = compute_losses(run.model, images, targets, CPU, "none")
    norms = run.distiller.gradient_norms(losses, student.features)
    assert found["CrossKD0"].gradient == pytest.approx(norms["CrossKD0"] / norms["student"], rel=1e-3)


def test_the_steps_of_a_check_leave_nothing_behind(scenes, tmp_path):
    run, groups = built(scenes, tmp_path, [METHODS[0], {"type": "MGD", "weight": {"gradient_share": 0.3}}], ema=0.9)
    states = [run.model, run.average.module, run.distiller.gradient_shares]
    before = [{name: x.clone() for name, x in (*state.named_parameters(), *state.named_buffers())} for state in states]
    with put_back(run):
        costs, losses, lines = measure_costs(run, groups, None)
        assert any(not torch.equal(before[0][name], x) for name, x in run.model.named_parameters())
    for state, values in zip(states, before):
        for name, x in (*state.named_parameters(), *state.named_buffers()):
            assert torch.equal(x, values[name]), name
    shares = run.distiller.gradient_shares
    assert (run.step, run.distiller.step, shares.times, shares.last) == (0, 0, [0, 0], [-1, -1])
    assert costs.run.step > costs.alone.step > 0 and costs.steps == 2 and costs.images == 4 and costs.evaluated == 3
    assert "share/CrossKD0" in losses and lines[0].startswith("MGD1: its weight is")
    assert not list(tmp_path.iterdir())


def test_the_student_alone_sees_no_unlabelled_images():
    batch = (torch.zeros(3, 3, 8, 8), [{}, {}, {"unlabelled": True}])
    (images, targets), = labelled([batch])
    assert len(images) == len(targets) == 2


def test_the_judgement_of_two_processes_and_its_file(scenes, tmp_path):
    """A teacher that is trained, a student that starts from a detector, and EMA: nothing hangs, and one speaks."""
    path = write_checkpoint(tmp_path / "teacher.pth", {"model": model()})
    cfg = config(scenes, 1, {"teacher": {"model": model(), "checkpoint": str(path)}, "methods": METHODS})
    cfg = config_with(cfg, data={"batch_size": 2}, train={"ema": 0.9, "init": str(path)})
    log, out = tmp_path / "log", tmp_path / "out" / "check.json"
    assert_they_end(start_processes(2, log, "train.py", "--cfg", write_config(tmp_path / "cfg.yaml", cfg), "--check",
                                    "--device", "cpu", "--out", out), 0, log)
    text, content = log.read_text(), json.loads(out.read_text())
    assert text.count("JUDGEMENT") == 1 and "on all 3 images of data.val" in text
    assert "student: AP " in text and "teacher 0: other pixel statistics were not tried: it needs 20 images" in text
    assert content["detectors"]["teacher 0"]["quality"]["images"] == 3
    teacher, student = (content["detectors"][name]["quality"] for name in ("teacher 0", "student"))
    assert teacher == student and teacher["ap"] > 0  # of the same weights, also after the steps
    assert content["costs"]["run"]["step"] > 0 and set(content["methods"]) == {"CrossKD0", "FGD1"}
    assert [f"  {line['kind']:<7}  {line['text']}" in text for line in content["lines"]] == [True] * len(
        content["lines"])


def test_out_is_for_the_check(scenes, tmp_path, monkeypatch, capsys):
    path = write_config(tmp_path / "cfg.yaml", config(scenes, 1))
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--out", tmp_path / "a.json") == 2
    assert "--out is for --check" in capsys.readouterr().err
