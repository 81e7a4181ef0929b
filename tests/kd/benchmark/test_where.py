"""Where the time of a step goes, its floor, and oneDNN's kernels."""
import json
from pathlib import Path

import pytest
import torch
from runs import config, model, run_script, write_config
from torch import nn

from kd.benchmark.steps import build_subject, make_batch, prepare, training_step
from kd.benchmark.timing import with_flops
from kd.benchmark.where import report as explain
from kd.benchmark.where.floor import LAYOUTS, build_floor, record
from kd.benchmark.where.onednn import summarise
from kd.benchmark.where.parts import REST, where
from kd.benchmark.where.report import format_where, run_where
from kd.benchmark.workload import Workload
from kd.config import parse_config

CPU = torch.device("cpu")
WORK = Workload(size=(64, 90), batch=2, boxes=3, rounds=2, warmup=1, profiled=1)
DISTILL = {"teacher": {"model": model(16), "checkpoint": None},
           "methods": [{"type": "CrossKD", "reused_teacher_head_idx": 0}]}


def subject_and_step(cfg):
    torch.manual_seed(0)
    subject = build_subject(prepare(parse_config(cfg), WORK), CPU, WORK)
    return subject, training_step(subject, *make_batch(WORK, CPU, 80))


def test_the_floor_has_the_convolutions_that_are_needed():
    """No gradient to the input of the first trained layer, none to frozen weights, and none of a frozen layer."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 5, 3, 2, groups=1), nn.Conv2d(5, 6, 1))
    net[0].requires_grad_(False)
    net[2].requires_grad_(False)
    x = torch.randn(2, 3, 20, 21)

    def step():
        net(x).sum().backward()

    found = record(step)
    assert [(str(conv), conv.direction) for conv in found] == [
        ("3x3, 3 to 4, 20 x 21", "forward"), ("3x3 stride 2, 4 to 5, 18 x 19", "forward"),
        ("1x1, 5 to 6, 8 x 9", "forward"), ("1x1, 5 to 6, 8 x 9", "gradient of input"),
        ("3x3 stride 2, 4 to 5, 18 x 19", "gradient of weight, bias")]
    loop, rows = build_floor(step, CPU, 1)
    assert sum(row["times"] * row["flops"] for row in rows) == with_flops(step)[1] == with_flops(loop)[1]
    assert all(set(row["ms"]) == set(LAYOUTS) and min(row["ms"].values()) > 0 for row in rows)
    assert sum(row["times"] for row in rows) == len(record(loop)) == 5


def test_the_floor_of_a_distilled_step_has_its_operations():
    _, step = subject_and_step(config(Path("nowhere"), distill=DISTILL))
    loop, rows = build_floor(step, CPU, 1)
    assert with_flops(loop)[1] == with_flops(step)[1]
    costs = [row["times"] * min(row["ms"].values()) for row in rows]
    assert costs == sorted(costs, reverse=True)


def test_a_step_has_no_gradient_that_nobody_needs():
    """None in frozen stages, none from the first trained layers to their input, and none of the teacher's weights."""
    cfg = config(Path("nowhere"), distill=DISTILL)
    cfg["model"]["backbone"]["frozen_stages"] = 1
    subject, step = subject_and_step(cfg)
    backward = [conv for conv in record(step) if conv.backward]
    trained = [module for module in subject.model.modules()
               if isinstance(module, nn.Conv2d) and module.weight.requires_grad]
    several = sum(module in trained for module in subject.student.bbox_head.modules())  # run on each of 5 levels
    assert sum(conv.wanted[1] for conv in backward) == len(trained) + 4 * several
    first = [conv for conv in backward if not conv.wanted[0]]
    assert sorted(map(str, first)) == ["1x1, 8 to 16, 8 x 12", "3x3 stride 2, 8 to 16, 16 x 24"]
    assert "3x3, 8 to 8, 16 x 24" not in map(str, backward)  # layer1, and the stem before it
    teachers = sum(isinstance(module, nn.Conv2d) for module in subject.model.teacher.bbox_head.modules())
    assert sum(not conv.wanted[1] for conv in backward) == 5 * teachers  # CrossKD's way back to the student


