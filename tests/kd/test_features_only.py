"""Teachers that give feature maps only: torchvision's detectors with a pyramid, and networks from a function."""
import json
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from feature_networks import Pyramid, Wrapped
from runs import config, run_script, write_config
from small_models import falls, gradients, make_batch, small_config, small_distiller

from data import generate_scenes
from kd import build_distiller
from kd.build import build_teacher
from kd.config.resume import changes
from kd.config.sections import TeacherConfig
from models import ConfigError
from models.backbones.features import torchvision_features, torchvision_name
from models.weights import CheckpointError, load_weights

FEATURE = [{"type": "FGD"}, {"type": "PKD"}, {"type": "MGD"}, {"type": "CWD"}, {"type": "FitNet"}]
PREDICTION = [{"type": "CrossKD"}, {"type": "Mimic"}, {"type": "KD"}, {"type": "DKD"}, {"type": "LD"},
              {"type": "CWD", "on": "logits"}]
FACTORY = {"factory": "feature_networks:build", "checkpoint": None}
RCNN = {"torchvision": "fasterrcnn_resnet50_fpn", "checkpoint": None}


def name(value):
    return "-".join(str(v) for v in value.values())


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp("scenes"), train=8, val=4, size=(64, 64))


# --- torchvision ---

@pytest.fixture(scope="module")
def rcnn():
    torch.manual_seed(0)
    return torchvision.models.get_model("fasterrcnn_resnet50_fpn", weights=None, weights_backbone=None).eval()


def test_a_detector_of_torchvision(rcnn, tmp_path, reported):
    """Its maps are those of torchvision for the same pixels; maps are paired by stride; its weights load by name."""
    torch.save(rcnn.state_dict(), tmp_path / "rcnn.pth")
    model = build_distiller({"model": small_config(), "distill": {
        "teacher": RCNN | {"checkpoint": str(tmp_path / "rcnn.pth")},
        "methods": [{"type": "FGD"}, {"type": "FitNet", "levels": [0, 2]}]}}).train()
    log = reported()
    total = len([key for key in rcnn.backbone.state_dict() if "num_batches" not in key])
    assert f"{total} of {total} tensors; in the file only: " in log and "(rpn.head" in log
    assert "FGD compares maps of strides [8, 16, 32, 64]; the teacher has none of the student's strides [128]" in log
    assert "FitNet compares" not in log
    assert model.teacher.strides == [4, 8, 16, 32, 64] and model.teacher.feature_channels == [256] * 5
    assert [pairs.places() for pairs in (method.pairs for method in model.methods[0])] == [
        [(f"neck output {i}", f"neck output {i + 1}") for i in range(4)], [("neck output 0", "neck output 1"),
                                                                          ("neck output 2", "neck output 3")]]
    images, targets = make_batch(dtype=torch.float32)
    seen = model.passes(images, targets).teachers[0]
    pixels = images * model.student.preprocess.std.float() + model.student.preprocess.mean.float()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (rcnn.transform.image_mean, rcnn.transform.image_std))
    with torch.no_grad():
        expected = rcnn.backbone((pixels[:1] / 255 - mean) / std)
    for found, other in zip(seen.features, expected.values()):
        torch.testing.assert_close(found[:1], other, rtol=1e-3, atol=1e-3)
    losses = model(images, targets)
    found = gradients(model, {key: losses[key] for key in ("loss_fgd", "loss_fitnet")})
    assert any("align" in key and grad is not None for key, grad in found.items())
    assert not any(p.requires_grad for p in model.teacher.parameters()) and not model.teacher.training
    assert not any("teacher" in key for key in [*model.state_dict(), *dict(model.named_parameters())])


@pytest.mark.parametrize("kind, strides", [
    ("fcos_resnet50_fpn", [8, 16, 32, 64, 128]), ("fasterrcnn_mobilenet_v3_large_fpn", [32, 64])])
def test_other_detectors_of_torchvision(kind, strides):
    """Of MobileNet's two maps of stride 32, the first is used."""
    features, statistics = torchvision_features(kind, None, "key")
    assert features.out_strides == strides
    assert statistics == {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "channel_order": "rgb"}
    if "mobilenet" in kind:
        images = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            found, expected = features.eval()(images), features.model(images)
        assert torch.equal(found[0], expected["0"]) and torch.equal(found[1], expected["pool"])


