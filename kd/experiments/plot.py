"""Curves of runs: losses and AP over epochs, precision over recall, AP over the length of training, and the gap closed.
Needs the extra `viz`."""
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data import DataError
from data.extras import need
from data.output import writing

from ..evaluation.coco import AP_FIGURES
from ..work_dir.records import RunRecord, group_name, group_runs, is_number, methods_of, read_json, setting
from .compare import Row
from .tables import gap_text

COLUMNS = 3
MOST_CLASSES = 12  # if there are more, only the mean and these first ones get precision-recall curves


def matplotlib_figure(panels: int, size: tuple[float, float] = (5, 3.6)) -> tuple[Any, np.ndarray]:
    """A figure of panels in rows of three, each of a size in inches; MissingExtra if matplotlib is not installed."""
    columns = min(panels, COLUMNS)
    rows = -(-panels // columns)
    make = need("matplotlib", "viz", "a plot", module="matplotlib.figure").Figure  # no pyplot, so no display
    figure = make(figsize=(size[0] * columns, size[1] * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[panels:]:
        unused.set_visible(False)
    return figure, axes


def plot_runs(runs: Sequence[RunRecord], rows: Sequence[Row], out: Path) -> list[Path]:
    """Write every PNG picture for which the runs have values, and return the files; `rows` are `compare(runs)`."""
    groups = group_runs(runs)
    pictures = {"losses": plot_losses(groups), "ap": plot_aps(groups),
                "precision_recall": plot_precision_recall(groups), "training_length": plot_lengths(groups),
                "gap_closed": plot_gap(rows)}
    files = []
    for name, figure in pictures.items():
        if figure is not None:
            files.append(out / f"{name}.png")
            with writing(files[-1]) as partial:
                figure.savefig(partial, dpi=110, format="png")
    return files


Curve = tuple[np.ndarray, np.ndarray]  # x, y


def draw_group(axis: Any, label: str, curves: Sequence[Curve], number: int, marker: str = "") -> None:
    """Draw a curve as a line, or the mean of several curves in a band from the lowest to the highest."""
    common, values = at_common_places(curves)
    if not len(common):
        return
    color, style = f"C{number % 10}", ("-", "--", ":")[number // 10 % 3]
    label = label if len(curves) == 1 else f"{label} ({len(curves)} seeds)"
    axis.plot(common, values.mean(0), style, color=color, label=label, marker=marker, linewidth=1.4, markersize=4,
              clip_on=not marker)
    if len(curves) > 1:
        axis.fill_between(common, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)


def at_common_places(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """The x (n,) that all curves have, and the y (curves, n) there."""
    common = sorted(set.intersection(*(set(np.round(x, 6)) for x, _ in curves)))
    values = [[y[np.round(x, 6) == place][0] for place in common] for x, y in curves]
    return np.array(common), np.array(values)


def draw_bar(axis: Any, label: str, values: Sequence[float], number: int) -> None:
    """Draw a bar with its value, or the mean of several values with a line from the lowest to the highest."""
    mean = float(np.mean(values))
    reach = [[mean - min(values)], [max(values) - mean]] if len(values) > 1 else None
    label = label if len(values) == 1 else f"{label} ({len(values)} seeds)"
    bar = axis.bar(number, mean, 0.7, yerr=reach, color=f"C{number % 10}", alpha=0.8, label=label)
    axis.bar_label(bar, fmt="%.1f", padding=2)


def plot_lines(groups: dict[str, list[RunRecord]], names: Sequence[str], read: Callable[[RunRecord, str], Curve],
               y_label: str, marker: str = "", log: bool = False) -> Any | None:
    """A panel for each name, with a curve for every group that has it, or a bar if all have single points only."""
    if not names:
        return None
    figure, axes = matplotlib_figure(len(names))
    lone = not log and all(len(read(run, name)[0]) < 2 for runs in groups.values() for run in runs for name in names)
    for axis, name in zip(axes, names):
        for number, (label, runs) in enumerate(groups.items()):
            curves = [curve for curve in (read(run, name) for run in runs) if len(curve[0])]
            if curves and lone:
                draw_bar(axis, label, [y[-1] for _, y in curves], number)
            elif curves:
                draw_group(axis, label, curves, number, marker)
        axis.set(title=name, ylabel=y_label)
        if lone:
            axis.set_xticks([])
        else:
            axis.set(xlabel="epoch")
            axis.locator_params("x", integer=True)
            axis.set_xlim(left=0)
        if log:
            logarithmic(axis)
        else:
            axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
    legend(figure, axes[:len(names)])
    return figure


def logarithmic(axis: Any) -> None:
    """A logarithmic y axis with plain numbers, and with more of them if it spans few decades."""
    from matplotlib.ticker import LogLocator, NullFormatter
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 20 * low else (1, 3)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def legend(figure: Any, axes: Iterable) -> None:
    """One legend under all panels."""
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(4, max(1, len(entries))))


def plot_losses(groups: dict[str, list[RunRecord]]) -> Any | None:
    """The losses as they were logged, on a logarithmic scale, and the learning rate."""
    def read(run: RunRecord, name: str) -> Curve:
        lines = [line for line in run.steps if line.get(name) is not None and line[name] > 0]
        return (np.array([line["step"] / run.steps_per_epoch for line in lines]),
                np.array([line[name] for line in lines]))
    keys = dict.fromkeys(key for runs in groups.values() for run in runs for line in run.steps for key in line)
    losses = [key for key in keys if key.startswith("loss_") and key != "loss_scale"]
    return plot_lines(groups, ["loss", *losses, "lr"] if losses else [], read, "", log=True)


def plot_aps(groups: dict[str, list[RunRecord]]) -> Any | None:
    """COCO's AP figures, and AP of each class if there are several, but few."""
    runs = [run for members in groups.values() for run in members]
    classes = list(dict.fromkeys(key for run in runs for line in run.evaluations for key in line.get("per_class", {})))
    names = [name for name in [*AP_FIGURES, *(classes if 1 < len(classes) <= MOST_CLASSES else [])]
             if any(len(ap_curve(run, name)[0]) for run in runs)]
    return plot_lines(groups, names, ap_curve, "AP, points", marker="o")


def ap_curve(run: RunRecord, name: str) -> Curve:
    """A figure of COCO or the AP of a class over epochs, in points."""
    values = [(line["epoch"] + 1, line.get(name, (line.get("per_class") or {}).get(name))) for line in run.evaluations]
    values = [(epoch, 100 * ap) for epoch, ap in values if ap is not None]
    return np.array([epoch for epoch, _ in values]), np.array([ap for _, ap in values])


def plot_precision_recall(groups: dict[str, list[RunRecord]]) -> Any | None:
    """Precision over recall at IoU 0.5 (solid) and 0.75 (dashed), class by class, at the last evaluation."""
    found: dict[str, list[dict]] = {}
    for name, runs in groups.items():
        files = [run.path / "precision_recall.json" for run in runs if run.path.is_dir()]
        curves = [read_curves(file) for file in files if file.is_file()]
        if curves:
            found[name] = curves
    if not found:
        return None
    classes = list(dict.fromkeys(name for curves in found.values() for one in curves for name in one["precision"]
                                 if precision_of(one, [name], "0.50") is not None))
    panels = {name: [name] for name in classes[:MOST_CLASSES]}
    if len(classes) != 1:
        panels = {"mean of the classes": classes} | panels
    figure, axes = matplotlib_figure(len(panels))
    for axis, (title, names) in zip(axes, panels.items()):
        for number, (label, curves) in enumerate(found.items()):
            for iou, style in (("0.50", "-"), ("0.75", "--")):
                lines = [line for line in (precision_of(one, names, iou) for one in curves) if line is not None]
                if lines:
                    recall, color = curves[0]["recall"], f"C{number % 10}"
                    axis.plot(recall, np.mean(lines, 0), style, color=color, label=f"{label}, IoU {iou}")
                    axis.fill_between(recall, np.min(lines, 0), np.max(lines, 0), color=color, alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    legend(figure, axes[:len(panels)])
    return figure


def read_curves(path: Path) -> dict:
    """A result of `precision_recall` that was written as JSON; DataError if it is none."""
    advice = "eval.py --curves writes it again"
    curves = read_json(path, advice)
    classes = curves.get("precision")
    lines = [curves.get("recall")]
    if isinstance(classes, dict) and all(isinstance(each, dict) for each in classes.values()):
        lines += [line for each in classes.values() for line in each.values() if line is not None]
    else:
        lines.append(None)
    if not all(isinstance(line, list) and len(line) == 101 and all(map(is_number, line)) for line in lines):
        raise DataError(f"{path} does not hold curves of 101 numbers each: {advice}")
    return curves


def precision_of(curves: dict, names: Sequence[str], iou: str) -> np.ndarray | None:
    """(101,) mean precision of some classes, from a result of `precision_recall`; None if they have no objects."""
    lines = [curves["precision"][name][iou] for name in names if curves["precision"].get(name, {}).get(iou)]
    return np.mean(lines, 0) if lines else None


def plot_lengths(groups: dict[str, list[RunRecord]]) -> Any | None:
    """Final AP over the number of epochs, for settings that were trained for several lengths with the same seeds.

    Their schedules may differ. If two runs have the same length and seed, the first counts.
    """
    settings: dict[str, dict[int, dict[int, RunRecord]]] = {}  # by epochs and seed
    for runs in groups.values():
        for run in runs:
            if run.config is not None and run.finished and run.evaluations[-1]["AP"] is not None:
                timeless = run.config | {"schedule": None, "train": run.config.get("train", {}) | {"epochs": None}}
                lengths = settings.setdefault(setting(timeless, run.teachers | run.init), {})
                lengths.setdefault(run.epochs, {}).setdefault(run.seed, run)
    known = [lengths for lengths in settings.values()
             if len(lengths) > 1 and set.intersection(*map(set, lengths.values()))]
    if not known:
        return None
    figure, (axis,) = matplotlib_figure(1, (7, 4.2))
    longest = [list(lengths[max(lengths)].values()) for lengths in known]
    labels = [methods_of(runs[0].config) or "student alone" for runs in longest]
    for number, (lengths, runs, label) in enumerate(zip(known, longest, labels)):
        curves = [(np.array(sorted(lengths)),
                   np.array([100 * lengths[epochs][seed].evaluations[-1]["AP"] for epochs in sorted(lengths)]))
                  for seed in sorted(set.intersection(*map(set, lengths.values())))]
        draw_group(axis, label if labels.count(label) == 1 else group_name(runs), curves, number, marker="o")
    ticks = sorted({epochs for lengths in known for epochs in lengths})
    axis.set_xscale("log")
    axis.set_xticks(ticks, map(str, ticks))
    axis.minorticks_off()
    axis.set(title="AP at the end of training", xlabel="epochs of training", ylabel="AP, points",
             ylim=(0, 1.08 * axis.get_ylim()[1]))
    axis.grid(alpha=0.3)
    legend(figure, [axis])
    return figure


def plot_gap(rows: Sequence[Row]) -> Any | None:
    """The share of the gap between student alone and teacher that each setting closes."""
    known = [row for row in rows if row.gap_closed is not None]
    if not known:
        return None
    figure, (axis,) = matplotlib_figure(1, (8, 1 + 0.4 * len(known)))
    places, values = range(len(known)), [100 * row.gap_closed for row in known]
    bars = axis.barh(places, values, 0.6, color="C0", alpha=0.8)
    axis.bar_label(bars, [gap_text(row.gap_closed) for row in known], padding=4)
    axis.set_yticks(list(places), [row.name for row in known])
    axis.set(xlabel="share of the gap between student alone and teacher that is closed, %")
    axis.margins(x=0.12)
    axis.axvline(100, color="black", linewidth=0.8, linestyle=":")
    axis.invert_yaxis()
    return figure