def test_a_step_is_split_into_its_parts():
    subject, step = subject_and_step(config(Path("nowhere"), distill=DISTILL))
    step()
    found = where(subject, step, 2, CPU)
    parts = found["parts"]
    assert set(parts) == {"student backbone", "student neck", "student head", "teacher backbone", "teacher neck",
                          "teacher head", "assignment", "student losses", "crossed head", "method CrossKD0",
                          "optimiser", REST}
    assert all(part["forward"] > 0 for part in parts.values())
    trained = {"student backbone", "student neck", "student head", "student losses", "crossed head", "method CrossKD0"}
    assert {name for name, part in parts.items() if part["backward"] > 0} - {REST} == trained
    # Sums of gradients have no part; little else has none.
    assert sum(parts[REST].values()) < 0.5 * sum(sum(part.values()) for part in parts.values())
    convolutions = [name for name in found["operators"] if "conv" in name]
    assert convolutions and found["operators"][convolutions[0]]["calls"] >= 1
    # Nothing stays annotated.
    assert not any("forward" in vars(module) for module in subject.model.modules())
    assert "run_from" not in vars(subject.model.teacher.bbox_head) and "step" not in vars(subject.optimizer)


VERBOSE = """onednn_verbose,v1,info,oneDNN v3.12.0 (commit 80af)
onednn_verbose,v1,primitive,create:cache_miss,cpu,convolution,brg,forward_training,src:f32::blocked:acdb::f0,,,mb2,0.5
onednn_verbose,v1,primitive,exec,cpu,reorder,jit:uni,undef,src:f32::blocked:acdb::f0 dst:f32::blocked:Acdb32a::f0,attr,,256x256x3x3,0.25
onednn_verbose,v1,primitive,exec,cpu,reorder,jit:uni,undef,src:f32::blocked:acdb::f0 dst:f32:a:blocked:Acdb32a::f0,attr,,256x256x3x3,0.5
onednn_verbose,v1,primitive,exec,cpu,convolution,brg:avx512_core,forward_training,src:f32::blocked:acdb::f0,attr,alg,mb2,19
onednn_verbose,v1,primitive,exec,cpu,convolution,jit:avx512_core,backward_weights,src:f32::blocked:acdb::f0,attr,alg,mb2,23.5
onednn_verbose,v1,primitive,exec,cpu,broken
another line"""  # noqa: E501


def test_lines_of_onednn_are_summed():
    assert summarise(VERBOSE) == {
        "kernels": {"convolution jit:avx512_core, gradient of weight": {"calls": 1, "ms": 23.5},
                    "convolution brg:avx512_core, forward": {"calls": 1, "ms": 19.0}},
        "reorders": {"acdb to Acdb32a": {"calls": 2, "ms": 0.75}}}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = write_config(tmp_path_factory.mktemp("configs") / "plain.yaml", config(Path("nowhere")))
    return run_where([path], CPU, WORK)


def test_the_whole_report(report):
    entry = report["configs"]["plain"]
    assert set(entry["parts"]) == {"backbone", "neck", "head", "assignment", "losses", "optimiser", REST}
    assert 0 < entry["floor_ms"] and 0 < entry["step_ms"] and report["yardstick"]["step_ms"] > 0
    assert set(report["rounds_ms"]) == {"training step: torchvision retinanet_resnet50_fpn", "training step: plain",
                                        "floor: plain"}
    if torch.backends.mkldnn.is_available():
        assert any(name.startswith("convolution") for name in entry["onednn"]["kernels"])
        assert sum(row["calls"] for row in entry["onednn"]["kernels"].values()) > 20
    text = format_where(json.loads(json.dumps(report)))
    assert "step / floor" in text and "assignment" in text and "3x3, 8 to 8, 16 x 24" in text


def test_without_onednn(report):
    entry = report["configs"]["plain"] | {"onednn": None, "why": []}
    assert "oneDNN" not in format_where(report | {"configs": {"plain": entry}})


def test_the_script(report, tmp_path, monkeypatch, capsys):
    given = {}
    monkeypatch.setattr(explain, "run_where", lambda *args, note: given.update(args=args) or report)
    path = write_config(tmp_path / "a.yaml", config(Path("nowhere")))
    out = tmp_path / "where.json"
    assert run_script(monkeypatch, "benchmark.py", "--where", "--cfg", path, "--device", "cpu", "--rounds", 4, "--out",
                      out) == 0
    assert given["args"] == ([str(path)], CPU, Workload((320, 416), 2, rounds=4), [])
    assert capsys.readouterr().out == format_where(report) + "\n"
    assert run_script(monkeypatch, "benchmark.py", "--where", "--cfg", path, "--device", "cpu", "--against", out) == 0
    assert "no difference" in capsys.readouterr().out
    for wrong, message in ((["--eval-images", 3], "remove it"), (["--exported", "x.onnx"], "choose one")):
        assert run_script(monkeypatch, "benchmark.py", "--where", *wrong) == 2
        assert message in capsys.readouterr().err


def test_compiled_code_is_refused(tmp_path):
    path = write_config(tmp_path / "a.yaml", config(Path("nowhere")))
    with pytest.raises(ValueError, match="compiled: add train.compile=false"):
        run_where([path], CPU, WORK, ["train.compile=true"])
