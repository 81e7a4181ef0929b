"""export.py --int8: files with 8-bit convolutions, the comparison of AP, and what is done if it drops."""
import json
import shutil
import subprocess
import sys

import numpy as np
import onnx_rules
import pytest
from exports import FORMS, example
from runs import ROOT, run_script

from data import DataError, build_dataset
from data.output import OutputError
from data.sources.scenes import CLASSES
from kd.config import parse_config
from kd.deploy.agreement import Agreement
from kd.deploy.runtimes import open_exported
from kd.evaluation import quantize
from kd.exceptions import ExportError
from models import ConfigError

pytestmark = onnx_rules.needed


def copied(exports, folder, name):
    """A copy of a shared file, and its configuration."""
    for file in (exports.file(name), exports.root / f"{name}.data"):
        if file.exists():
            shutil.copyfile(file, folder / file.name)
    return folder / name, parse_config(exports.model(FORMS[name].get("head", "GFLHead"))[2])


def figures(*aps):
    """A stand-in for `evaluate_exported`: these APs, one after another."""
    rest = list(aps)
    return lambda *arguments: {"AP": rest.pop(0), "AP50": 0.5, "per_class": {"a": 0.5, "b": None}}


def test_the_command(exports, tmp_path, monkeypatch, capsys):
    import onnx
    import onnxruntime

    def export(detector, path, *arguments):
        path.parent.mkdir()
        shutil.copyfile(exports.file("any.onnx"), path)
        return Agreement(), [path]

    monkeypatch.setattr("kd.deploy.export.export", export)
    path, checkpoint, _ = exports.model()
    out = tmp_path / "deep" / "a.onnx"
    code = run_script(monkeypatch, "export.py", "--cfg", path, "--checkpoint", checkpoint, "--out", out, "--int8",
                      "--calibrate", 5, "--max-drop", 1, "data.workers=0")
    printed, error = capsys.readouterr()
    assert code == 0 and sorted(file.name for file in out.parent.iterdir()) == ["a.int8.onnx", "a.onnx"], error
    assert "--calibrate 5: data.train has 1 image, and all are used" in printed
    table = printed[printed.index(f"wrote {out.with_name('a.int8.onnx')}, 0 of "):].splitlines()[2:]
    assert [line.split("  ")[0] for line in table] == ["", "AP", "AP50", *(f"AP of {name}" for name in CLASSES), "MB"]
    assert float(table[1].split()[1]) > 5  # it detects something, so the comparison says something
    model = onnx.load(str(out.with_name("a.int8.onnx")))
    about = json.loads({one.key: one.value for one in model.metadata_props}["densekd"])
    assert about["int8"] and not open_exported(out).about.int8 and len(model.metadata_props) == 1
    assert {one.domain for one in model.opset_import} <= {"", "com.microsoft"}
    made_by = {name: node for node in model.graph.node for name in node.output}
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    is_int8 = [getattr(made_by.get(conv.input[1]), "op_type", "") == "DequantizeLinear" for conv in convs]
    assert 0 < sum(is_int8) < len(convs) and not is_int8[0]  # the first, and the head's outputs, stay in float
    scales = {one.name: one.dims for one in model.graph.initializer}
    quantised = [conv for conv, yes in zip(convs, is_int8) if yes]
    assert all(list(scales[made_by[conv.input[1]].input[1]]) == [scales[made_by[conv.input[1]].input[0]][0]]
               for conv in quantised)  # a scale for each channel
    run_onnx = example()
    session = onnxruntime.InferenceSession(str(out.with_name("a.int8.onnx")), providers=["CPUExecutionProvider"])
    image = run_onnx.read(next(exports.scenes.rglob("*.jpg")))
    assert len(run_onnx.detect(session, about, image)[0])


@pytest.mark.parametrize("name", ["end2end.onnx", "fixed.onnx", "outside.onnx"])
def test_all_forms(exports, tmp_path, monkeypatch, name):
    path, cfg = copied(exports, tmp_path, name)
    monkeypatch.setattr(quantize, "evaluate_exported", figures(0.5, 0.495))
    found = quantize.write_int8(cfg, path, 1, 0.01)
    assert found.paths == (path, tmp_path / name.replace(".onnx", ".int8.onnx")) and round(found.drop, 6) == 0.005
    found.check()
    megabytes = float(str(found).splitlines()[-1].split()[1])  # of all files
    assert megabytes == round(sum(file.stat().st_size for file in tmp_path.glob(f"{name}*")) / 1e6, 1)
    plain, int8 = open_exported(path), open_exported(found.paths[1])
    assert int8.about.nms == plain.about.nms and int8.about.int8
    inputs = next(quantize.feeds(build_dataset(cfg.data, "val", training=False), plain.about, 1)).values()
    batch = [quantize.torch.from_numpy(one) for one in inputs]
    assert len(batch[0]) == (plain.about.batch or 1)
    boxes, scores, _ = int8.run(*batch)
    assert boxes.isfinite().all() and abs(scores.max() - plain.run(*batch)[1].max()) < 0.1 and scores.max() > 0.4


