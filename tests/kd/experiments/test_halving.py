"""The rungs of successive halving, and how runs are shortened."""
import pytest
from runs import config

from kd.config import parse_config
from kd.experiments.halving import Rung, cost, lengths, plan_rungs, ranked, shortened
from models import ConfigError


def test_lengths():
    assert lengths(12, 3, None) == [1, 4, 12] and lengths(24, 3, None) == [3, 8, 24] and lengths(1, 3, None) == [1]
    assert lengths(12, 2, 5) == [5, 6, 12] and lengths(12, 3, 12) == [12] and lengths(2, 3, None) == [1, 2]


@pytest.mark.parametrize("runs, expected", [
    (7, [Rung(18, 1), Rung(6, 2), Rung(2, 6)]), (14, [Rung(36, 1), Rung(12, 2), Rung(4, 6)]),
    (6.5, [Rung(10, 2), Rung(3, 6)]), (3, [Rung(3, 6)]), (2, [Rung(2, 6)])])
def test_plan(runs, expected):
    """The most candidates that the budget pays for; fewer rungs if it is small."""
    plan = plan_rungs(runs, 6, 3, None)
    assert plan == expected and cost(plan, 6) <= runs


def test_plan_of_few_candidates_or_no_budget():
    assert plan_rungs(50, 6, 3, None, most=7) == [Rung(7, 2), Rung(2, 6)]
    assert plan_rungs(50, 6, 3, None, most=3) == [Rung(3, 6)]
    with pytest.raises(ConfigError, match="leaves 1.5 runs of full length to search with, and at least 2 are needed"):
        plan_rungs(1.5, 6, 3, None)


def test_whatever_counts_in_epochs_shrinks(tmp_path):
    cfg = config(tmp_path, 12, {"teacher": {"model": config(tmp_path)["model"], "checkpoint": None}, "methods": [
        {"type": "FGD", "warmup_epochs": 3, "stop_epoch": 9, "decay": "linear"}, {"type": "PKD"}]})
    cfg["schedule"] = {"warmup_steps": 90, "milestones": [8, 11]}
    cfg["data"]["train_augment"] = [{"type": "Mosaic", "stop_epoch": 9}, {"type": "MixUp"}]
    assert shortened(parse_config(cfg), 12) == []
    assert shortened(parse_config(cfg), 4) == [
        "train.epochs=4", "schedule.warmup_steps=30", "schedule.milestones=[2.6667, 3.6667]",
        "distill.methods.0.warmup_epochs=1.0", "distill.methods.0.stop_epoch=3.0", "data.train_augment.0.stop_epoch=3"]
    cfg["schedule"] = {"warmup_steps": 90, "type": "cosine"}
    assert shortened(parse_config(cfg), 4)[:3] == ["train.epochs=4", "schedule.warmup_steps=30",
                                                   "distill.methods.0.warmup_epochs=1.0"]


def test_ranks():
    assert ranked({0: 0.2, 1: 0.3, 2: None, 3: 0.3}) == [1, 3, 0]
