"""Builds objects from a configuration. Tables list the classes that a `type` may name, and signatures the arguments.

A section is a dataclass. A component, which may have several types, stays a mapping until it is built: its annotation,
`Annotated[dict, OneOf(ASSIGNERS)]`, names the table. `Annotated[float, Range(0, 1)]` is a number within a range. One
walk over the signatures checks a whole configuration and creates its sections before anything is built.
"""
import difflib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from sys import float_info
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from data.errors import one_line, shown
from data.ranges import OneOf, Table
from losses import LOSSES

FLOAT32 = 1.2e-38, 3.4e38  # the range of PyTorch's numbers, apart from 0: others become 0 or infinite
LONGEST_PROBLEM = 2000

# Short spellings of the references' argument names.
ALIASES = {"norm": "norm_cfg", "act": "act_cfg", "upsample": "upsample_cfg"}


class ConfigError(ValueError):
    """A configuration that cannot be used. `key` is the dotted path of what is wrong."""

    exit_code = 2

    def __init__(self, key: str, problem: str):
        self.key, self.problem = key, one_line(problem, LONGEST_PROBLEM)
        super().__init__(f"{one_line(key)}: {self.problem}" if key else self.problem)


def nearest(name: str, valid: Iterable[str]) -> str:
    """Advice on a wrong name: the nearest valid one, or all of them if none is near."""
    valid = sorted(valid)
    folded = {word.lower(): word for word in valid}
    close = difflib.get_close_matches(str(name).lower(), folded, n=1)
    return f'did you mean "{folded[close[0]]}"?' if close else "valid: " + ", ".join(valid)


@cache
def parameters(call: Callable) -> dict[str, tuple[Any, Any]]:
    """The parameters of a class or function: name -> (type hint, default; inspect.Parameter.empty without one)."""
    function = call.__init__ if inspect.isclass(call) else call
    hints = get_type_hints(function, include_extras=True)
    found = inspect.signature(function).parameters.values()
    gathering = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # a class without __init__ has them
    return {p.name: (hints.get(p.name, Any), p.default) for p in found if p.name != "self" and p.kind not in gathering}


def full_name(name: str, known: Iterable[str]) -> str:
    """The name of an argument, from its short spelling or itself; a name that is `known` is never a short spelling."""
    return name if name in known else ALIASES.get(name, name)


def read_section(section: type, args: Any, key: str) -> Any:
    """Make the dataclass `section`, and the sections in it, from a mapping; a section is returned as it is.

    Raises:
        ConfigError: see `check_arguments`, or from the section itself.
    """
    if isinstance(args, section):
        return args
    checked = check_arguments(section, args, key)
    try:
        return section(**checked)
    except ConfigError as error:  # it may name the option alone
        name = error.key.removeprefix(f"{key}.")
        raise ConfigError(f"{key}.{name}" if key else name, error.problem) from None


def check_arguments(call: Callable, args: Any, key: str, derived: Iterable[str] = (),
                    beside: Iterable[str] = ()) -> dict[str, Any]:
    """Check that `call(**args)` makes sense.

    Args:
        key: where the arguments stand in the configuration, for messages.
        derived: parameters that the program itself gives.
        beside: other names that are valid in the same place, only for advice.
    Returns:
        The arguments, see `check_value`.
    Raises:
        ConfigError: an unknown argument, a value of the wrong type, or a missing required argument.
    """
    if not isinstance(args, dict):
        raise ConfigError(key, f"must be a mapping of keys to values, not {describe(args)}")
    known = {name: hint for name, (hint, _) in parameters(call).items() if name not in derived or name in args}
    read = {}
    for name, value in args.items():
        path = f"{key}.{name}" if key else str(name)
        full = full_name(name, known)
        if full not in known:
            raise ConfigError(path, f"unknown key; {nearest(name, [*known, *beside])}")
        read[name] = check_value(value, known[full], path)
    given = {full_name(name, known) for name in args} | set(derived)
    for name, (_, default) in parameters(call).items():
        if default is inspect.Parameter.empty and name not in given:
            raise ConfigError(f"{key}.{name}" if key else name, "missing; it has no default")
    return read


def check_component(cfg: Any, choice: OneOf, key: str) -> None:
    """Check a `{type: ..., argument: value}` mapping against the class that its type names."""
    table = choice.table
    kind = cfg.get("type", choice.default) if isinstance(cfg, dict) else None
    if kind is None:
        raise ConfigError(key, f"must be a mapping with a type; {nearest('', table)}")
    if not isinstance(kind, str) or kind not in table:
        raise ConfigError(f"{key}.type", f'unknown type "{one_line(str(kind))}"; {nearest(kind, table)}')
    if choice.takes and table[kind].takes not in choice.takes:
        fitting = ", ".join(name for name, each in table.items() if each.takes in choice.takes)
        raise ConfigError(f"{key}.type", f"{kind} compares {table[kind].takes}, and here {' or '.join(choice.takes)} "
                                         f"are compared; use {fitting}")
    options, args = split_options(cfg, choice.common)
    if choice.common is not None:
        read_section(choice.common, options, key)
    check_arguments(table[kind], args, key, choice.derived, parameters(choice.common) if choice.common else ())
    if choice.light:
        make(table[kind], args, key)


def split_options(cfg: dict, common: type | None) -> tuple[dict, dict]:
    """Split a `{type: ...}` mapping into the options in `common` and the own arguments of its type."""
    shared = set(parameters(common)) if common is not None else set()
    return ({k: v for k, v in cfg.items() if k in shared},
            {k: v for k, v in cfg.items() if k not in shared and k != "type"})


