"""benchmark.py --exported: the rows, the figures, and options that do not fit."""
import json
import shutil

import numpy as np
import onnx_rules
import pytest
import torch
from exports import OPENVINO
from runs import run_script

from kd.benchmark import exported as benchmark
from kd.config import parse_config
from kd.deploy.runtimes import bytes_of, open_exported
from models import ConfigError

pytestmark = onnx_rules.needed


@pytest.fixture
def int8(exports, tmp_path):
    """A file that says that it is int8."""
    import onnx

    model = onnx.load(str(exports.file("any.onnx")))
    about = json.loads(model.metadata_props[0].value) | {"int8": True}
    model.metadata_props[0].value = json.dumps(about)
    onnx.save(model, str(tmp_path / "b.int8.onnx"))
    return tmp_path / "b.int8.onnx"


def test_the_command(exports, int8, tmp_path, monkeypatch, capsys):
    cfg, checkpoint, _ = exports.model()
    files = [exports.file("any.onnx"), int8] + ([exports.file("openvino.xml")] if OPENVINO else [])
    given = [word for file in files for word in ("--exported", file)] + ["--openvino"] * OPENVINO
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        code = run_script(monkeypatch, "benchmark.py", "--cfg", cfg, "--checkpoint", checkpoint, *given, "--rounds", 2,
                          "--out", tmp_path / "bench.json", "data.workers=0")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    printed, error = capsys.readouterr()
    assert code == 0, error
    report = json.loads((tmp_path / "bench.json").read_text())
    rows = report["rows"]
    assert [name.split(str(exports.root))[0].split(str(tmp_path))[0] for name in rows] == [
        "torch", "ONNX float ", "ONNX int8 ", *["OpenVINO ", "ONNX float ", "ONNX int8 "] * OPENVINO]
    assert [name for name in rows if name.endswith(", by OpenVINO")] == list(rows)[4:]
    assert report["threads"] == [1, 2] and report["images"] == 3  # all of data.val
    aps = [row["AP"] for row in rows.values()]
    assert aps[0] > 0.05 and aps == pytest.approx([aps[0]] * len(aps), abs=1e-6)
    for row in rows.values():
        assert row["bytes"] > 1e4
        assert all(0 < one["p50"] <= one["p95"] and one["mean"] > 0 for one in row["ms"].values())
    assert rows[f"ONNX float {files[0]}"]["bytes"] == files[0].stat().st_size
    lines = printed.splitlines()
    assert [line for line in lines if line.startswith(("torch  ", "ONNX ", "OpenVINO "))] == lines[-len(rows):]


def test_the_figures(exports, monkeypatch):
    """Per image, also for a file that takes two at a time; and without AP."""
    cfg, seen = parse_config(exports.model("ATSSHead")[2]), []

    def interleave(calls, rounds, warmup):
        assert rounds == 2
        seen.append([call() for call in calls.values()])
        return {name: [0.002 * (i + 1), 0.004] for i, name in enumerate(calls)}

    monkeypatch.setattr(benchmark, "interleave", interleave)
    monkeypatch.setattr(benchmark, "evaluate_exported", None)  # not called
    file = exports.file("fixed.onnx")
    report = benchmark.run_exported(cfg, [file], with_ap=False, rounds=2)
    (name, row), = report["rows"].items()
    assert name == f"ONNX float {file}, 2 at a time" and row["AP"] is None
    assert row["bytes"] == file.stat().st_size + (exports.root / "fixed.onnx.data").stat().st_size
    ms = [1, 2, 2, 2, 3, 2]  # of an image: half of what two take
    expected = {"p50": 2.0, "p95": float(np.percentile(ms, 95)), "mean": 2.0}
    assert all(one == pytest.approx(expected) for one in row["ms"].values())
    assert all(len(found) == 2 and len(found[0]["boxes"]) for found in seen[0])
    table = benchmark.format_exported(report)
    assert f"{file}, 2 at a time  " in table and " 500.0" in table  # images per second


def test_the_size_is_that_of_the_file_and_its_own_weights(exports, tmp_path):
    """Another file's weights, or those of an earlier export, may lie beside it."""
    path = shutil.copyfile(exports.file("any.onnx"), tmp_path / "a.onnx")
    for other in ("a.bin", "a.onnx.data"):
        (tmp_path / other).write_bytes(b"other")
    assert bytes_of(path) == path.stat().st_size


def test_other_classes_are_refused_before_the_timing(exports, tmp_path, monkeypatch):
    import onnx

    model = onnx.load(str(exports.file("any.onnx")))
    about = json.loads(model.metadata_props[0].value) | {"classes": ["a", "b"]}
    model.metadata_props[0].value = json.dumps(about)
    onnx.save(model, str(tmp_path / "two.onnx"))
    monkeypatch.setattr(benchmark, "interleave", None)  # not called
    with pytest.raises(ConfigError, match=r"two.onnx has 2 classes \(a, b\)"):
        benchmark.run_exported(parse_config(exports.model()[2]), [exports.file("any.onnx"), tmp_path / "two.onnx"])


def test_noise_where_there_are_no_data(exports, monkeypatch):
    cfg = parse_config(exports.model("FCOSHead")[2] | {"data": None})
    report = benchmark.run_exported(cfg, [exports.file("outside.onnx")], rounds=1, warmup=0)
    assert report["images"] == 2 and [row["AP"] for row in report["rows"].values()] == [None]


def test_a_compiled_row_uses_the_compiled_forward(exports, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: calls.append(self))
    detector = torch.nn.Module()
    detector.preprocess, detector.forward = (lambda images, targets: images), (lambda images, targets: ["found"])
    detector.predict = lambda images, targets: ["plain"]
    rows = benchmark.in_torch(detector, "a.pth", True)
    assert list(rows) == ["torch", "torch compiled"] and calls == [detector]
    assert [row.detector.predict(None, None) for row in rows.values()] == [["plain"], ["found"]]


@pytest.mark.parametrize("options, part", [
    (["--checkpoint", "a.pth"], "--checkpoint is for --exported"), (["--compile"], "--compile is for --exported"),
    (["--no-ap"], "--no-ap is for --exported"), (["--exported", "FILE", "--size", 64, 64], "--size is not for --exp"),
    (["--exported", "FILE", "--boxes", 3], "--boxes is not for --exported"),
    (["--exported", "FILE", "--cfg", "b.yaml"], "needs one --cfg"),
    (["--exported", "FILE", "--device", "cuda"], "--device cuda: --exported times on the CPU"),
    (["--exported", "FILE", "--compile"], "add its --checkpoint"),
    (["--exported", "nowhere.onnx"], "no such exported file: nowhere.onnx"),
    (["--exported", "FILE", "--exported", "FILE"], "a file twice")])
def test_options_that_contradict_each_other(tmp_path, monkeypatch, capsys, options, part):
    (tmp_path / "a.onnx").write_bytes(b"a")
    options = [str(tmp_path / "a.onnx") if word == "FILE" else word for word in options]
    assert run_script(monkeypatch, "benchmark.py", "--cfg", "a.yaml", *options) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and part in error[0]


def test_the_recipe_of_an_int8_file(int8, exports):
    assert open_exported(int8).about.int8 and not open_exported(exports.file("any.onnx")).about.int8
    assert benchmark.label(open_exported(int8), openvino=False) == f"ONNX int8 {int8}"
    assert benchmark.label(open_exported(int8), openvino=True) == f"ONNX int8 {int8}, by OpenVINO"
