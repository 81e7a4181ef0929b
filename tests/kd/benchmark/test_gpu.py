"""Everything that `make gpu` does, on a CPU and tiny images; and what it does on a GPU, where there is one."""
import json
from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch
from pretended_gpu import pretended_gpu
from runs import config, config_with, model, run_script, write_config

from data.sources.scenes import generate_scenes
from kd.benchmark.gpu import run as gpu
from kd.benchmark.gpu import variants
from kd.benchmark.gpu.parity import compare_precision
from kd.benchmark.gpu.run import Job, LeftOut, Part, failures, parts, run_gpu, run_part
from kd.benchmark.gpu.variants import (
    VARIANTS,
    KeptCopies,
    captured_step,
    count_synchronisations,
    time_feed,
    time_variant,
)
from kd.benchmark.steps import build_subject, make_batch, prepare, training_step
from kd.benchmark.workload import GPU_PARTS, Workload
from kd.config import load_config
from models.layers import from_host

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WORK = Workload((64, 90), 2, boxes=3, rounds=1, warmup=1)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A distilled detector that takes milliseconds, with data."""
    folder = tmp_path_factory.mktemp("gpu")
    scenes = generate_scenes(folder / "scenes", train=4, val=2, size=(64, 64))
    methods = [{"type": "CrossKD", "reused_teacher_head_idx": 1}]
    cfg = config(scenes, epochs=1, distill={"teacher": {"model": model(16), "checkpoint": None}, "methods": methods})
    return str(write_config(folder / "small.yaml", config_with(cfg, train={"check_images": 0, "channels_last": False})))


@pytest.fixture
def job(path, monkeypatch):
    monkeypatch.setattr(gpu, "run_benchmark", lambda paths, device, work: {"amp": work.amp})
    monkeypatch.setattr(gpu, "format_report", lambda report: f"the table in {report['amp']}")
    return Job(CPU, WORK, [path], [path], path, matmul_side=16)


def test_every_part_on_a_cpu(job, tmp_path):
    said = []
    report, file = run_gpu(job, tmp_path, 1, note=said.append)
    assert json.loads(json.dumps(report)) == json.loads(file.read_text()) and failures(report) is None
    status = {name: entry["status"] for name, entry in report["parts"].items()}
    assert list(status) == list(parts(job)) and {name.partition("/")[0] for name in status} == set(GPU_PARTS)
    assert {name for name, each in status.items() if each == "done"} == {
        "matmul", "parity/small/bf16", "parity/small/fp16", "step/small/float32", "step/small/bf16", "training",
        "benchmark"}
    reasons = {entry["reason"] for entry in report["parts"].values() if entry["status"] == "left out"}
    assert reasons == {"needs CUDA"}
    step, training = (report["parts"][name]["result"] for name in ("step/small/float32", "training"))
    assert step["ms"] > 0 and step["flops"] > 1e6 and 0 < step["loss"] < 1e4 and step["peak_memory_bytes"] is None
    assert training["epochs"] == 1 and 0 <= training["AP"] <= training["AP50"] <= 1
    text = file.with_suffix(".md").read_text()
    assert "| small | float32 | " in text and "| small | fp16 | " in text and "the table in bf16" in text
    assert "- tests: left out, needs CUDA" in text and "TFLOP/s" in text and "after 1 epoch in" in text
    assert any("step/small/bf16, compiled: left out: needs CUDA" in line for line in said)


def test_a_second_call_goes_on(job, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("the weather\nis bad")

    monkeypatch.setattr(gpu, "measure_training", broken)
    only = ("matmul", "training")
    report, file = run_gpu(job, tmp_path, 1, only)
    assert list(report["parts"]) == list(only) and failures(report) == "1 part failed: training"
    assert report["parts"]["training"]["error"] == "RuntimeError: the weather is bad"
    assert "- training: failed, RuntimeError: the weather is bad" in file.with_suffix(".md").read_text()
    monkeypatch.setattr(gpu, "measure_matmul", broken)  # is done already
    monkeypatch.setattr(gpu, "measure_training", lambda _: {
        "configuration": "x.yaml", "epochs": 2, "AP": 0.5, "AP50": None, "minutes": 1})
    report, _ = run_gpu(job, tmp_path, 1, only)
    assert failures(report) is None and report["parts"]["matmul"]["status"] == "done"
    report["parts"]["matmul"]["commit"] = "another"
    file.write_text(json.dumps(report))
    assert failures(run_gpu(job, tmp_path, 1, only)[0]) == "1 part failed: matmul"
    file.write_text("[]")
    assert list(run_gpu(job, tmp_path, 1, ["training"])[0]["parts"]) == ["training"]


def test_a_part_that_does_not_fit_into_the_time(monkeypatch):
    monkeypatch.setattr(gpu, "usable", lambda device: False)
    found = run_part(Part(lambda: {}, 100), 99, CUDA)
    assert found["reason"] == "99 seconds are left of --minutes, and it takes about 100"
    assert run_part(Part(lambda: {}, 100), 100, CUDA)["status"] == "done"


def test_data_that_are_not_there(job, tmp_path):
    cfg = config(tmp_path / "nowhere")
    job.training = str(write_config(tmp_path / "bccd.yaml", cfg))
    with pytest.raises(LeftOut, match="nowhere/annotations/train.json does not exist"):
        gpu.measure_training(job)


def test_an_order_that_uses_the_time_well(path):
    listed = list(parts(Job(CPU, WORK, [path, "configs/gfl/gfl_r50_1x.yaml"])))
    assert listed[0] == "tests" and listed[-2:] == [f"step/{name}/bf16, compiled" for name in ("gfl_r50_1x", "small")]
    assert "step/gfl_r50_1x/bf16, teacher on its own stream" not in listed  # it has none


def test_a_captured_step_gets_its_copies_again():
    with pretended_gpu():
        copies, like = KeptCopies(), torch.empty(2, device="cuda")
        with copies:
            first = from_host([1.0, 2.0], like)
            assert torch.zeros(2).to(torch.float64).device.type == "cpu"
        copies.next = iter(copies.kept)
        with copies:
            assert from_host([1.0, 2.0], like) is first and len(copies.kept) == 1
            with pytest.raises(StopIteration):
                from_host([1.0, 2.0], like)


def test_what_is_around_the_calls_of_cuda(path, monkeypatch):
    """With nothing in the place of these calls, the rest runs on the CPU."""
    for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(variants, "prefetched", lambda steps, device: steps)
    monkeypatch.setattr(variants, "synchronisations", lambda: nullcontext(["model.py:3"]))
    assert set(time_feed(path, WORK, CPU, steps=1)) == {"in the step", "prefetched"}
    assert count_synchronisations(path, "none", CPU, steps=2) == {"per_step": 0.5, "where": {"model.py:3": 1}}
    found = time_variant(path, VARIANTS["bf16, CUDA graph"], WORK, CPU)
    assert 0 < found["loss"] < 1e4 and found["flops"] is None


def test_the_script(job, path, tmp_path, monkeypatch, capsys):
    assert run_script(monkeypatch, "gpu.py", "--device", "cpu", "--cfg", path, "--only", "step", "matmul",
                      "--out", tmp_path, "--minutes", 1) == 0
    out = capsys.readouterr().out
    assert "| small | float32 | " in out and f"wrote {tmp_path}" in out
    assert len(list(tmp_path.glob("*.json"))) == len(list(tmp_path.glob("*.md"))) == 1
    assert run_script(monkeypatch, "gpu.py", "--device", "cpu", "--only", "steps") == 2
    assert "invalid choice: 'steps'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run_script(monkeypatch, "gpu.py", "--out", tmp_path) == 2
        assert "no CUDA device is available here; use --device cpu" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_is_close_to_float32_on_a_gpu(path, amp):
    found = compare_precision(load_config(path), WORK, CUDA, amp)
    assert found["within"], found


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_train_step_does_not_wait_for_a_gpu(path, amp):
    assert count_synchronisations(path, amp, CUDA)["where"] == {}


@pytest.mark.gpu
def test_synchronisations_are_counted_on_a_gpu():
    from kd.benchmark.gpu.variants import synchronisations

    with synchronisations() as found:
        x = torch.ones(3, device="cuda")
        x.sum().item()
        x.nonzero()
    assert len(found) == 2 and found[0].startswith("test_gpu.py:")


@pytest.mark.gpu
def test_a_captured_step_is_the_same_step_on_a_gpu(path):
    losses = []
    for make in (training_step, captured_step):
        torch.manual_seed(0)
        cfg = prepare(load_config(path, ["optimizer.lr=0"]), WORK)
        subject = build_subject(cfg, CUDA, WORK)
        step = make(subject, *make_batch(WORK, CUDA, 80))
        losses.append(step().item())
        assert step().item() == pytest.approx(losses[-1], rel=1e-3)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", [name for name, how in VARIANTS.items() if not how.compiled])  # takes a minute
def test_every_variant_on_a_gpu(path, variant):
    found = time_variant(path, VARIANTS[variant], WORK, CUDA)
    assert found["ms"] > 0 and found["peak_memory_bytes"] > 1e6 and 0 < found["loss"] < 1e4


@pytest.mark.gpu
def test_feeding_a_gpu(path):
    assert all(value > 0 for value in time_feed(path, WORK, CUDA, steps=2).values())
