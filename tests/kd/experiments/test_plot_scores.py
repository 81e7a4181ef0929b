"""What the pictures of scores show."""
import numpy as np
import pytest
from hand_detections import A, B, evaluated, make_dataset

from kd.evaluation.analyze import analyze_evaluation

pytest.importorskip("matplotlib", reason="plots need the extra viz")
from kd.experiments.plot_scores import plot_curves, plot_reliability  # noqa: E402

ONE, TWO, NOWHERE = [0, 0, 50, 50], [100, 0, 50, 50], [150, 150, 20, 20]


@pytest.fixture
def found(tmp_path):
    """Two detectors on two objects of A; the second finds both. Nothing is of B."""
    dataset = make_dataset(tmp_path / "data", [(0, A, ONE), (0, A, TWO)])
    rows = {"alone": [(0, A, ONE, 0.9), (0, A, NOWHERE, 0.4)],
            "distilled": [(0, A, ONE, 0.9), (0, A, NOWHERE, 0.8), (0, A, TWO, 0.5)]}
    return [analyze_evaluation(name, evaluated(dataset, own), dataset) for name, own in rows.items()]


def panels(figure):
    return {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}


def test_precision_and_recall_over_the_score(found):
    drawn = panels(plot_curves(found))
    assert list(drawn) == ["A", "B"]
    lines = {line.get_label(): line for line in drawn["A"].get_lines()}
    assert lines["distilled: precision"].get_xdata().tolist() == [0.9, 0.8, 0.5]
    assert lines["distilled: precision"].get_ydata().tolist() == pytest.approx([1, 1 / 2, 2 / 3])
    assert lines["distilled: recall"].get_ydata().tolist() == [0.5, 0.5, 1]
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in drawn["A"].get_lines() if line.get_marker() == "o"]
    # The best F1 of the first is 2/3 at 0.9, of the second 4/5 at 0.5: each has a dot on precision and on recall.
    assert np.array(dots) == pytest.approx(np.array([(0.9, 1), (0.9, 0.5), (0.5, 2 / 3), (0.5, 1)]))
    # Between two scores a lowest score gives the boxes of the higher one: steps to the left.
    assert lines["distilled: precision"].get_drawstyle() == "steps-post"
    assert B == 1 and not [line for line in drawn["B"].get_lines() if len(line.get_xdata())]


def test_reliability(found):
    drawn = panels(plot_reliability(found, 0.45))
    assert list(drawn) == ["all", "A", "B"]
    lines = {line.get_label(): line for line in drawn["all"].get_lines()}
    assert lines["alone"].get_xdata().tolist() == [0.9] and lines["alone"].get_ydata().tolist() == [1]
    assert lines["distilled"].get_xdata().tolist() == pytest.approx([0.5, 0.8, 0.9])
    assert lines["distilled"].get_ydata().tolist() == [1, 0, 1]
