"""Warnings of settings that a run does not reach."""
import pytest

from kd.config import parse_config
from kd.config.late import never_reached

MODEL = {"backbone": {"type": "ResNet", "depth": 18}, "neck": {"type": "FPN", "out_channels": 64, "num_outs": 5},
         "head": {"type": "GFLHead"}}


def found(schedule: dict, **method) -> list[str]:
    """The lines of a run of 6 epochs of 10 steps."""
    distill = {"teacher": {"model": MODEL, "checkpoint": None}, "methods": [{"type": "PKD"} | method]}
    cfg = {"model": MODEL, "train": {"epochs": 6}, "schedule": {"warmup_steps": 5} | schedule, "distill": distill}
    return never_reached(parse_config(cfg), 10)


@pytest.mark.parametrize("schedule, method, lines", [
    ({"milestones": [4, 5.9]}, {}, []),
    ({"type": "cosine"}, {}, []),  # its milestones, [8, 11] by default, have no effect
    ({}, {}, ["schedule.milestones: training ends after 6 epochs, so the learning rate does not fall at 8, 11"]),
    ({"milestones": [6, 4]}, {},
     ["schedule.milestones: training ends after 6 epochs, so the learning rate does not fall at 6"]),
    ({"milestones": [], "warmup_steps": 60}, {},
     ["schedule.warmup_steps 60: training ends after 60 steps, before the learning rate has risen"]),
    ({"milestones": [], "warmup_steps": 59}, {"stop_epoch": 6, "warmup_epochs": 6}, []),
    ({"milestones": []}, {"stop_epoch": 6.5},
     ["distill.methods.0.stop_epoch 6.5: training ends after 6 epochs, so the method does not stop"]),
    ({"milestones": []}, {"warmup_epochs": 7},
     ["distill.methods.0.warmup_epochs 7: training ends after 6 epochs, before its weight has risen"]),
    ({"milestones": []}, {"warmup_epochs": 3, "stop_epoch": 2},
     ["distill.methods.0.warmup_epochs 3: the method stops at stop_epoch 2, before its weight has risen"])])
def test_what_is_not_reached(schedule, method, lines):
    assert found(schedule, **method) == lines
