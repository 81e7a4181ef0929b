"""The output before a run starts: the teacher's AP, and `--check`."""
import json
import re

import pytest
from runs import assert_they_end, config, config_with, model, run_script, start_processes, write_config

from data import generate_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp("scenes"), train=8, val=6, size=(64, 64))


def distilled(scenes, **teacher):
    return config(scenes, 1, {
        "teacher": {"model": model(), "checkpoint": None} | teacher,
        "methods": [{"type": "CrossKD", "reused_teacher_head_idx": 1}, {"type": "FGD", "weight": 0.5}]})


def test_check_shows_everything_and_writes_nothing(scenes, tmp_path, monkeypatch, capsys):
    path = write_config(tmp_path / "cfg.yaml", distilled(scenes))
    monkeypatch.chdir(tmp_path)
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--check", "--device", "cpu", "train.check_images=4") == 0
    printed = capsys.readouterr().out
    for expected in (
            "JUDGEMENT", "  WARNING  teacher 0: no AP, because it is untrained (checkpoint: null)\n",
            "  note     student: it starts untrained, so it has no AP yet\n",
            "CrossKD0 (CrossKD) from teacher 0: times 1 now; losses.loss_cls_kd 1, losses.loss_reg_kd 4",
            "classification tower after 1 convolution, finest of 5 levels (4, 16, 8, 8) <- teacher",
            "through the teacher's layers 2.. of its head: student class scores (4, 86, 6) <- teacher class scores",
            "FGD1 (FGD) from teacher 0: times 0.5 now; alpha_fgd 0.001, beta_fgd 0.0005, gamma_fgd 0.001",
            "student neck output 4 (4, 16, 1, 1) <- teacher neck output 4 (4, 16, 1, 1)",
            "loss_cls ", "loss_fgd ", "share/CrossKD0 ", "detections on 4 images", "peak memory",
            " times one without distillation ("):
        assert expected in printed, expected
    assert [p.name for p in tmp_path.iterdir()] == ["cfg.yaml"]


def test_check_shows_weights_that_are_measured(scenes, tmp_path, monkeypatch, capsys):
    path = write_config(tmp_path / "cfg.yaml", distilled(scenes))
    monkeypatch.chdir(tmp_path)
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--check", "--device", "cpu", "train.check_images=0",
                      "distill.methods.0.weight={gradient_share: 0.3}",
                      "distill.methods.1.weight.gradient_share=0.5", "distill.methods.1.warmup_epochs=1") == 0
    printed = capsys.readouterr().out
    for expected in ("CrossKD0 (CrossKD) from teacher 0: a share of 0.3 of the gradient now; losses.loss_cls_kd 1",
                     "FGD1 (FGD) from teacher 0: a share of 0 of the gradient now; ", " weight/CrossKD0 ",
                     " weight/FGD1 0\n", "for a gradient_share of 0.3\n", "for a gradient_share of 0.5\n"):
        assert expected in printed, expected
    for line in re.findall(r"(?:CrossKD0|FGD1): its weight is (\S+), for", printed):
        assert float(line) > 0
    assert "WARNING: CrossKD0" not in printed and "WARNING: FGD1" not in printed


def test_a_method_before_the_neck_needs_a_number(scenes, tmp_path, monkeypatch, capsys):
    cfg = distilled(scenes)
    cfg["distill"]["methods"][1] |= {"student_modules": ["backbone.layer3"], "teacher_modules": ["backbone.layer3"],
                                     "weight": {"gradient_share": 1}}
    path = write_config(tmp_path / "cfg.yaml", cfg)
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--check", "--device", "cpu") == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "distill.methods: FGD1 has no gradient at the outputs of the student's neck" in error[0]


def test_check_of_a_plain_detector(scenes, tmp_path, monkeypatch, capsys):
    path = write_config(tmp_path / "cfg.yaml", config(scenes, 1))
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--check", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "loss_dfl" in printed and "peak memory" in printed and "teacher" not in printed


def test_check_refuses_losses_that_are_not_finite(scenes, tmp_path, monkeypatch, capsys):
    cfg = write_config(tmp_path / "cfg.yaml", config_with(config(scenes), data={"workers": 0}))
    assert run_script(monkeypatch, "train.py", "--cfg", cfg, "--check", "--device", "cpu",
                      "model.preprocess.std=[2e-38, 1, 1]") == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "loss_cls, loss_bbox, loss_dfl, loss: not finite in the first step" in error[0]