def test_weights_of_an_earlier_torchvision(rcnn):
    old = {key.replace("_blocks.0.0.", "_blocks.0.").replace("_blocks.1.0.", "_blocks.1."): value
           for key, value in rcnn.state_dict().items()}
    assert "backbone.fpn.inner_blocks.0.weight" in old
    features, _ = torchvision_features("fasterrcnn_resnet50_fpn", None, "key")
    report = load_weights(features.model, old, names=torchvision_name)
    assert not report.missing and torch.equal(features.model.fpn.inner_blocks[1][0].weight,
                                              rcnn.backbone.fpn.inner_blocks[1][0].weight)
    del old["backbone.body.layer4.0.conv1.weight"]
    with pytest.raises(CheckpointError, match="missing 1 .body.layer4.0.conv1.weight"):
        load_weights(features.model, old, names=torchvision_name)


@pytest.mark.parametrize("source, eps", [
    ("torchvision-detector://fasterrcnn_resnet50_fpn/COCO_V1", 0.0), (None, 1e-5), ("own.pth", 1e-5),
    ("torchvision-detector://fasterrcnn_resnet50_fpn/DEFAULT", 0.0),
    ("x/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth", 0.0)])
def test_published_weights_have_batch_norms_without_eps(source, eps):
    features, _ = torchvision_features("fasterrcnn_resnet50_fpn", source, "key")
    assert {m.eps for m in features.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {eps}


def test_the_default_weights_are_torchvisions(monkeypatch):
    """The address behind DEFAULT, without downloading it."""
    from models.checkpoints import sources
    asked = []
    monkeypatch.setattr(sources, "_download", lambda url: asked.append(url) or "/nowhere.pth")
    entry = TeacherConfig(checkpoint="DEFAULT", torchvision="fasterrcnn_resnet50_fpn_v2")
    assert entry.source == "torchvision-detector://fasterrcnn_resnet50_fpn_v2/DEFAULT"
    with pytest.raises(CheckpointError, match="distill.teacher: no such checkpoint file: /nowhere.pth"):
        build_teacher(entry, 3)
    wanted = torchvision.models.detection.FasterRCNN_ResNet50_FPN_V2_Weights.DEFAULT.url
    assert asked == [wanted] and wanted.startswith("https://")


# --- a function ---

@pytest.mark.parametrize("method", FEATURE, ids=name)
def test_methods_learn_from_a_factory(method):
    model = small_distiller(method, teacher=FACTORY | {"arguments": {"channels": 12}}, dtype=torch.float32)
    assert model.teacher.strides == [4, 8, 16, 32, 64] and model.teacher.feature_channels == [12] * 5
    falls(model)


def test_a_factory_beside_a_detector_in_float64_and_bf16():
    model = small_distiller({"type": "PKD"}, teacher=[FACTORY | {"name": "maps", "precision": "bf16"},
                                                      {"model": small_config(), "checkpoint": None, "name": "whole"}])
    losses = model.loss(*make_batch())
    assert {"loss_feat_kd/maps/PKD0", "loss_feat_kd/whole/PKD0"} < losses.keys()
    assert {value.dtype for value in losses.values()} == {torch.float64}
    assert all(p.dtype == torch.float64 for p in model.teacher.parameters())


def test_a_factorys_network_sees_its_own_pixels():
    model = small_distiller({"type": "PKD"}, teacher=FACTORY)
    images, targets = make_batch()
    pixels = images * model.student.preprocess.std + model.student.preprocess.mean
    seen = model.passes(images, targets).teachers[0].images
    torch.testing.assert_close(seen[0, :, :64, :96], pixels[0, :, :64, :96].flip(0) / 255)
    said = small_distiller({"type": "PKD"}, teacher=FACTORY | {"preprocess": {"channel_order": "rgb"}})
    assert said.teacher.preprocess.channel_order == "rgb" and said.teacher.preprocess.statistics[1] == [255.0] * 3


@pytest.mark.parametrize("kind", ["build", "Wrapped"])
def test_a_factorys_weights_are_loaded_by_name(kind, tmp_path, reported):
    torch.manual_seed(1)
    network = {"build": Pyramid, "Wrapped": Wrapped}[kind](8)
    torch.save({"state_dict": network.state_dict() | {"head.weight": torch.zeros(1)}}, tmp_path / "own.pth")
    entry = FACTORY | {"factory": f"feature_networks:{kind}", "checkpoint": str(tmp_path / "own.pth")}
    model = small_distiller({"type": "PKD"}, teacher=entry, dtype=torch.float32)
    for key, value in model.teacher.backbone.model.state_dict().items():
        assert torch.equal(value, network.state_dict()[key])
    assert "14 of 14 tensors" in reported()


def test_modules_of_a_network_by_name():
    model = small_distiller({"type": "FitNet", "student_modules": ["neck.fpn_convs.0.conv"],
                             "teacher_modules": ["backbone.model.down.0"]}, teacher=FACTORY, dtype=torch.float32)
    falls(model)


# --- what is refused ---

@pytest.mark.parametrize("method", PREDICTION, ids=name)
@pytest.mark.parametrize("entry", [FACTORY, RCNN | {"checkpoint": "DEFAULT"}], ids=["factory", "torchvision"])
def test_methods_on_predictions(method, entry, monkeypatch):
    """Before anything is built or downloaded."""
    monkeypatch.setattr("kd.build.build_detector", None)
    with pytest.raises(ConfigError, match=f"^distill.methods.0: {method['type']} needs predictions of a teacher, and "
                                          "teacher 0, .* gives feature maps only: use .*FGD"):
        build_distiller({"model": small_config(), "distill": {"teacher": entry, "methods": [method]}})


@pytest.mark.parametrize("entry, message", [
    (RCNN | {"torchvision": "fasterrcnn_resnet50_fpn_v3"}, "torchvision: .* is no detector.*did you mean"),
    (RCNN | {"torchvision": "ssd300_vgg16"}, 'torchvision: "ssd300_vgg16" has no feature pyramid'),
    (RCNN | {"cfg": "a.yaml"}, "torchvision: describes the teacher, and so do others"),
    (RCNN | {"class_map": [0, 1, 2]}, "class_map: makes no sense with torchvision"),
    (RCNN | {"part": "student"}, "part: makes no sense with torchvision"),
    (RCNN | {"checkpoint": "zoo:gfl_r50_1x"}, "checkpoint: zoo:gfl_r50_1x has weights of another network"),
    (RCNN | {"checkpoint": "torchvision://resnet50"}, "checkpoint: torchvision://resnet50 has weights of another"),
    (RCNN | {"arguments": {}}, "arguments: are those of factory, which is missing"),
    ({"model": small_config(), "checkpoint": None, "preprocess": {}}, "preprocess: is for torchvision or factory"),
    (FACTORY | {"factory": "feature_networks"}, "factory: must be module:function"),
    (FACTORY | {"factory": "no_such_module:build"}, 'factory: there is no module "no_such_module"'),
    (FACTORY | {"factory": "feature_networks:biuld"}, 'factory: .* has no function "biuld"; did you mean "build"'),
    (FACTORY | {"factory": "feature_networks:NUMBER"}, "has no function"),
    (FACTORY | {"factory": "feature_networks:broken"}, "factory: .* fails: RuntimeError: no weights here .*line"),
    (FACTORY | {"arguments": {"width": 3}}, "arguments: do not fit feature_networks:build: .*width"),
    (FACTORY | {"factory": "feature_networks:flat"}, "factory: its network must give a list or dict of feature maps"),
    (FACTORY | {"factory": "feature_networks:one_map"}, "must give a list or dict of feature maps, not Tensor"),
    (FACTORY | {"factory": "feature_networks:odd"}, "factory: output 2 of its network is .*whole number"),
    (FACTORY | {"factory": "feature_networks:not_a_network"}, "factory: .* must return a torch.nn.Module, not an int"),
    (FACTORY | {"factory": "feature_networks:without_statistics"}, "preprocess: missing: give the mean and std"),
    (FACTORY | {"preprocess": {"mena": [0, 0, 0]}}, 'preprocess.mena: unknown key; did you mean "mean"')])
def test_entries(entry, message):
    with pytest.raises(ConfigError, match=f"^distill.teacher.*{message}") as caught:
        small_distiller({"type": "FGD"}, teacher=entry)
    assert "\n" not in str(caught.value)


def test_other_refusals(tmp_path):
    with pytest.raises(ConfigError, match="distill.init_student: teacher 0, .* gives feature maps only"):
        small_distiller({"type": "FGD"}, teacher=FACTORY, init_student=True)
    with pytest.raises(ConfigError, match="levels: level 4 has stride 128 .* teacher's strides are .4, 8, 16, 32, 64"):
        small_distiller({"type": "FGD", "levels": [4]}, teacher=FACTORY)
    torch.save(Pyramid(4).state_dict(), tmp_path / "narrow.pth")
    with pytest.raises(CheckpointError, match="distill.teacher: .*other shapes for"):
        small_distiller({"type": "FGD"}, teacher=FACTORY | {"checkpoint": str(tmp_path / "narrow.pth")})


def test_a_wrong_factory_or_method_is_found_before_weights_are_downloaded(monkeypatch):
    """The code runs once, and the student's weights do not depend on it."""
    calls, asked = [], []
    monkeypatch.setattr("feature_networks.build", lambda channels=8: calls.append(1) or Pyramid(channels))
    monkeypatch.setattr("models.checkpoints.sources._download", lambda url: asked.append(url) or "/nowhere.pth")
    student = small_config(backbone={"weights": "https://example.org/r18.pth"})
    for teacher, levels in ((FACTORY | {"factory": "feature_networks:broken"}, None), (FACTORY, [4]),
                            (FACTORY | {"checkpoint": "https://example.org/own.pth"}, [4])):
        with pytest.raises(ConfigError):
            build_distiller({"model": student, "distill": {"teacher": teacher, "methods": [
                {"type": "PKD", "levels": levels}]}})
    assert asked == [] and len(calls) == 2
    weights = []
    for teacher in (FACTORY, {"model": small_config(), "checkpoint": None}):
        torch.manual_seed(3)
        weights.append(build_distiller({"model": small_config(), "distill": {
            "teacher": teacher, "methods": [{"type": "PKD"}]}}).student.state_dict())
    assert all(torch.equal(*pair) for pair in zip(*(each.values() for each in weights)))


def test_the_place_of_an_error_is_in_the_users_code(tmp_path, monkeypatch):
    (tmp_path / "wrong_syntax.py").write_text("def build(:")
    monkeypatch.syspath_prepend(tmp_path)
    wrong = FACTORY | {"factory": "wrong_syntax:build"}, FACTORY | {"arguments": {"channels": -1}}
    for entry, message in zip(wrong, (r"SyntaxError: .* \(wrong_syntax.py, line 1\)$",
                                      r"\(.*feature_networks.py, line \d+\)$")):
        with pytest.raises(ConfigError, match=message):
            small_distiller({"type": "FGD"}, teacher=entry)


# --- a run ---

def test_a_run_from_the_check_to_the_pictures(scenes, tmp_path, monkeypatch, capsys):
    """The module is in the current folder, where no script looks for modules."""
    source = Path(__file__).parents[1] / "feature_networks.py"
    (tmp_path / "my_teacher.py").write_text(source.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_teacher", raising=False)  # another test's
    methods = [{"type": "FGD"}, {"type": "FitNet"}]
    teacher = FACTORY | {"factory": "my_teacher:build", "arguments": {"channels": 4}}
    path = write_config(tmp_path / "cfg.yaml", config(scenes, 2, {"teacher": teacher, "methods": methods}))
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--check", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "teacher 0: no AP, because it gives feature maps only\n" in printed
    assert "student: it starts untrained" in printed
    assert "student neck output 3 (4, 16, 1, 1) <- teacher neck output 4 (4, 4, 1, 1)" in printed
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", "run", "--device", "cpu",
                      "train.epochs=1") == 0
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", "run", "--device", "cpu", "--resume") == 0
    assert "resumed at step 2" in (tmp_path / "run" / "train.log").read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["teachers"] == {}
    capsys.readouterr()
    for arguments in (("visualize.py", "--checkpoint", "run/last.pth", "--out", "out", "--count", 1, "--device", "cpu"),
                      ("summary.py",)):
        assert run_script(monkeypatch, arguments[0], "--cfg", path, *arguments[1:]) == 0
    captured = capsys.readouterr()
    assert "no detections and scores of teacher: it gives feature maps only" in captured.out + captured.err
    assert "features only" in captured.out and any((tmp_path / "out").iterdir())


def test_its_cost_where_its_code_needs_numbers(monkeypatch):
    from kd.evaluation.cost import brief
    model = small_distiller({"type": "PKD"}, teacher=FACTORY)
    assert "GFLOPs" in brief(model.teacher, (64, 64)) and "unknown" not in brief(model.teacher, (64, 64))
    forward = Pyramid.forward
    monkeypatch.setattr(Pyramid, "forward", lambda self, x: forward(self, x + float(x.sum())))
    assert "GFLOPs unknown" in brief(model.teacher, (64, 64))


def test_compiled_it_gives_the_same():
    losses = []
    for compiled in (False, True):
        model = small_distiller({"type": "FitNet"}, teacher=FACTORY)
        if compiled:
            model.compile(backend="aot_eager")
        losses.append(model.loss(*make_batch())["loss_fitnet"])
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)


