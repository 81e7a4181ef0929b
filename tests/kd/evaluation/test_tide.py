"""Types of errors and their costs, in cases with known answers and against pycocotools."""
import numpy as np
import pytest
from hand_detections import A, B, evaluated, make_dataset

from kd.evaluation.analyze import analyze_evaluation, format_tables
from kd.evaluation.coco import read_figures
from kd.evaluation.tide import (
    BOTH,
    BOX,
    CLASS,
    CORRECT,
    DUPLICATE,
    ERRORS,
    NOTHING,
    ap50,
    confusion_matrix,
    count_errors,
    judge,
    kind_of_error,
    lost_ap,
    mean,
)

ONE, TWO, FAR = [0, 0, 100, 100], [100, 100, 100, 100], [100, 0, 60, 60]


def judged(folder, objects, detections, images=1):
    return judge(evaluated(make_dataset(folder, objects, images), detections))


def part(box, share):
    """The upper `share` of a box: their IoU."""
    return [box[0], box[1], box[2], box[3] * share]


CASES = {  # objects, detections (class, box, score): what each kind of error costs each class, where not 0
    "perfect": ([(A, ONE), (B, TWO)], [(A, ONE, 0.9), (B, TWO, 0.8)], {}),
    "badly placed": ([(A, ONE)], [(A, part(ONE, 0.4), 0.9)], {"localisation": {A: 1}}),
    "two badly placed, of which one is enough": (
        [(A, ONE)], [(A, part(ONE, 0.4), 0.9), (A, part(ONE, 0.3), 0.8)], {"localisation": {A: 1}}),
    "wrong class, ahead of one that is right": (
        [(A, ONE), (B, TWO)], [(B, ONE, 0.9), (B, TWO, 0.8)], {"classification": {A: 1, B: 0.5}}),
    "wrong class beside the right one": (
        [(A, ONE), (B, TWO)], [(B, ONE, 0.9), (A, ONE, 0.3), (B, TWO, 0.8)], {"classification": {B: 0.5}}),
    "wrong class and badly placed": (
        [(A, ONE), (B, TWO)], [(B, part(ONE, 0.4), 0.9), (B, TWO, 0.8)], {"both": {B: 0.5}, "missed": {A: 1}}),
    "twice": ([(A, ONE), (A, TWO)], [(A, ONE, 0.9), (A, ONE, 0.8), (A, TWO, 0.7)],
              {"duplicate": {A: 1 - (51 + 50 * 2 / 3) / 101}}),
    "nothing there": ([(A, ONE)], [(A, FAR, 0.9), (A, ONE, 0.8)], {"background": {A: 0.5}}),
    "missed": ([(A, ONE), (A, TWO)], [(A, ONE, 0.9)], {"missed": {A: 50 / 101}}),
    "nothing detected": ([(A, ONE), (A, TWO)], [], {"missed": {A: 1}}),
    "only a false one": ([(A, ONE)], [(A, FAR, 0.9)], {"missed": {A: 1}}),
    "badly placed beside the right one": (
        [(A, ONE), (A, TWO)], [(A, ONE, 0.9), (A, part(ONE, 0.4), 0.8)], {"missed": {A: 50 / 101}}),
    "two badly placed for one of two": (
        [(A, ONE), (A, TWO)], [(A, part(ONE, 0.4), 0.9), (A, part(ONE, 0.3), 0.8)], {"localisation": {A: 51 / 101}}),
    "the better claim is the other class's": (
        [(A, ONE), (B, TWO)], [(A, part(ONE, 0.4), 0.85), (B, ONE, 0.9), (B, TWO, 0.8)],
        {"classification": {A: 1, B: 0.5}}),
    "the better claim counts": (  # once in its place, A's 0.9 finds the object; with its class right, B's would not
        [(A, ONE), (B, TWO)], [(A, part(ONE, 0.4), 0.9), (B, ONE, 0.85), (B, TWO, 0.8)],
        {"localisation": {A: 1}, "classification": {B: 0.5}}),
}


@pytest.mark.parametrize("objects, detections, expected", CASES.values(), ids=CASES)
def test_what_an_error_costs(tmp_path, objects, detections, expected):
    present = {c for c, _ in objects}
    lost = lost_ap(judged(tmp_path, [(0, *each) for each in objects], [(0, *each) for each in detections]))
    assert list(lost) == list(ERRORS)
    for error in ERRORS:
        for c in (A, B):
            wanted = expected.get(error, {}).get(c, 0)
            assert lost[error][c] == (pytest.approx(wanted) if c in present else None), (error, c)


