"""The file of a search: which settings it may change, and what it may cost."""
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

from data.config import Split
from data.errors import shown
from data.extras import check_installed
from data.ranges import Count, Range, Seed, Some
from models import ConfigError
from models.build import read_section

from ..checks import check_files
from ..config import Config, override_config
from ..config.load import place_data, read_with_bases, read_yaml
from ..work_dir.records import setting
from .sweep import without_checkpoints

CHOICE, RANGES = "choice", ("log", "uniform", "int")
# What the search sets itself, or what must stay the same for all.
OWN = {"train.epochs": "the search sets it; the full length is that of --cfg",
       "train.seed": "the search sets it: give seed and seeds of this file",
       "train.patience": "it would end runs early, and runs of one length are compared: set it in --cfg",
       "data.val": "all candidates must be judged on the same images: set it in --cfg",
       "eval": "all candidates must be judged in the same way: set it in --cfg"}
Amount = Annotated[float, Range(0, 10_000, open=True)]
PARTS = 4    # of a range, from which draws come in turn
TRIES = 200  # draws without a new candidate, after which a space is taken to have no more

Pick = Callable[[str, int], int]                       # name, number of options -> one of them
Between = Callable[[str, str, float, float], float]    # name, kind, low, high -> a number


@dataclass
class Budget:
    """What the whole search may cost, with the runs on fresh seeds."""

    runs: Amount | None = None   # as much as so many runs of full length; a shorter one counts by its epochs
    hours: Amount | None = None  # as many hours on this machine, by the time of a first short run

    def __post_init__(self):
        if (self.runs is None) == (self.hours is None):
            raise ConfigError("budget", "give either runs or hours, for example budget: {runs: 20}")


@dataclass
class SearchConfig:
    """A file for `sweep.py --search`."""

    space: dict                # keys of the configuration, and what their values may be
    budget: Budget
    test: Split | None = None  # images that decide at the end, once
    seed: Seed = 0             # of the draws, and of all runs before the winner is known
    seeds: Some[Seed] = field(default_factory=lambda: [1, 2, 3])  # fresh ones, for the winner and its rivals
    against: Some[Literal["alone", "base"]] | None = None  # rivals: without distillation, --cfg as it is; null: both
    reduction: Annotated[int, Range(2, 10)] = 3  # one of so many goes on, with so many times the epochs
    shortest: Count | None = None  # epochs of the shortest runs; null: a ninth of train.epochs
    engine: Literal["halving", "optuna"] = "halving"  # what draws candidates and stops them; optuna needs its extra
    storage: str | None = None     # optuna: the address of its database; null: optuna.db in the work dir

    def __post_init__(self):
        if len(set(self.seeds)) < len(self.seeds) or self.seed in self.seeds:
            raise ConfigError("seeds", f"must be fresh: each once, and not {self.seed}, with which the search chooses")
        if self.storage is not None and self.engine != "optuna":
            raise ConfigError("storage", "is of use only with engine: optuna")
        if not self.space:
            raise ConfigError("space", "is empty: name keys of the configuration, and what each may be")
        for key, node in self.space.items():
            check_key(key, list(self.space))
            check_node(node, f"space.{key}")
        if all(len(list(variants(node))) == 1 for node in self.space.values()):
            raise ConfigError("space", "has only one candidate: give a choice, or a range (log, uniform, int)")


def check_key(key: Any, keys: list) -> None:
    """Raise ConfigError for a key that a space cannot have, or that a later key would replace."""
    where = f"space.{key}"
    if not isinstance(key, str):
        raise ConfigError(where, "must be a key of the configuration, for example optimizer.lr")
    for own, why in OWN.items():
        if key == own or key.startswith(f"{own}.") or own.startswith(f"{key}."):
            raise ConfigError(where, f"cannot be searched{'' if key == own else f', because of {own}'}: {why}")
    after = keys[keys.index(key) + 1:]
    if above := next((other for other in after if key.startswith(f"{other}.")), None):
        raise ConfigError(where, f"would be replaced by {above}, which comes later: put it below that key, or after it")


def kind_of(node: Any) -> str | None:
    """`choice` or the kind of range, for a mapping that stands for a value to be drawn."""
    return next((kind for kind in (CHOICE, *RANGES) if isinstance(node, dict) and kind in node), None)


def check_node(node: Any, key: str) -> None:
    """Raise ConfigError for a choice or a range that cannot be drawn from, in a value or below it."""
    kind = kind_of(node)
    if kind is None:
        entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for name, value in entries:
            check_node(value, f"{key}.{name}")
        return
    if len(node) > 1:
        raise ConfigError(key, f"{kind} must be the only key of its mapping, and here are {', '.join(map(str, node))}")
    given, key = node[kind], f"{key}.{kind}"
    if kind == CHOICE:
        if not isinstance(given, list) or not given:
            raise ConfigError(key, f"must be a list of at least one value, not {shown(given)}")
        for i, option in enumerate(given):
            check_node(option, f"{key}.{i}")
        return
    allowed = (int,) if kind == "int" else (int, float)
    if not isinstance(given, list) or len(given) != 2 or not all(type(value) in allowed for value in given):
        raise ConfigError(key, f"must be [lowest, highest], two {'integers' if kind == 'int' else 'numbers'}, not "
                               f"{shown(given)}")
    if not given[0] < given[1] or (kind == "log" and given[0] <= 0):
        raise ConfigError(key, f"must rise{' from above 0' if kind == 'log' else ''}, and {shown(given)} does not")


