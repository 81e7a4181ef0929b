"""Pictures of what scores are worth: precision and recall over the score, and reliability. Needs the extra `viz`."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.output import writing

from ..evaluation.analyze import Analysis, groups
from ..evaluation.scores import choose_threshold, reliability, score_curve
from .plot import MOST_CLASSES, legend, matplotlib_figure


def plot_scores(found: Sequence[Analysis], out: Path, score_thr: float, precision: float | None = None) -> list[Path]:
    """Write scores.png and reliability.png into a folder, and return the files.

    Args:
        score_thr, precision: as in `analyze.tables`.
    Raises:
        MissingExtra: matplotlib is not installed.
    """
    pictures = {"scores": plot_curves(found, precision), "reliability": plot_reliability(found, score_thr)}
    files = [out / f"{name}.png" for name in pictures]
    for file, figure in zip(files, pictures.values()):
        with writing(file) as partial:
            figure.savefig(partial, dpi=110, format="png")
    return files


def plot_curves(found: Sequence[Analysis], precision: float | None = None) -> Any:
    """Precision (solid) and recall (dashed) of the boxes with a score or more, class by class, and a dot on each at the
    score that is chosen."""
    classes = list(enumerate(found[0].classes))[:MOST_CLASSES]
    figure, axes = matplotlib_figure(len(classes))
    for axis, (k, name) in zip(axes, classes):
        for number, each in enumerate(found):
            curve, color = score_curve(each.judged, k), f"C{number % 10}"
            at = choose_threshold(curve, precision)
            for what, values, style in (("precision", curve.precision, "-"), ("recall", curve.recall, "--")):
                # A lowest score between two scores gives the boxes of the higher one.
                axis.step(curve.score, values, style, where="post", color=color, label=f"{each.name}: {what}")
                if at.score is not None:
                    axis.plot(at.score, getattr(at, what), "o", color=color, markersize=5)
        axis.set(title=name, xlabel="lowest score (dots: the chosen one)", xlim=(0, 1), ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    legend(figure, axes[:len(classes)])
    return figure


def plot_reliability(found: Sequence[Analysis], score_thr: float) -> Any:
    """Precision over the mean score of each bin; a detector whose scores are its precision follows the diagonal. The
    area of a dot is the bin's share of the detections."""
    panels = groups(found[0].classes)[:MOST_CLASSES + 1]
    figure, axes = matplotlib_figure(len(panels))
    for axis, (k, name) in zip(axes, panels):
        axis.plot([0, 1], [0, 1], ":", color="black", linewidth=0.8)
        for number, each in enumerate(found):
            own, color = reliability(each.judged, k, score_thr), f"C{number % 10}"
            there = own.count > 0
            axis.plot(own.score[there], own.precision[there], color=color, linewidth=1.2, label=each.name)
            axis.scatter(own.score[there], own.precision[there], 6 + 300 * own.count[there] / max(own.detections, 1),
                         color=color, alpha=0.7, linewidth=0, clip_on=False)
        axis.set(title=name, xlabel="mean score", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    legend(figure, axes[:len(panels)])
    return figure