def describe(value: Any) -> str:
    """A value and its kind, for a message."""
    kinds = {bool: "true/false", int: "an integer", float: "a number", str: "text", dict: "a mapping",
             list: "a list", tuple: "a list"}
    if value is None:
        return "null"
    if type(value) not in kinds:  # a tensor in a checkpoint, for example
        return type(value).__name__
    return f"{kinds[type(value)]} ({shown(value)})"


def choices(hint: Any) -> list[str]:
    """The values of a Literal, as they are written in a configuration."""
    return [str(value).lower() if isinstance(value, bool) else str(value) for value in get_args(hint)]


def check_value(value: Any, hint: Any, key: str) -> Any:
    """Check one value against one type hint.

    Returns:
        The value; for a mapping, a section if the hint is a dataclass; for a list, a tuple if the hint is one.
    Raises:
        ConfigError: it does not fit.
    """
    origin = get_origin(hint)
    if origin is Annotated:
        plain, mark = get_args(hint)
        if isinstance(mark, OneOf):
            check_component(value, mark, key)
        else:
            value = check_value(value, plain, key)
            if value not in mark:
                raise ConfigError(key, f"must be {mark}, not {shown(value)}")
    elif origin in (Union, types.UnionType):
        return _check_union(value, get_args(hint), key)
    if origin is Literal:
        if not any(value == each and type(value) is type(each) for each in get_args(hint)):  # True == 1
            raise ConfigError(key, f"must be one of {', '.join(choices(hint))}, not {describe(value)}")
    elif inspect.isclass(origin) and issubclass(origin, Sequence):
        return _check_sequence(value, hint, key)
    elif hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(key, f"must be a number, not {describe(value)}")
        if not abs(value) <= float_info.max:  # also for integers that are too large for a float
            raise ConfigError(key, f"must be a finite number, not {shown(value)}")
        if value and not FLOAT32[0] <= abs(value) <= FLOAT32[1]:
            raise ConfigError(key, f"must be a number that fits into 32 bits, from {FLOAT32[0]} to {FLOAT32[1]}, not "
                                   f"{shown(value)}")
    elif hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(key, f"must be an integer, not {describe(value)}")
        if abs(value) >= 2 ** 32:  # products of several must stay within the 64 bits of PyTorch's sizes
            raise ConfigError(key, f"must be an integer of at most 32 bits, not {shown(value)}")
    elif is_dataclass(hint):
        return read_section(hint, value, key)
    elif inspect.isclass(hint) and not isinstance(value, hint):
        if hint not in (str, bool, dict, type(None)):  # a class that is built later, from the mapping
            check_arguments(hint, value, key)
            return value
        names = {str: "text", bool: "true or false", dict: "a mapping", type(None): "null"}
        raise ConfigError(key, f"must be {names[hint]}, not {describe(value)}")
    return value


def _check_union(value: Any, choices: tuple, key: str) -> Any:
    if value is None and type(None) in choices:
        return None
    choices = [c for c in choices if c is not type(None)]
    if isinstance(value, (int, float)):  # for a number out of range, it is no help that a mapping could be here, too
        choices = [c for c in choices if c in (int, float) or get_args(c)[:1] in ((int,), (float,))] or choices
    errors = []
    for choice in choices:
        try:
            return check_value(value, choice, key)
        except ConfigError as error:
            errors.append(error)
    deepest = max(len(error.key) for error in errors)  # an error deeper in the tree says more than "does not fit"
    errors = [error for error in errors if len(error.key) == deepest]
    raise ConfigError(errors[0].key, ", or ".join(error.problem for error in errors))


def _check_sequence(value: Any, hint: Any, key: str) -> Sequence:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(key, f"must be a list, not {describe(value)}")
    items = get_args(hint)
    if get_origin(hint) is tuple and items[-1] is not Ellipsis:
        if len(value) != len(items):
            raise ConfigError(key, f"must have {len(items)} entr{'y' if len(items) == 1 else 'ies'}, not {len(value)}")
    else:
        items = items[:1] * len(value)
    read = [check_value(item, item_hint, f"{key}.{i}") for i, (item, item_hint) in enumerate(zip(value, items))]
    return tuple(read) if get_origin(hint) is tuple else read


def build(cfg: dict, table: Table, key: str, **derived: Any) -> Any:
    """Build what `cfg` describes: call `table[cfg["type"]]` with its other entries, and with `derived` for the rest.

    Raises:
        ConfigError: naming the key that is unknown, missing, of the wrong type, or refused by the constructor.
    """
    check_component(cfg, OneOf(table, *derived), key)
    call = table[cfg["type"]]
    args = {full_name(k, parameters(call)): v for k, v in cfg.items() if k != "type"}
    return make(call, args | {k: v for k, v in derived.items() if k in parameters(call) and args.get(k) is None}, key)


def make(call: Callable, args: Mapping[str, Any], key: str) -> Any:
    """Call a constructor. If it refuses an argument, it names it (for example `num_outs`); `key` is put before it."""
    try:
        return call(**args)
    except ConfigError as error:
        raise ConfigError(".".join(filter(None, [key, error.key])), error.problem) from None
    except ValueError as error:
        raise ConfigError(key, str(error)) from None


def build_loss(cfg: dict, key: str, takes: Sequence[str] = ()) -> Any:
    """Build the loss that `cfg` describes; `takes` as for `OneOf`.

    Raises:
        ConfigError: see `build`, or a loss that takes something else.
    """
    check_component(cfg, OneOf(LOSSES, takes=takes), key)
    return build(cfg, LOSSES, key)
