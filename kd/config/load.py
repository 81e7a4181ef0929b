"""Configuration files: YAML with inheritance and overrides."""
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from models import ConfigError
from models.build import nearest

from .config import Config, parse_config


class Yaml12Loader(yaml.SafeLoader):
    """Safe YAML whose plain words and numbers are YAML 1.2's: `off` is a word, `1e-3` is a number."""


Yaml12Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers
            if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:int",
                           "tag:yaml.org,2002:timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}
Yaml12Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"),
                                   list("tTfF"))
Yaml12Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9]*)$"),
                                   list("-+0123456789"))
Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?((\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, its `_base_` files and `key=value` overrides, and check all of it.

    Raises:
        ConfigError: a file that is missing or not YAML, an unknown key, a wrong type, a missing value. The message is
            one line with the key, the file that says it and the nearest valid name.
    """
    cfg, sources = read_with_bases(Path(path))
    for override in overrides:
        apply_override(cfg, sources, override)
    try:
        return parse_config(cfg)
    except ConfigError as error:
        raise ConfigError(error.key, f"{error.problem} ({source_of(error.key, sources, str(path))})") from None


def read_with_bases(path: Path, inside: tuple[Path, ...] = ()) -> tuple[dict, dict[str, str]]:
    """A file merged over its `_base_` files, and for every dotted key the file that said it."""
    if path.resolve() in inside:
        raise ConfigError("_base_", f"{path} inherits from itself")
    cfg = read_yaml(path)
    bases = cfg.pop("_base_", [])
    merged, sources = {}, {}
    for base in [bases] if isinstance(bases, str) else bases:
        below, below_sources = read_with_bases(path.parent / base, inside + (path.resolve(),))
        merged = merge(merged, below)
        sources |= below_sources
    sources |= {key: str(path) for key in dotted_keys(cfg)}
    return merge(merged, cfg), sources


def read_yaml(path: Path) -> dict:
    """One YAML file as a dictionary."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise ConfigError("", f"configuration file {path} {reason}") from None
    return parse_yaml(text, str(path), dict) or {}


def parse_yaml(text: str, where: str, kind: type = object) -> Any:
    """YAML text; an error in one line."""
    try:
        value = yaml.load(text, Loader=Yaml12Loader)
        dotted_keys(value)
    except RecursionError:
        raise ConfigError("", f"{where} is nested too deeply, or holds itself") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError("", f"{where}{line} is not valid YAML: {getattr(error, 'problem', error)}") from None
    if value is not None and not isinstance(value, kind):
        raise ConfigError("", f"{where} must hold keys and values at its top, not {type(value).__name__}")
    return value


def merge(base: Any, over: Any) -> Any:
    """`over` upon `base`: mappings are merged key by key, all else is replaced; so is a mapping of another `type`."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "type" in over and "type" in base and over["type"] != base["type"]:
        return over
    return base | {key: merge(base[key], value) if key in base else value for key, value in over.items()}


def dotted_keys(cfg: Any, prefix: str = "") -> list[str]:
    """Every key of a tree, as `model.head.type`; entries of lists by their number."""
    entries = cfg.items() if isinstance(cfg, dict) else enumerate(cfg) if isinstance(cfg, list) else ()
    keys = []
    for name, value in entries:
        keys += [f"{prefix}{name}"] + dotted_keys(value, f"{prefix}{name}.")
    return keys


def source_of(key: str, sources: dict[str, str], default: str) -> str:
    """Where a key, or the nearest key above it, was said."""
    while key:
        if key in sources:
            return sources[key]
        key = key.rpartition(".")[0]
    return default


def apply_override(cfg: dict, sources: dict[str, str], override: str) -> None:
    """Set `a.b.0.c=value` in a tree; the value is YAML. Mappings on the way are made, list entries must exist."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError("", f'override "{override}" is not of the form key=value')
    node: Any = cfg
    *above, last = key.split(".")
    for i, name in enumerate(above):
        if isinstance(node, dict) and not isinstance(node.get(name), (dict, list)):
            node[name] = {}
        node = node[position(node, name, ".".join(above[:i]), override)]
    node[position(node, last, ".".join(above), override)] = parse_yaml(text, f'override "{override}"')
    sources[key] = f'override "{override}"'


def position(node: dict | list, name: str, key: str, override: str) -> str | int:
    """What `name` indexes in a node: a mapping's key or a list's number."""
    if isinstance(node, dict):
        return name
    if not name.isdigit() or int(name) >= len(node):
        entries = nearest(name, map(str, range(len(node))))
        raise ConfigError(key, f'override "{override}" must name an entry of this list; {entries}')
    return int(name)