def test_what_drops_is_tried_with_the_worst_convolutions_in_float_and_then_rejected(exports, tmp_path, monkeypatch):
    path, cfg = copied(exports, tmp_path, "outside.onnx")
    written = []

    def write(plain, made, ranges, convs, about):
        written.append(convs)
        made.write_bytes(b"file")

    monkeypatch.setattr(quantize, "write", write)
    monkeypatch.setattr(quantize, "evaluate_exported", figures(0.5, *[0.48] * 5))
    found = quantize.write_int8(cfg, path, 1, 0.01)
    counts = list(map(len, written))
    assert counts == sorted(set(counts), reverse=True) and 2 < len(counts) <= 5 and counts[-1] == counts[0] // 2
    assert all(set(few) < set(more) for more, few in zip(written, written[1:]))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["outside.int8.onnx.rejected", "outside.onnx"]
    with pytest.raises(ExportError, match=r"^int8 lowers AP by 0.0200, more than --max-drop 0.01, also with \d+ of \d+ "
                                          r"convolutions in float: \S+outside.int8.onnx.rejected is for") as error:
        found.check()
    assert "\n" not in str(error.value) and error.value.exit_code == 1
    monkeypatch.setattr(quantize, "evaluate_exported", figures(0.5, 0.48, 0.4901))
    found = quantize.write_int8(cfg, path, 1, 0.01)
    found.check()
    assert found.paths[1] == tmp_path / "outside.int8.onnx" and not found.in_float.startswith("0 of")
    monkeypatch.setattr(quantize, "evaluate_exported", figures(None))
    with pytest.raises(DataError, match="data.val has no boxes"):
        quantize.write_int8(cfg, path, 1, 0.01)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantize, "write", full)
    monkeypatch.setattr(quantize, "evaluate_exported", figures(0.5))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"outside.int8.onnx cannot be written \(disk full\)"):
        quantize.write_int8(cfg, path, 1, 0.01)
    assert sorted(tmp_path.iterdir()) == before


def test_the_convolution_with_the_worst_range_comes_first(exports, tmp_path):
    path, cfg = copied(exports, tmp_path, "outside.onnx")
    plain, about = tmp_path / "plain.onnx", open_exported(path).about
    quantize.prepare(path, plain)
    convs, dataset = quantize.inner_convolutions(plain), build_dataset(cfg.data, "val", training=False)
    ranges = quantize.activation_ranges(plain, tmp_path, quantize.feeds(dataset, about, 1), 1)
    import onnx

    output = {node.name: node.output[0] for node in onnx.load(str(plain)).graph.node}
    for name in (convs[2], convs[-1]):
        kept = ranges[output[name]]
        ranges.data[output[name]] = type("Range", (), {"range_value": (np.float32(-1e4), np.array([1e4]))})
        order = quantize.by_error(plain, tmp_path, convs, ranges, quantize.feeds(dataset, about, 1))
        ranges.data[output[name]] = kept
        assert order[0] == name and sorted(order) == sorted(convs)


def test_a_file_that_is_too_large_is_refused_before_it_is_evaluated(exports, tmp_path, monkeypatch):
    path, cfg = copied(exports, tmp_path, "fixed.onnx")
    monkeypatch.setattr(quantize, "LARGEST", path.with_name("fixed.onnx.data").stat().st_size)  # larger with both files
    monkeypatch.setattr(quantize, "evaluate_exported", None)  # not called
    with pytest.raises(ExportError, match="fixed.onnx cannot be made int8: with its weights it is larger than 2 GB"):
        quantize.write_int8(cfg, path, 1)


def test_images_are_spread_over_the_data(exports):
    cfg = parse_config(exports.model()[2])
    dataset = build_dataset(cfg.data, "val", training=False)
    about = type("About", (), {"batch": 2, "padded": lambda self, h, w: (128, 160)})()
    one, two = quantize.feeds(dataset, about, 3)
    first, last = (dataset[i][0].numpy() for i in (0, 2))
    assert one["images"].shape == (2, 3, 128, 160) and one["image_sizes"].tolist() == [[120, 160]] * 2
    assert np.array_equal(one["images"][0, :, :120], first) and not one["images"][0, :, 120:].any()
    assert np.array_equal(two["images"][0], two["images"][1]) and np.array_equal(two["images"][0, :, :120], last)
    assert len(list(quantize.feeds(dataset, about, 99))) == 2


@pytest.mark.parametrize("missing", ["train", "val"])
def test_without_data(exports, missing):
    cfg = exports.model()[2]
    if missing == "val":
        cfg = parse_config(cfg | {"data": {key: value for key, value in cfg["data"].items() if key != "val"}})
    else:
        cfg = parse_config(cfg)
        cfg.data.train = None
    with pytest.raises(ConfigError, match=f"data.{missing}: missing: --int8"):
        quantize.check_data(cfg)


def test_options_are_checked_before_pytorch_is_imported():
    code = ("import runpy, sys\nfor out, *more in (['a.pt2', '--int8'], ['a.xml', '--int8'], ['a.onnx', '--calibrate', "
            "'3'], ['a.onnx', '--max-drop', '0.1'], ['a.onnx', '--int8', '--max-drop', '2']):\n"
            "    sys.argv = ['export.py', '--checkpoint', 'c.pth', '--out', out, *more]\n"
            "    try:\n        runpy.run_path('scripts/export.py', run_name='__main__')\n"
            "    except SystemExit as end:\n        print(end.code, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["2 False"] * 5, done
    lines = done.stderr.splitlines()
    assert len(lines) == 5 and "--int8 writes ONNX files" in lines[0] and "--calibrate is for --int8" in lines[2]
