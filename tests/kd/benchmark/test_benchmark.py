"""The benchmark, on detectors that take milliseconds."""
import json
import statistics
from pathlib import Path

import pytest
import torch
from runs import config, model, run_script, write_config

from kd.benchmark import run as benchmark
from kd.benchmark.data import generate_results
from kd.benchmark.run import YARDSTICK, format_report, names, run_benchmark
from kd.benchmark.steps import (
    build_subject,
    make_batch,
    predict_call,
    prepare,
    set_typical_threshold,
    training_step,
)
from kd.benchmark.workload import CONFIGS, Workload
from kd.config import parse_config
from kd.evaluation.coco import coco_figures

CPU = torch.device("cpu")
WORK = Workload(size=(64, 90), batch=2, boxes=3, rounds=2, warmup=1, profiled=1, input_images=2, eval_images=3)
METHODS = [{"type": "CrossKD", "reused_teacher_head_idx": 1}, {"type": "FGD"}]


def distilled():
    """A RetinaNet distilled from a wider one, with weights that do not exist."""
    teacher = {"model": model(16, "RetinaHead"), "checkpoint": "nowhere.pth"}
    cfg = config(Path("nowhere"), distill={"teacher": teacher, "methods": METHODS}, head="RetinaHead")
    cfg["model"]["backbone"]["weights"] = "nowhere.pth"
    return cfg


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    paths = [write_config(folder / "plain.yaml", config(Path("nowhere"))),
             write_config(folder / "distilled.yaml", distilled())]
    return run_benchmark(paths, CPU, WORK)


def test_steps_are_given_in_units_of_the_yardstick(report):
    assert list(report["configs"]) == ["plain", "distilled"]
    assert report["yardstick"]["name"] == YARDSTICK and report["yardstick"]["ratio"] == 1
    medians = {name: statistics.median(times) for name, times in report["steps_ms"].items()}
    assert list(medians) == [YARDSTICK, "plain", "distilled", "distilled: teacher's answers cached"]
    assert report["configs"]["plain"]["answer_bytes"] is None and "cached_ms" not in report["configs"]["plain"]
    distilled = report["configs"]["distilled"]
    assert distilled["cached_ms"] == pytest.approx(medians["distilled: teacher's answers cached"])
    cells = sum(h * w for h, w in ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1)))
    floats = cells * (16 + 2 * 16 + 9 * (80 + 4))  # FGD's levels, CrossKD's two towers, the head's outputs
    assert 4 * floats < distilled["answer_bytes"] < 4 * floats + 5000
    for name, entry in ({YARDSTICK: report["yardstick"]} | report["configs"]).items():
        assert len(report["steps_ms"][name]) == WORK.rounds and min(report["steps_ms"][name]) > 0
        assert 0 < entry["loss"] < 1e4
        assert entry["step_ms"] == pytest.approx(medians[name])
        assert entry["ratio"] == pytest.approx(medians[name] / medians[YARDSTICK])
        assert entry["flops_per_second"] == pytest.approx(entry["flops"] / medians[name] * 1000)
        assert sum(entry["shares"][part] for part in ("convolution", "norm", "overhead")) == pytest.approx(1)
    flops = [entry["flops"] for entry in report["configs"].values()]
    assert 0 < flops[0] < flops[1] < report["yardstick"]["flops"]


def test_every_part_is_timed(report):
    parts = ["anchors", "assignment", "losses", "post-processing"]
    assert list(report["configs"]["plain"]["parts_ms"]) == parts
    assert list(report["configs"]["distilled"]["parts_ms"]) == [*parts[:3], "teacher", "method CrossKD0", "method FGD1",
                                                                parts[3]]
    for entry in report["configs"].values():
        assert min(entry["parts_ms"].values()) > 0 and entry["predict_ms"] > entry["parts_ms"]["post-processing"] / 9
    assert list(report["input"]["ms"]) == ["decode", "resize", "flip", "collate", "one worker"]
    assert min(report["input"]["ms"].values()) > 0 and report["input"]["scale"] == [64, 64]
    assert report["input"]["images_per_second"] == pytest.approx(1000 / report["input"]["ms"]["one worker"])
    assert "pycocotools" in report["evaluation"]["ms"] and min(report["evaluation"]["ms"].values()) > 0
    assert report["peak_resident_bytes"] > 1e8
    assert {"device", "threads", "torch", "commit", "date"} <= report["machine"].keys()


