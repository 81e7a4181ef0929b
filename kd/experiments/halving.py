"""Successive halving (arXiv:1502.07943): many short runs, and longer ones only for the best.

Each rung trains its candidates anew over its own number of epochs, and everything that counts in epochs or in warm-up
steps shrinks with it. So the learning rate ends low in short runs, too, and their AP says more about the full length
than that of a full run which is cut off early (arXiv:1905.04753). It costs a little: with a reduction of 3, one third
of each longer rung.
"""
from collections.abc import Sequence
from dataclasses import dataclass

from data.errors import counted
from models import ConfigError

from ..config import Config
from .space import as_overrides


@dataclass(frozen=True)
class Rung:
    """Runs of one length."""

    count: int   # candidates
    epochs: int  # of each

    def __str__(self) -> str:
        return f"{counted(self.count, 'run')} of {counted(self.epochs, 'epoch')}"


def lengths(epochs: int, reduction: int, shortest: int | None) -> list[int]:
    """Epochs of the rungs, rising to the full length; by default, the shortest are a ninth of it."""
    shortest = shortest or max(1, round(epochs / 9))
    found = [epochs]
    while found[0] > shortest:
        found.insert(0, max(shortest, round(found[0] / reduction)))
    return found


def plan_rungs(runs: float, epochs: int, reduction: int, shortest: int | None, most: int | None = None) -> list[Rung]:
    """The rungs with the most candidates that cost no more than `runs` runs of full length.

    At least two candidates reach the full length. If that costs too much, the shortest rungs are left out.

    Args:
        epochs: of the full length.
        most: the number of candidates that there are; None if there is no end of them.
    Raises:
        ConfigError: even two runs of full length cost too much.
    """
    rungs = lengths(epochs, reduction, shortest)
    while rungs:
        steps = [reduction ** i for i in range(len(rungs))]
        count, found = 2 * steps[-1], None
        while most is None or count <= most:
            plan = [Rung(count // step, length) for step, length in zip(steps, rungs)]
            if cost(plan, epochs) > runs + 1e-9:
                break
            found, count = plan, count + 1
        if found:
            return found
        rungs.pop(0)
    raise ConfigError("budget", f"leaves {runs:.3g} runs of full length to search with, and at least 2 are needed")


def cost(rungs: Sequence[Rung], epochs: int) -> float:
    """What rungs cost, in runs of `epochs` epochs."""
    return sum(rung.count * rung.epochs for rung in rungs) / epochs


def shortened(config: Config, epochs: int) -> list[str]:
    """Overrides that train a configuration over fewer epochs: what counts in epochs or warm-up steps shrinks, too."""
    full = config.train.epochs
    if epochs == full:
        return []
    share, schedule = epochs / full, config.schedule
    values = {"train.epochs": epochs, "schedule.warmup_steps": round(schedule.warmup_steps * share)}
    if schedule.type == "step":
        values["schedule.milestones"] = [round(milestone * share, 4) for milestone in schedule.milestones]
    for i, method in enumerate(config["distill"]["methods"] if config.distill else []):
        for name in ("warmup_epochs", "stop_epoch"):
            if method.get(name):
                values[f"distill.methods.{i}.{name}"] = round(method[name] * share, 4)
    augment = (config["data"] or {}).get("train_augment")
    for i, entry in enumerate(augment if isinstance(augment, list) else []):
        if entry.get("stop_epoch"):
            values[f"data.train_augment.{i}.stop_epoch"] = round(entry["stop_epoch"] * share)
    return as_overrides(values)


def ranked(scores: dict[int, float | None]) -> list[int]:
    """Candidates from the best AP to the worst; of equal ones, the first comes first. Those without an AP are left out.
    """
    return sorted((i for i, ap in scores.items() if ap is not None), key=lambda i: (-scores[i], i))
