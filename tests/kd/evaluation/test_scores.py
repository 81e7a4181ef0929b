"""Lowest scores and reliability, with values that were computed by hand, and their files."""
import json

import numpy as np
import pytest
from hand_detections import A, B, evaluated, make_dataset

from data import DataError
from kd.evaluation.analyze import analyze_evaluation, format_tables, save_analysis
from kd.evaluation.scores import choose_threshold, choose_thresholds, reliability, score_curve
from kd.evaluation.tide import CORRECT, NOTHING, Judged
from kd.inference.thresholds import load_thresholds, read_thresholds


def judged(*detections, objects=(4, 0)):
    """Detections (label, score, right) of two classes with a number of objects each."""
    labels, scores, right = (np.array(column) for column in zip(*detections)) if detections else [np.zeros(0)] * 3
    count, owners = len(labels), np.repeat([A, B], objects)
    return Judged(2, np.zeros(count, int), np.zeros((count, 4)), labels.astype(int), scores.astype(float),
                  np.where(right, CORRECT, NOTHING), np.full(count, -1), np.zeros(len(owners), int),
                  np.zeros((len(owners), 4)), owners, np.ones(len(owners)))


# Class A has four objects. The boxes with each score or more: right/boxes = 1/1, 2/2, 2/3, 3/4, 3/5.
FIVE = [(A, 0.9, True), (A, 0.8, True), (A, 0.7, False), (A, 0.6, True), (A, 0.5, False)]


def test_the_curve():
    curve = score_curve(judged(*FIVE[::-1]), A)  # the order of the detections is free
    assert curve.score.tolist() == [0.9, 0.8, 0.7, 0.6, 0.5]
    assert curve.precision.tolist() == pytest.approx([1, 1, 2 / 3, 3 / 4, 3 / 5])
    assert curve.recall.tolist() == pytest.approx([1 / 4, 2 / 4, 2 / 4, 3 / 4, 3 / 4])
    assert curve.f1.tolist() == pytest.approx([2 / 5, 4 / 6, 4 / 7, 6 / 8, 6 / 9])


@pytest.mark.parametrize("precision, expected", [
    (None, (0.6, 3 / 4, 3 / 4, 4)),   # F1 6/8
    (1.0, (0.8, 1, 2 / 4, 2)), (0.9, (0.8, 1, 2 / 4, 2)), (0.75, (0.6, 3 / 4, 3 / 4, 4)),
    (0.6, (0.5, 3 / 5, 3 / 4, 5)), (0.01, (0.5, 3 / 5, 3 / 4, 5))])
def test_the_chosen_score(precision, expected):
    at = choose_threshold(score_curve(judged(*FIVE), A), precision)
    assert (at.score, at.precision, at.recall, at.boxes) == pytest.approx(expected) and at.objects == 4


def test_the_lowest_score_lies_below_a_dip():
    """The precision falls below what was asked for, and rises again."""
    rows = [(A, 0.9, False), *((A, 0.8 - i / 100, True) for i in range(3)), (A, 0.1, False)]
    at = choose_threshold(score_curve(judged(*rows), A), 0.75)
    assert (at.score, at.precision, at.recall, at.boxes) == pytest.approx((0.78, 3 / 4, 3 / 4, 4))


def test_equal_scores_stay_together():
    """Nobody can keep one of two boxes with the same score."""
    curve = score_curve(judged((A, 0.9, True), (A, 0.5, True), (A, 0.5, False), (A, 0.5, False)), A)
    assert curve.boxes.tolist() == [1, 4] and curve.correct.tolist() == [1, 2]
    assert choose_threshold(curve, 0.6).score == 0.9
    # F1 2/5 and 4/8: the second. With another wrong box, 4/10, they are equal: the higher score.
    assert choose_threshold(curve).score == 0.5
    more = score_curve(judged((A, 0.9, True), (A, 0.5, True), *[(A, 0.5, False)] * 4), A)
    assert more.f1.tolist() == [0.4, 0.4] and choose_threshold(more).score == 0.9