def test_the_benchmark_times_it(tmp_path, monkeypatch):
    teacher = FACTORY | {"checkpoint": "none.pth"}
    cfg = config(Path("nowhere"), distill={"teacher": teacher, "methods": [{"type": "FGD"}]})
    path = write_config(tmp_path / "cfg.yaml", cfg)
    assert run_script(monkeypatch, "benchmark.py", "--cfg", path, "--device", "cpu", "--rounds", 1, "--size", 64, 64,
                      "--batch", 1, "--eval-images", 2, "--out", tmp_path / "bench.json") == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    parts, = (each["parts_ms"] for each in report["configs"].values())
    assert {"teacher", "method FGD0"} <= parts.keys()


def test_a_resumed_run_names_another_network():
    before, after = ({"model": small_config(), "distill": {"teacher": FACTORY | {"arguments": {"channels": c}},
                                                           "methods": []}} for c in (4, 8))
    change, = changes(before, after)
    assert (change.key, change.rule, change.old, change.new) == ("distill.teacher.arguments.channels", "warn", 4, 8)


def test_a_replay_file_runs_no_code_of_its_own(scenes, tmp_path, monkeypatch, capsys):
    """A factory in it runs only if a configuration of the user has the same."""
    from kd.config import parse_config
    from kd.engine.replay import save_replay
    from kd.engine.run import build_run
    cfg = config(scenes, 1, {"teacher": FACTORY, "methods": [{"type": "FGD"}]})
    run = build_run(parse_config(cfg), tmp_path, torch.device("cpu"))
    save_replay(run, tmp_path / "replay.pth", 0, [next(iter(run.train_loader))])
    path = write_config(tmp_path / "cfg.yaml", cfg)
    other = write_config(tmp_path / "other.yaml", cfg | {"distill": cfg["distill"] | {
        "teacher": FACTORY | {"arguments": {"channels": 16}}}})
    called = []
    monkeypatch.setattr("feature_networks.build", lambda *args, **kwargs: called.append(1) or Pyramid(8))
    for extra in ((), ("--cfg", other)):
        assert run_script(monkeypatch, "train.py", "--replay", tmp_path / "replay.pth", "--device", "cpu", *extra) == 2
        assert "feature_networks:build, which runs code: give your configuration" in capsys.readouterr().err
    assert not called
    assert run_script(monkeypatch, "train.py", "--replay", tmp_path / "replay.pth", "--device", "cpu", "--cfg",
                      path) == 0
    assert called and "loss_fgd" in capsys.readouterr().out
