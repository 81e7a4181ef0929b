"""The measurement of large data sets, with small ones."""
import json
import sys

import pytest

from data.coco.annotations import read_annotations
from kd.benchmark import scale


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(scale, "SIZES", {"coco": (60, 300, 5)})
    monkeypatch.setattr(scale, "EVALUATED", {"coco": [(8, 10)]})
    monkeypatch.setattr(scale, "SEEN", 4)
    monkeypatch.setattr(scale, "ROWS", 23)
    monkeypatch.setattr(scale, "STARTS", ("fork",))
    monkeypatch.setattr(scale, "alone", lambda call, *args: call(*args))
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_generated_annotations_are_correct(small, tmp_path):
    scale.write_annotations(tmp_path / "a.json", *scale.SIZES["coco"])
    read = read_annotations(tmp_path / "a.json")
    assert (len(read), len(read.arrays["kinds"]), len(read.classes), read.num_dropped_boxes) == (60, 300, 5, 0)
    assert [read.image_id(i) for i in (0, 59)] == [1, 60] and read.file_name(59) == "000000000060.jpg"


@pytest.mark.skipif(sys.platform != "linux", reason="memory of workers is measured on Linux")
def test_the_report(small):
    notes = []
    report = scale.measure_scale("coco", notes.append)
    assert json.loads(json.dumps(report)) == report and len(notes) == 5
    first, second = report["starts"].values()
    assert 0 < second["cpu_seconds"] <= second["seconds"] * 1.5 and first["peak_bytes"] >= first["empty_bytes"] > 0
    for which in ("data", "without"):
        assert 0 < report["workers"]["fork"][which]["dirty"] <= report["workers"]["fork"][which]["private"]
    assert 0 < report["evaluations"][0]["AP"] < 1
    text = scale.format_scale(report)
    assert "60 images, 300 boxes, 5 classes: a file of 0 MB" in text and "second start" in text and "8 images" in text
