"""Numbers of a configuration: each section's has a range, and the values just outside are refused."""
import inspect
from collections.abc import Iterator
from math import inf, nan
from typing import Annotated, Any, get_args, get_origin

import pytest
import yaml
from runs import config

from data.ranges import Range
from kd.config import Config, parse_config
from kd.config.reference import collect
from kd.methods.base import MethodOptions
from kd.optim import OPTIMIZERS, OptimizerOptions
from models.build import ConfigError, check_value, parameters
from models.detector import Preprocess

FREE = {"min_bbox_size"}  # negative: all boxes are kept
CALLS = [call for call in collect(Config).sections if call is not Preprocess]
CALLS += [OptimizerOptions, MethodOptions, *OPTIMIZERS.values()]


def numbers(hint: Any) -> Iterator[tuple[type, Range | None]]:
    """The types of numbers in a type hint, each with its range."""
    if hint in (int, float):
        yield hint, None
    elif get_origin(hint) is Annotated and isinstance(get_args(hint)[1], Range):
        yield get_args(hint)
    elif get_origin(hint) is not Annotated:
        for part in get_args(hint):
            yield from numbers(part) if not isinstance(part, str) else ()


KEYS = [(call.__name__, name, kind, allowed) for call in CALLS for name, (hint, _) in parameters(call).items()
        for kind, allowed in dict.fromkeys(numbers(hint)) if name not in FREE]


def test_there_are_numbers():
    assert len(KEYS) > 40 and {"flip", "grad_clip", "gamma", "lr", "weight", "score_thr"} <= {key[1] for key in KEYS}


@pytest.mark.parametrize("section, name, kind, allowed", KEYS, ids=lambda value: str(value))
def test_the_neighbours_of_a_range_are_refused(section, name, kind, allowed):
    assert allowed is not None, f"{section}.{name} has no range: use one of data/ranges.py"
    hint = Annotated[kind, allowed]
    inside = [allowed.low] * (not allowed.open) + [kind(allowed.low + 1)] + [allowed.high] * (allowed.high != inf)
    for value in inside:
        assert check_value(kind(value), hint, "key") == value
    outside = [allowed.low - 1, -10 ** 30, *[allowed.low] * allowed.open, *[allowed.high + 1] * (allowed.high != inf)]
    for value in [kind(value) for value in outside] + [True, None, "1"] + [nan, inf, -inf, 10 ** 400] * (kind is float):
        with pytest.raises(ConfigError, match="^key: must be "):
            check_value(value, hint, "key")


@pytest.mark.parametrize("override, message", [
    ("data.flip=1.5", "data.flip: must be from 0 to 1, not 1.5"),
    ("data.scale=[0,0]", "data.scale.0: must be at least 1, not 0"),
    ("data.multi_scale=[[64,64],[64,-1]]", "data.multi_scale.1.1: must be at least 1, not -1"),
    ("train.grad_clip=-1", "train.grad_clip: must be above 0, not -1"),
    ("train.seed=-1", "train.seed: must be from 0 to 4294967295, not -1"),
    ("train.epochs=0", "train.epochs: must be at least 1, not 0"),
    ("schedule.gamma=-1", "schedule.gamma: must be above 0, not -1"),
    ("schedule.milestones=[1,-1]", "schedule.milestones.1: must be at least 0, not -1"),
    ("optimizer.lr=.nan", "optimizer.lr: must be a finite number, not nan"),
    ("optimizer.lr=-0.01", "optimizer.lr: must be at least 0, not -0.01"),
    ("model.test.score_thr=5", "model.test.score_thr: must be from 0 to 1, not 5"),
])
def test_what_the_message_says(override, message, tmp_path):
    key, _, text = override.partition("=")
    cfg = config(tmp_path)
    *parents, last = key.split(".")
    place = cfg
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = yaml.safe_load(text)
    with pytest.raises(ConfigError) as error:
        parse_config(cfg)
    assert str(error.value) == message


def test_a_sections_defaults_are_within_its_ranges():
    for call in CALLS:
        for name, (hint, default) in parameters(call).items():
            if isinstance(default, (int, float, tuple)) and default is not inspect.Parameter.empty:
                check_value(default, hint, name)