def test_the_table_shows_what_the_json_holds(report):
    text = format_report(json.loads(json.dumps(report)))
    entry = report["configs"]["distilled"]
    row = next(line for line in text.splitlines() if line.startswith("distilled  "))
    # The median of two rounds is the middle of them, and a quarter of their distance away from the quartiles.
    first, second = sorted(report["steps_ms"]["distilled"])
    quarter = (second - first) / 4
    assert row.removeprefix("distilled").strip().startswith(
        f"{entry['step_ms']:.1f} ({first + quarter:.1f} to {second - quarter:.1f})")
    assert row.split()[4] == f"{entry['ratio']:.3f}" or f"  {entry['ratio']:.3f}  " in row
    assert "distilled: student channels_last, teacher channels_last" in text
    assert all(f"distilled: {part} " in text for part in entry["parts_ms"])
    assert f"distilled: teacher's answers cached {entry['cached_ms']:.1f} (" in " ".join(text.split())
    assert "distilled: the answers take 0." in text and "plain: the answers" not in text
    assert YARDSTICK in text and "one worker" in text and "pycocotools" in text and "GPU" not in text


def test_the_table_of_a_gpu(report):
    report = json.loads(json.dumps(report)) | {"matmul_flops_per_second": 5e14}
    for entry in [report["yardstick"], *report["configs"].values()]:
        entry |= {"utilisation": 0.42, "peak_memory_bytes": 3 * 2 ** 30}
        entry["shares"]["device_ms"] = entry["step_ms"] / 4
    text = format_report(report)
    assert "500 TFLOP/s" in text and next(
        line for line in text.splitlines() if line.startswith(YARDSTICK)).split()[-3:] == ["42.0%", "25.0%", "3.00"]


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_on_a_gpu(tmp_path, amp):
    work = Workload(size=(128, 128), batch=2, rounds=2, profiled=1, amp=amp, input_images=2, eval_images=3)
    report = run_benchmark([write_config(tmp_path / "distilled.yaml", distilled())], torch.device("cuda"), work)
    for entry in (report["yardstick"], report["configs"]["distilled"]):
        assert 0 < entry["utilisation"] < 1 and entry["peak_memory_bytes"] > 1e6
        # The span of an annotation does not count as work: the GPU cannot be busy for longer than a step.
        assert 0 < entry["shares"]["device_ms"] < 1.5 * entry["step_ms"]
        assert min(entry["shares"][part] for part in ("convolution", "norm", "overhead")) > 0


def test_the_script(report, tmp_path, monkeypatch, capsys):
    given = {}

    def run(paths, device, work, overrides, note):
        given.update(paths=paths, device=device, work=work, overrides=overrides)
        return report

    monkeypatch.setattr(benchmark, "run_benchmark", run)
    out = tmp_path / "new" / "bench.json"
    assert run_script(monkeypatch, "benchmark.py", "--cfg", "a.yaml", "--cfg", "b.yaml", "--device", "cpu",
                      "--size", 64, 96, "--batch", 3, "--boxes", 4, "--rounds", 5, "--amp", "bf16",
                      "--eval-images", 6, "--out", out, "optimizer.lr=1") == 0
    assert given == {"paths": ["a.yaml", "b.yaml"], "device": CPU, "overrides": ["optimizer.lr=1"],
                     "work": Workload((64, 96), 3, boxes=4, rounds=5, amp="bf16", eval_images=6)}
    assert capsys.readouterr().out == format_report(report) + "\n"
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    assert run_script(monkeypatch, "benchmark.py", "--device", "cpu") == 0
    assert given["paths"] == CONFIGS and given["work"] == Workload((320, 416), 2)
    assert run_script(monkeypatch, "benchmark.py", "--rounds", 0) == 2
    assert "at least 1" in capsys.readouterr().err