def drawn(node: Any, name: str, pick: Pick, between: Between) -> Any:
    """A value of the space: every choice and range in a node is replaced by what `pick` and `between` draw."""
    kind = kind_of(node)
    if kind == CHOICE:
        chosen = pick(name, len(node[kind]))
        return drawn(node[kind][chosen], f"{name}/{chosen}", pick, between)
    if kind:
        return between(name, kind, *node[kind])
    if isinstance(node, dict):
        return {key: drawn(value, f"{name}.{key}", pick, between) for key, value in node.items()}
    if isinstance(node, list):
        return [drawn(value, f"{name}.{i}", pick, between) for i, value in enumerate(node)]
    return node


def draw(space: dict, pick: Pick, between: Between) -> dict[str, Any]:
    """The settings of a candidate, by key of the configuration."""
    return {key: drawn(node, key, pick, between) for key, node in space.items()}


def variants(node: Any) -> Iterator[Any]:
    """Values that together have every option of each choice, and both ends of each range, of a node."""
    kind = kind_of(node)
    if kind == CHOICE:
        for option in node[kind]:
            yield from variants(option)
    elif kind:
        yield from node[kind]
    elif isinstance(node, (dict, list)) and node:
        entries = node.items() if isinstance(node, dict) else enumerate(node)
        several = {name: list(variants(value)) for name, value in entries}
        first = {name: values[0] for name, values in several.items()}
        found = [first, *(first | {name: value} for name, values in several.items() for value in values[1:])]
        yield from found if isinstance(node, dict) else map(list, map(dict.values, found))
    else:
        yield node


class Draws:
    """Random draws in which the options of a choice, and the parts of a range, come equally often."""

    def __init__(self, seed: int):
        self.random, self.decks = Random(seed), {}

    def pick(self, name: str, count: int) -> int:
        deck = self.decks.setdefault(name, [])
        if not deck:
            deck += self.random.sample(range(count), count)
        return deck.pop()

    def between(self, name: str, kind: str, low: float, high: float) -> float:
        place = (self.pick(name, PARTS) + self.random.random()) / PARTS
        if kind == "int":
            return low + int(place * (high - low + 1))
        return brief(low * (high / low) ** place if kind == "log" else low + place * (high - low), low, high)


def brief(value: float, low: float, high: float) -> float:
    """A number with three digits, which people can read and write, within its range."""
    return min(max(float(f"{value:.3g}"), low), high)


class Base:
    """The configuration of --cfg, read once, and what it becomes with other settings."""

    def __init__(self, cfg: Path, overrides: Sequence[str]):
        self.cfg, self.overrides = cfg, list(overrides)
        self._tree, self._sources = read_with_bases(cfg)
        self.config = self.with_settings({})

    def with_settings(self, settings: dict, more: Sequence[str] = ()) -> Config:
        """Raises ConfigError as `load_config`."""
        return override_config(copy.deepcopy(self._tree), dict(self._sources),
                               [*self.overrides, *as_overrides(settings), *more], str(self.cfg))


def as_overrides(settings: dict) -> list[str]:
    """Settings as `key=value`, as scripts take them; JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def read_tree(path: Path) -> dict:
    """The file of a search as it is written, with the paths of `test` in their place."""
    tree = read_yaml(path)
    place_data({"data": {"test": tree.get("test")}}, path.parent)
    return tree


def read_search(path: Path) -> SearchConfig:
    """Read the file of a search.

    Raises:
        ConfigError: an unknown key, a wrong value, or a space without candidates.
    """
    try:
        return read_section(SearchConfig, read_tree(path), "")
    except ConfigError as error:
        raise ConfigError(error.key, f"{error.problem} ({path})") from None


def check_search(cfg: Path, path: Path, overrides: Sequence[str], teacher: Path | None = None) -> None:
    """Check the file of a search against the configuration: each option of a choice, and both ends of each range.

    Raises:
        ConfigError, DataError, CheckpointError: what is wrong, and in which file.
    """
    search, base = read_search(path), Base(cfg, overrides)
    if search.engine == "optuna":
        check_installed("optuna", "search", f"engine: optuna ({path})")
    needed = ("train", "val", "init")
    data, shortest = base.config.data, search.shortest
    if data is None or data.val is None:
        raise ConfigError("data.val", f"missing in {cfg}: the search chooses by it")
    if shortest is not None and shortest > base.config.train.epochs:
        raise ConfigError("shortest", f"must be at most {base.config.train.epochs}, train.epochs of {cfg}, not "
                                      f"{shortest} ({path})")
    if search.test is not None:
        if search.test.annotations == data.val.annotations:
            raise ConfigError("test", "has the annotations of data.val, by which the search chooses: give others, or "
                                      f"remove it ({path})")
        search.test.check_paths()
    for settings in variants(search.space):
        config = with_settings_of(base, settings, path)
        check_files(without_checkpoints(config) if teacher else config, needed)


def with_settings_of(base: Base, settings: dict, path: Path) -> Config:
    try:
        return base.with_settings(settings)
    except ConfigError as error:
        raise ConfigError(error.key, f"{error.problem}: {path} does not fit {base.cfg}") from None


def candidates(base: Base, search: SearchConfig, count: int) -> list[dict]:
    """Up to `count` different settings: none, which is the base configuration itself, and drawn ones."""
    draws, found, known, missed = Draws(search.seed), {setting(base.config): {}}, set(), 0
    while len(found) < count and missed < TRIES:
        settings = draw(search.space, draws.pick, draws.between)
        before, text = len(found), json.dumps(settings)
        if text not in known:
            known.add(text)
            found.setdefault(setting(base.with_settings(settings)), settings)
        missed = 0 if len(found) > before else missed + 1
    return list(found.values())