@pytest.mark.parametrize("images, expected", [(100, "AP on the first 6 images"), (2, "AP on the first 2 images"),
                                              (0, None)])
def test_a_run_begins_with_the_teachers_ap(scenes, tmp_path, monkeypatch, images, expected):
    path = write_config(tmp_path / "cfg.yaml", distilled(scenes))
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", tmp_path / "run", "--device", "cpu",
                      f"train.check_images={images}") == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert (expected in log) if expected else ("before training" not in log)
    assert log.index("before training") < log.index("step 1/") if expected else True


def test_a_teacher_of_other_classes_cannot_be_measured_without_a_map(scenes, tmp_path, monkeypatch, capsys):
    teacher = model()
    teacher["head"]["num_classes"] = 9
    cfg = distilled(scenes, model=teacher)
    cfg["distill"]["methods"] = [{"type": "FGD"}]
    path = write_config(tmp_path / "cfg.yaml", cfg)
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--check", "--device", "cpu") == 0
    assert ("teacher 0: no AP, because it has 9 classes and the data 6: set distill.teacher.class_map" in
            capsys.readouterr().out)


def test_shares_and_gradient_norms_are_logged(scenes, tmp_path, monkeypatch):
    path = write_config(tmp_path / "cfg.yaml", distilled(scenes))
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", tmp_path / "run", "--device", "cpu",
                      "train.grad_norm_every=2", "train.epochs=2", "train.check_images=0") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    for line in steps:
        own = line["loss_cls_kd"] + line["loss_reg_kd"]
        assert line["share/CrossKD0"] == pytest.approx(own / line["loss"], rel=1e-5)
        assert line["share/FGD1"] == pytest.approx(line["loss_fgd"] / line["loss"], rel=1e-5)
    norms = [line for line in lines if "grad_norm/student" in line]
    assert [line["step"] for line in norms] == [1, 3] and len(steps) == 4
    assert all(line[f"grad_norm/{name}"] > 0 for line in norms for name in ("student", "CrossKD0", "FGD1"))


def test_a_detector_of_more_classes_is_evaluated_by_a_class_map(scenes, tmp_path, monkeypatch, capsys):
    """Six of nine classes, in another order: the figures are those of the detector that has only these."""
    import torch

    from models import build_detector
    wide, narrow = config(scenes), config(scenes)
    for cfg, classes in ((wide, 9), (narrow, 6)):
        cfg["model"]["head"]["num_classes"] = classes
    torch.manual_seed(0)
    detector = build_detector(wide["model"])
    torch.nn.init.normal_(detector.bbox_head.gfl_cls.weight)
    torch.nn.init.zeros_(detector.bbox_head.gfl_cls.bias)
    torch.save(detector.state_dict(), tmp_path / "wide.pth")
    class_map = [8, 0, 3, 4, 1, 2]
    detector.bbox_head.select_classes(class_map)
    torch.save(detector.state_dict(), tmp_path / "narrow.pth")
    figures = []
    for cfg, name, extra in ((wide, "wide", [f"eval.class_map={class_map}"]), (narrow, "narrow", [])):
        path, out = write_config(tmp_path / f"{name}.yaml", cfg), tmp_path / f"{name}.json"
        assert run_script(monkeypatch, "eval.py", "--cfg", path, "--checkpoint", tmp_path / f"{name}.pth", "--out", out,
                          "--device", "cpu", *extra) == 0
        figures.append(json.loads(out.read_text()))
    assert figures[0] == figures[1] and figures[0]["AR100"] > 0
    capsys.readouterr()
    path = tmp_path / "wide.yaml"
    assert run_script(monkeypatch, "eval.py", "--cfg", path, "--checkpoint", tmp_path / "wide.pth",
                      "eval.class_map=[1, 2]") == 2
    assert "eval.class_map: has 2 entries" in capsys.readouterr().err


def test_of_two_processes_one_prints(tmp_path):
    """Also if the other process has no image to evaluate."""
    scenes = generate_scenes(tmp_path / "scenes", train=4, val=1, size=(64, 64))
    path = write_config(tmp_path / "cfg.yaml", config_with(config(scenes), data={"batch_size": 2}))
    log = tmp_path / "log"
    assert_they_end(start_processes(2, log, "train.py", "--cfg", path, "--check", "--device", "cpu"), 0, log)
    assert log.read_text().count("a step of 2 images takes") == 1 and "on 1 image\n" in log.read_text()
