"""Pictures of runs' curves, on folders written by hand."""
import hashlib
import json
import sys

import pytest
from run_folders import TEACHER, run_config, write_run
from runs import run_script

from data import DataError
from data.images import read_image
from kd.experiments.compare import compare
from kd.work_dir.records import read_runs

matplotlib = pytest.importorskip("matplotlib", reason="plots need the extra viz")
from kd.experiments import plot  # noqa: E402


@pytest.fixture
def study(tmp_path):
    """A teacher, and over two seeds the student alone and with CrossKD."""
    folder = tmp_path / "runs"
    larger = run_config(epochs=3)
    larger["model"]["head"]["stacked_convs"] = 3
    write_run(folder / "teacher", [0.2, 0.5, 0.5], larger, checkpoint=TEACHER)
    path = folder / "teacher" / "last.pth"
    for seed in (0, 1):
        write_run(folder / f"alone_seed{seed}", [0.1, 0.24 + 0.02 * seed], run_config(seed))
        distilled = write_run(folder / f"crosskd_seed{seed}", [0.3, 0.4],
                              run_config(seed, methods=("CrossKD",), teacher=path),
                              {str(path): hashlib.sha256(TEACHER).hexdigest()})
        curve = [1 - 0.005 * i - 0.1 * seed for i in range(101)]
        (distilled / "precision_recall.json").write_text(json.dumps(
            {"recall": [i / 100 for i in range(101)], "precision": {"disc": {"0.50": curve, "0.75": [0.0] * 101},
                                                                     "ring": {"0.50": None, "0.75": None},
                                                                     "star": {"0.50": [0.5] * 101, "0.75": None}}}))
    return sorted(folder.iterdir())


def lines(axis):
    return {line.get_label(): line for line in axis.get_lines() if not line.get_label().startswith("_")}


def test_ap_over_epochs_with_bands_over_seeds(study):
    figure = plot.plot_aps(plot.group_runs(read_runs(study)[0]))
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}
    assert list(panels) == ["AP", "AP50", "AP75", "APm", "APl", "disc"]  # no small objects, no rings
    drawn = lines(panels["AP"])
    assert list(drawn) == ["alone (2 seeds)", "crosskd (2 seeds)", "teacher"]
    assert drawn["alone (2 seeds)"].get_xdata().tolist() == [1, 2]
    assert drawn["alone (2 seeds)"].get_ydata().tolist() == pytest.approx([10, 25])
    band = panels["AP"].collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(26) and band[:, 1].min() == pytest.approx(10)


def test_bars_where_there_is_one_evaluation(tmp_path):
    """A curve with one point would be invisible."""
    for seed, ap in enumerate((0.2, 0.4)):
        write_run(tmp_path / f"alone_seed{seed}", [ap], run_config(seed, epochs=1))
    write_run(tmp_path / "teacher", [0.6], run_config(methods=("CrossKD",), epochs=1))
    figure = plot.plot_aps(plot.group_runs(read_runs(sorted(tmp_path.iterdir()))[0]))
    bars = {bar.get_label(): bar.patches[0].get_height() for bar in figure.axes[0].containers
            if hasattr(bar, "patches")}
    assert bars == pytest.approx({"alone (2 seeds)": 30, "teacher": 60})
    assert [text.get_text() for text in figure.axes[0].texts] == ["30.0", "60.0"]


def test_losses_over_epochs(study):
    figure = plot.plot_losses(plot.group_runs(read_runs(study)[0]))
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}
    assert list(panels) == ["loss", "loss_cls", "lr"]
    drawn = lines(panels["loss"])["teacher"]
    assert drawn.get_xdata().tolist() == pytest.approx([i / 3 for i in range(1, 10)])
    assert drawn.get_ydata().tolist() == pytest.approx([4 / i for i in range(1, 10)])


def test_precision_over_recall(study):
    figure = plot.plot_precision_recall(plot.group_runs(read_runs(study)[0]))
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}
    assert list(panels) == ["mean of the classes", "disc", "star"]  # no rings
    assert lines(panels["mean of the classes"])["crosskd, IoU 0.50"].get_ydata()[0] == pytest.approx(0.725)
    drawn = lines(panels["disc"])
    assert list(drawn) == ["crosskd, IoU 0.50", "crosskd, IoU 0.75"]
    assert drawn["crosskd, IoU 0.50"].get_ydata()[0] == pytest.approx(0.95)  # between 1 and 0.9


@pytest.mark.parametrize("content", ["{}", '{"recall": [0.1], "precision": {}}', '{"precision": []}', "[]", "{", 'x',
                                     json.dumps({"recall": [0.1] * 101, "precision": {"disc": {"0.50": ["a"] * 101}}}),
                                     json.dumps({"recall": [0.1] * 101, "precision": {"disc": [0.5] * 101}})])
def test_wrong_curves_are_named(study, content):
    (study[-2] / "precision_recall.json").write_text(content)
    groups = plot.group_runs(read_runs(study)[0])
    with pytest.raises(DataError, match=r"precision_recall\.json .*: eval\.py --curves writes it again$"):
        plot.plot_precision_recall(groups)


def test_a_single_class_is_not_drawn_beside_its_mean(study):
    for path in [file for run in study for file in run.iterdir() if file.suffix in (".json", ".jsonl")]:
        path.write_text(path.read_text().replace(', "ring": null', "").replace(
            f', "star": {{"0.50": {[0.5] * 101}, "0.75": null}}', ""))
    groups = plot.group_runs(read_runs(study)[0])
    for figure, titles in ((plot.plot_aps(groups), ["AP", "AP50", "AP75", "APm", "APl"]),
                           (plot.plot_precision_recall(groups), ["disc"])):
        assert [axis.get_title() for axis in figure.axes if axis.get_visible()] == titles


def test_ap_over_the_length_of_training(study, tmp_path):
    assert plot.plot_lengths(plot.group_runs(read_runs(study)[0])) is None
    for seed in (0, 1, 2):
        write_run(tmp_path / "long" / f"alone_seed{seed}", [0.1, 0.2, 0.3, 0.4 + 0.1 * seed],
                  run_config(seed, epochs=4))
    write_run(tmp_path / "stopped" / "alone_seed0", [0.9], run_config(0, epochs=8))
    figure = plot.plot_lengths(plot.group_runs(read_runs([*study, *sorted(tmp_path.glob("[ls]*/alone*"))])[0]))
    axis, = figure.axes
    drawn = lines(axis)
    assert list(drawn) == ["student alone (2 seeds)"]  # the third was not trained in both lengths
    assert drawn["student alone (2 seeds)"].get_xdata().tolist() == [2, 4]
    assert drawn["student alone (2 seeds)"].get_ydata().tolist() == pytest.approx([25, 45])


def test_gap_closed(study):
    figure = plot.plot_gap(compare(read_runs(study)[0]))
    axis, = figure.axes
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([100 * 0.15 / 0.25])
    assert plot.plot_gap([]) is None


def test_plot_script(study, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "plots"
    assert run_script(monkeypatch, "plot.py", *study, "--out", out) == 0
    names = ["losses", "ap", "precision_recall", "gap_closed"]
    assert capsys.readouterr().out.split() == [str(out / f"{name}.png") for name in names]
    for name in names:
        assert read_image(out / f"{name}.png").float().std() > 10


def test_without_matplotlib(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run_script(monkeypatch, "plot.py", *study, "--out", tmp_path / "plots") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error == ["error: a plot needs matplotlib, which is not installed: pip install 'densekd[viz]', "
                     "or pip install matplotlib"] and not (tmp_path / "plots").exists()