@pytest.mark.parametrize("overlaps, same, taken, expected", [
    ([], [], [], (NOTHING, -1)),
    ([0.1], [False], [False], (NOTHING, -1)),
    ([0.1], [True], [False], (BOX, 0)),  # TIDE counts both thresholds in
    ([0.5], [True], [True], (BOX, 0)),
    ([0.51], [True], [True], (DUPLICATE, -1)),
    ([0.5], [False], [True], (CLASS, 0)),
    ([0.49], [False], [True], (BOTH, -1)),
    ([0.2, 0.9], [True, False], [False, False], (BOX, 0)),  # its own class comes first
    ([0.6, 0.7], [True, False], [True, False], (CLASS, 1)),
])
def test_kinds(overlaps, same, taken, expected):
    found = kind_of_error(np.array(overlaps, dtype=float), np.array(same, dtype=bool), np.array(taken, dtype=bool))
    assert found == expected


def test_crowds_are_neither_missed_nor_are_detections_in_them_wrong(tmp_path):
    seen = judged(tmp_path, [(0, A, ONE), (0, A, TWO, 1)], [(0, A, ONE, 0.9), (0, A, part(TWO, 0.3), 0.8)])
    assert seen.kind.tolist() == [CORRECT] and not seen.missed.any() and len(seen.object_label) == 1
    assert mean(ap50(seen)) == pytest.approx(1)


def test_errors_are_counted(tmp_path):
    seen = judged(tmp_path, [(0, A, ONE), (1, B, TWO), (1, B, ONE)],
                  [(0, B, ONE, 0.9), (0, A, FAR, 0.8), (1, B, TWO, 0.7), (1, B, TWO, 0.6)], images=2)
    zero = dict.fromkeys(ERRORS, 0)
    assert count_errors(seen) == zero | {"objects": 3, "classification": 1, "background": 1, "duplicate": 1,
                                         "missed": 1}
    assert count_errors(seen, A) == zero | {"objects": 1, "background": 1}
    assert count_errors(seen, B) == zero | {"objects": 2, "classification": 1, "duplicate": 1, "missed": 1}


def test_confusion_matrix(tmp_path):
    seen = judged(tmp_path, [(0, A, ONE), (0, B, TWO), (1, A, ONE), (2, B, ONE)],
                  [(0, A, ONE, 0.9), (0, A, TWO, 0.8), (0, B, TWO, 0.7), (1, A, ONE, 0.2), (2, B, part(ONE, 0.4), 0.9)],
                  images=3)
    assert confusion_matrix(seen, 0.3).tolist() == [
        [1, 0, 1],   # of A one is found, and one only below the score
        [1, 0, 1],   # of B one is taken for A, whose score is higher, and one not placed well enough
        [0, 2, 0]]   # both detections of B find nothing


def random_case(seed, images=8):
    rng = np.random.default_rng(seed)
    objects, detections = [], []
    for i in range(images):
        for _ in range(rng.integers(0, 6)):
            c, (x, y), (w, h) = int(rng.integers(2)), rng.uniform(0, 100, 2), rng.uniform(10, 100, 2)
            objects.append((i, c, [x, y, w, h], int(rng.random() < 0.1)))
            for _ in range(rng.integers(0, 4)):
                box = np.maximum([x, y, w, h] + rng.normal(0, rng.choice([2, 8, 20]), 4), 1)
                detections.append((i, c if rng.random() < 0.7 else 1 - c, box.tolist(), round(rng.random(), 1)))  # ties
    return objects, detections


@pytest.mark.parametrize("seed", range(5))
def test_ap50_is_that_of_pycocotools(tmp_path, seed):
    objects, detections = random_case(seed)
    dataset = make_dataset(tmp_path, objects, images=8)
    evaluation = evaluated(dataset, detections)
    seen = judge(evaluation)
    assert mean(ap50(seen)) == pytest.approx(read_figures(evaluation, dataset)["AP50"], abs=1e-12)
    assert {CORRECT, BOX, CLASS, DUPLICATE} <= set(seen.kind)
    assert all(value > -0.02 for values in lost_ap(seen).values() for value in values)  # but for the binning by recall


def test_two_models_side_by_side(tmp_path):
    dataset = make_dataset(tmp_path, [(0, A, ONE), (0, A, TWO)])
    found = [analyze_evaluation(name, evaluated(dataset, [(0, A, box, 0.9) for box in boxes]), dataset)
             for name, boxes in {"alone": [ONE], "distilled": [ONE, TWO]}.items()]
    printed = format_tables(found)
    lines = [line.split() for line in printed.splitlines()]
    assert ["all", "alone", "50.5", "50.5", "-", "-", "50.5"] in lines  # large: from 96 x 96 pixels on
    assert ["difference", "+49.5", "+49.5", "-", "-", "+49.5"] in lines
    assert ["A", "alone", "50.5", "0.0", "0.0", "0.0", "0.0", "0.0", "49.5"] in lines
    assert ["A", "large", "2", "1", "0", "1", "0"] in lines  # objects: both, only alone, only distilled, none
    assert ["B", "alone", *["-"] * 7] in lines
    assert "| A | 2 | 0 | 0 |" in format_tables(found, markdown=True)