@pytest.mark.parametrize("precision", [None, 0.9])
def test_classes_without_a_score(precision):
    wrong = choose_threshold(score_curve(judged((A, 0.9, False)), A), precision)
    assert (wrong.score, wrong.precision, wrong.recall, wrong.boxes, wrong.objects) == (None, None, 0, 0, 4)
    no_object = choose_threshold(score_curve(judged((B, 0.9, False)), B), precision)
    assert (no_object.score, no_object.recall, no_object.objects) == (None, None, 0)
    assert choose_threshold(score_curve(judged(), A), precision).score is None
    assert choose_threshold(score_curve(judged(*FIVE[2:]), A), 0.6).score is None  # at most 1 of 2 is right


def test_calibration_error_by_hand():
    """Two bins hold scores: (0.6, 0.8] two boxes with mean 0.75, one right; (0.8, 1] four with mean 0.925, all right.
    The error is (2 * |0.5 - 0.75| + 4 * |1 - 0.925|) / 6."""
    rows = [(A, 0.8, True), (A, 0.7, False), *((A, score, True) for score in (0.85, 0.9, 0.95, 1.0))]
    own = reliability(judged(*rows, (A, 0.29, True), (B, 0.9, False)), A, 0.3, bins=5)
    assert own.count.tolist() == [0, 0, 0, 2, 4] and own.detections == 6
    assert own.score[3:].tolist() == pytest.approx([0.75, 0.925]) and own.precision[3:].tolist() == [0.5, 1]
    assert own.ece == pytest.approx((2 * 0.25 + 4 * 0.075) / 6)
    assert own.mean(own.score) == pytest.approx(5.2 / 6) and own.mean(own.precision) == pytest.approx(5 / 6)
    # All classes together: the box of B is in the last bin, whose mean is then 4.6 / 5 and precision 4 / 5.
    both = reliability(judged(*rows, (B, 0.9, False)), None, 0.3, bins=5)
    assert both.ece == pytest.approx((2 * 0.25 + 5 * abs(4.6 / 5 - 4 / 5)) / 7)


def test_calibration_error_at_the_borders():
    """A score of 0.2 is in the first of five bins, which holds (0, 0.2]; a score of 0 is there, too."""
    rows = [(A, 0.0, False), (A, 0.2, True), (A, 1.0, True)]
    assert reliability(judged(*rows), A, 0.0, bins=5).count.tolist() == [2, 0, 0, 0, 1]
    assert reliability(judged(*rows), A, 0.2, bins=5).detections == 2  # a score at the floor counts
    perfect = reliability(judged((A, 1.0, True), (A, 0.5, True), (A, 0.5, False)), A, 0.3)
    assert perfect.ece == pytest.approx(0) and reliability(judged(*rows), B, 0.0).ece is None
    assert reliability(judged(), None).ece is None


ONE, TWO, THREE = [0, 0, 50, 50], [100, 0, 50, 50], [0, 100, 50, 50]


@pytest.fixture
def analysis(tmp_path):
    """Two objects of A and one of B. Of A a box is right at 0.9, wrong at 0.8 and a duplicate at 0.6; B is missed."""
    dataset = make_dataset(tmp_path / "data", [(0, A, ONE), (0, A, TWO), (0, B, THREE)])
    found = [(0, A, ONE, 0.9), (0, A, [150, 150, 20, 20], 0.8), (0, A, ONE, 0.6), (0, B, [150, 100, 20, 20], 0.5)]
    return analyze_evaluation("mine", evaluated(dataset, found), dataset)