def test_a_configuration_is_freed_of_downloads():
    cfg = prepare(parse_config(distilled()), Workload((64, 64), 1, classes=7, amp="bf16"))
    assert "weights" not in cfg["model"]["backbone"] and cfg["model"]["head"]["num_classes"] == 7
    assert [teacher["checkpoint"] for teacher in cfg["distill"]["teacher"]] == [None]
    assert cfg["train"]["amp"] == "bf16" and cfg["train"]["grad_clip"] == 35
    assert prepare(parse_config(distilled()), WORK)["train"].get("amp") is None


def test_a_batch_is_what_the_loader_gives():
    torch.manual_seed(0)
    images, targets = make_batch(Workload((64, 90), 2, boxes=50), CPU, classes=4)
    assert images.shape == (2, 3, 64, 96) and images.dtype == torch.uint8
    assert not images[..., 90:].any() and images[..., :90].float().std() > 50
    for target in targets:
        boxes = target["boxes"]
        assert boxes.shape == (50, 4) and (boxes[:, 2:] - boxes[:, :2] >= 2 - 1e-4).all()
        assert (boxes >= 0).all() and (boxes[:, 2:] <= torch.tensor([90, 64])).all()
        assert target["labels"].unique().tolist() == [0, 1, 2, 3] and target["pad_size"] == (64, 96)


def test_a_step_trains_the_student_and_what_its_methods_learn():
    torch.manual_seed(0)
    subject = build_subject(prepare(parse_config(distilled()), WORK), CPU, WORK)
    before = {name: value.clone() for name, value in subject.model.named_parameters()}
    teacher = [value.clone() for value in subject.model.teacher.parameters()]
    training_step(subject, *make_batch(WORK, CPU, 80))()
    changed = {name for name, value in subject.model.named_parameters() if not torch.equal(value, before[name])}
    trained = {name for name, value in subject.model.named_parameters() if value.requires_grad}
    assert changed <= trained and {"student.bbox_head.retina_cls.weight", "student.bbox_head.cls_convs.0.conv.weight",
                                   "methods.0.1.losses.0.channel_add_conv_s.3.weight"} <= changed
    assert all(map(torch.equal, teacher, subject.model.teacher.parameters()))
    # The first step of the warm-up is so small that the model hardly changes.
    assert max((value - before[name]).abs().max() for name, value in subject.model.named_parameters()) < 0.01


def test_a_random_detector_gets_a_trained_ones_number_of_candidates():
    torch.manual_seed(0)
    subject = build_subject(prepare(parse_config(config(Path("nowhere"))), WORK), CPU, WORK)
    batch = make_batch(WORK, CPU, 80)
    subject.model.eval()
    assert not len(predict_call(subject, *batch)()[0]["boxes"])
    set_typical_threshold(subject, *batch)
    assert len(predict_call(subject, *batch)()[0]["boxes"])


def test_generated_detections_are_neither_perfect_nor_hopeless(tmp_path):
    dataset, results = generate_results(tmp_path, 5)
    assert len(results) == len(dataset) == 5 and all(rows.shape == (100, 6) for _, rows in results)
    assert 0.05 < coco_figures(results, dataset)["AP"] < 0.9


def test_names_tell_configurations_apart():
    assert names(["a/x.yaml", "a/y.yaml"]) == ["x", "y"]
    assert names(["a/x.yaml", "b/x.yaml"]) == ["a/x.yaml", "b/x.yaml"]
