"""Configuration files: YAML with inheritance and overrides."""
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data import find_data
from data.errors import one_line, shown
from data.output import reason_of
from models import ConfigError
from models.build import describe, nearest

from .config import Config, parse_config

MAX_ENTRIES = 100_000  # of a configuration file
TAG = "tag:yaml.org,2002:"
PLAIN = {  # YAML 1.2's words and numbers: a pattern, and the characters that can come first
    "bool": (r"^(true|True|TRUE|false|False|FALSE)$", "tTfF"), "int": (r"^[-+]?(0|[1-9][0-9]*)$", "-+0123456789"),
    "float": (r"^[-+]?((\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
              "-+.0123456789")}


class Yaml12Loader(yaml.SafeLoader):
    """Reads YAML safely, with the plain words and numbers of YAML 1.2: `off` is a word, `1e-3` is a number."""

    def get_single_node(self) -> yaml.Node | None:
        """The document, if its aliases do not repeat a few lines a million times."""
        node = super().get_single_node()
        if node is not None and expanded_size(node, {}) > MAX_ENTRIES:
            raise yaml.YAMLError(f"its aliases (*name) expand to more than {MAX_ENTRIES} entries")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; an error of YAML, too, for text that its tag or its length does not allow: `!!int x`."""
        try:
            return super().construct_object(node, deep)
        except (AttributeError, KeyError, ValueError):
            kind = node.tag.removeprefix(TAG)
            raise yaml.constructor.ConstructorError(None, None, f"{shown(node.value)} cannot be read as {kind}",
                                                    node.start_mark) from None


def expanded_size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many entries a document has if every alias is written out; `known` has those of nodes by identity."""
    if id(node) not in known:
        known[id(node)] = 0  # for a node that contains itself, which is refused later
        inner = node.value if isinstance(node.value, list) else []
        parts = [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(expanded_size(part, known) for part in parts)
    return known[id(node)]


Yaml12Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(TAG) not in (*PLAIN, "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for kind, (pattern, first) in PLAIN.items():
    Yaml12Loader.add_implicit_resolver(TAG + kind, re.compile(pattern), list(first))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, its `_base_` files and `key=value` overrides, and check all of it.

    Raises:
        ConfigError: a file that is missing or not YAML, an unknown key, a wrong type, a missing value. The message is
            one line with the key, the file that sets it and the nearest valid name.
    """
    return override_config(*read_with_bases(Path(path)), overrides, str(path))


def override_config(cfg: dict, sources: dict[str, str], overrides: Sequence[str], origin: str) -> Config:
    """Apply `key=value` overrides to a tree, which they change, and check all of it; errors as in `load_config`.

    Args:
        sources: the file that sets each dotted key.
        origin: where keys are from that `sources` does not have.
    """
    for override in overrides:
        apply_override(cfg, sources, override)
    place_data(cfg, Path())  # those of overrides; the files' paths have their place
    try:
        return parse_config(cfg)
    except ConfigError as error:
        raise ConfigError(error.key, f"{error.problem} ({source_of(error.key, sources, origin)})") from None


def read_with_bases(path: Path, inside: tuple[Path, ...] = ()) -> tuple[dict, dict[str, str]]:
    """A file merged over its `_base_` files, and for every dotted key the file that sets it."""
    cfg, place = read_yaml(path), path.resolve()
    if place in inside:
        raise ConfigError("_base_", f"{path} inherits from itself")
    place_data(cfg, path.parent)
    bases = cfg.pop("_base_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError("_base_", f"must be a path or a list of paths, not {describe(bases)} ({path})")
    merged, sources = {}, {}
    for base in bases:
        below, below_sources = read_with_bases(path.parent / base, inside + (place,))
        merged = merge(merged, below)
        sources |= below_sources
    sources |= {key: str(path) for key in dotted_keys(cfg)}
    return merge(merged, cfg), sources


def place_data(cfg: dict, folder: Path) -> None:
    """Write out the data paths of a file in `folder`: `./` becomes this folder, and a list its first path that exists.

    If none exists, the list becomes its first path, which the error then names. Of data.unlabelled, all paths are used.
    """
    data = cfg.get("data")
    splits = [(name, split) for name, value in (data.items() if isinstance(data, dict) else ())
              for split in (value if isinstance(value, list) else [value])]  # data.train may be a list
    for name, split in splits:
        for key in ("images", "annotations"):
            paths = split.get(key) if isinstance(split, dict) else None
            paths = [paths] if isinstance(paths, str) else paths
            if isinstance(paths, list) and paths and all(isinstance(path, str) for path in paths):
                placed = [os.path.abspath(folder / path) if path.startswith("./") else path for path in paths]
                split[key] = placed if name == "unlabelled" and len(placed) > 1 else next(
                    (path for path in placed if find_data(path).exists()), placed[0])


def read_yaml(path: Path) -> dict:
    """One YAML file as a dictionary."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("", f"configuration file {path} does not exist") from None
    except (OSError, ValueError) as error:  # also for text that is not UTF-8, and for a path that cannot be one
        reason = reason_of(error) if isinstance(error, OSError) else error
        raise ConfigError("", f"configuration file {path} cannot be read: {reason}") from None
    return parse_yaml(text, str(path), dict) or {}


def parse_yaml(text: str, where: str, kind: type = object) -> Any:
    """The value of a YAML text; an error is one line."""
    try:
        value = yaml.load(text, Loader=Yaml12Loader)
        dotted_keys(value)
    except RecursionError:
        raise ConfigError("", f"{where} is nested too deeply, or contains itself") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError("", f"{where}{line} is not valid YAML: {getattr(error, 'problem', error)}") from None
    if value is not None and not isinstance(value, kind):
        raise ConfigError("", f"{where} must have keys and values at its top level, not {type(value).__name__}")
    return value


def merge(base: Any, over: Any) -> Any:
    """`over` merged into `base`: mappings key by key; other values, and mappings of another `type`, are replaced."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "type" in over and "type" in base and over["type"] != base["type"]:
        return over
    return base | {key: merge(base[key], value) if key in base else value for key, value in over.items()}


def dotted_keys(cfg: Any, prefix: str = "") -> list[str]:
    """All keys of a tree as dotted paths, for example `model.head.type`; list entries are numbered."""
    entries = cfg.items() if isinstance(cfg, dict) else enumerate(cfg) if isinstance(cfg, list) else ()
    keys = []
    for name, value in entries:
        keys += [f"{prefix}{name}"] + dotted_keys(value, f"{prefix}{name}.")
    return keys


def source_of(key: str, sources: dict[str, str], default: str) -> str:
    """The file or override that sets a key, or the nearest key above it."""
    while key:
        if key in sources:
            return sources[key]
        key = key.rpartition(".")[0]
    return default


def apply_override(cfg: dict, sources: dict[str, str], override: str) -> None:
    """Apply `a.b.0.c=value` to a tree; the value is YAML. Missing mappings are created, list entries must exist."""
    key, equals, text = override.partition("=")
    said = f'override "{one_line(override)}"'
    if not equals or not key:
        raise ConfigError("", f"{said} is not of the form key=value")
    node: Any = cfg
    *above, last = key.split(".")
    for i, name in enumerate(above):
        if isinstance(node, dict) and not isinstance(node.get(name), (dict, list)):
            node[name] = {}
        node = node[position(node, name, ".".join(above[:i]), said)]
    node[position(node, last, ".".join(above), said)] = parse_yaml(text, said)
    for below in [key, *(each for each in sources if each.startswith(f"{key}."))]:
        sources[below] = said


def position(node: Any, name: str, key: str, said: str) -> str | int:
    """The index for `name` in a node: the key of a mapping, or the number of a list entry."""
    if isinstance(node, dict):
        return name
    if not isinstance(node, list):
        raise ConfigError(key, f"{said} names a part of a single value; leave out .{name}")
    if name not in map(str, range(len(node))):
        entries = nearest(name, map(str, range(len(node))))
        raise ConfigError(key, f"{said} must name an entry of this list; {entries}")
    return int(name)