def test_from_detections_to_a_file(analysis, tmp_path):
    files = save_analysis([analysis], tmp_path)
    assert [file.name for file in files] == ["analysis.md", "analysis.json", "thresholds.json"]
    content = json.loads(files[-1].read_text())
    assert content["classes"] == {"A": {"score": 0.9, "precision": 1, "recall": 0.5, "boxes": 1, "objects": 2},
                                  "B": {"score": None, "precision": None, "recall": 0, "boxes": 0, "objects": 1}}
    assert content["iou"] == 0.5 and content["chosen_by"] == "the best F1"
    assert content["annotations"].endswith("a.json")
    assert load_thresholds(files[-1], ["B", "A"]) == [None, 0.9]  # in the detector's order
    own = json.loads(files[1].read_text())[0]["reliability"]
    # Each box is alone in its bin of 1/15: errors 0.1, 0.8, 0.6 and 0.5.
    assert own["ECE"] == pytest.approx(2.0 / 4) and own["per_class"]["A"]["ECE"] == pytest.approx(1.5 / 3)
    assert own["detections"] == 4 and own["per_class"]["B"]["precision"] == 0
    names = [file.name for file in save_analysis([analysis, analysis.__class__(**vars(analysis) | {"name": "a/b (2)"})],
                                                 tmp_path)]
    assert names[2:] == ["thresholds_mine.json", "thresholds_a_b_2_.json"]


def test_tables(analysis):
    text = format_tables([analysis, analysis], precision=0.8)
    assert "Lowest score of each class: precision 0.8 or more, with the lowest score (IoU 0.5)" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["A", "mine", "0.900", "100.0", "50.0", "1", "2"] in rows
    assert ["B", "mine", "not", "reached", "-", "0.0", "0", "1"] in rows
    assert "Reliability of scores of 0.3 or more (IoU 0.5, 15 bins)" in text
    assert ["all", "mine", "4", "70.0", "25.0", "50.0"] in rows and ["difference", "+0.0", "+0.0", "+0.0"] in rows


@pytest.mark.parametrize("content, expected", [
    ("", "cannot be read"), ("{", "cannot be read"), ("\xff", "cannot be read"), ("[" * 100_000, "cannot be read"),
    ("[]", "holds no scores of classes"), ("{}", "holds no scores of classes"),
    ('{"classes": []}', "holds no scores of classes"), ('{"classes": {}}', "holds no scores of classes"),
    ('{"classes": {"A": 0.5}}', "holds no score of A"), ('{"classes": {"A": {}}}', "holds no score of A"),
    ('{"classes": {"A": {"score": "0.5"}}}', "from 0 to 1 or null, not '0.5'"),
    ('{"classes": {"A": {"score": true}}}', "from 0 to 1 or null, not True"),
    ('{"classes": {"A": {"score": NaN}}}', "from 0 to 1 or null, not nan"),
    ('{"classes": {"A": {"score": 1e999}}}', "from 0 to 1 or null, not inf"),
    ('{"classes": {"A": {"score": -0.1}}}', "from 0 to 1 or null, not -0.1"),
    ('{"classes": {"a\\nb": {"score": 2}}}', "the score of a b must be")])
def test_damaged_files(tmp_path, content, expected):
    path = tmp_path / "thresholds.json"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(DataError) as caught:
        read_thresholds(path)
    assert expected in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="none.json cannot be read .No such file"):
        read_thresholds(tmp_path / "none.json")


@pytest.mark.parametrize("classes", [["red"], ["red", "blue", "green"], ["red", "green"], ["red", "blue"] * 2])
def test_other_classes(tmp_path, classes):
    path = tmp_path / "thresholds.json"
    path.write_text(json.dumps({"classes": {"red": {"score": 0.1}, "blue": {"score": None}}}))
    with pytest.raises(DataError, match=r"is for 2 classes \(red, blue\), and the detector has \d class"):
        load_thresholds(path, classes)


def test_names_that_are_spelled_otherwise(tmp_path):
    path = tmp_path / "thresholds.json"
    path.write_text(json.dumps({"classes": {"Traffic Light": {"score": 0.1}, "bus": {"score": 0.2}, "Bus": {
        "score": 0.3}}}))
    assert load_thresholds(path, ["bus", "traffic_light", "Bus"]) == [0.2, 0.1, 0.3]
    with pytest.raises(DataError, match="is for 3 classes"):
        load_thresholds(path, ["bus", "traffic light", "BUS"])  # two classes of the file could be meant


def test_every_class_has_one(analysis):
    assert len(choose_thresholds(analysis.judged)) == 2
