"""What the type hints of a configuration say: which sections and tables of types are below a key, and the defaults."""
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from torch import nn

from models import Detector
from models.build import OneOf, full_name, parameters, split_options


def leaves(hint: Any) -> Iterator[Any]:
    """The plain types and the tables of types in a type hint."""
    if get_origin(hint) is Annotated:
        plain, mark = get_args(hint)
        yield from [mark] if isinstance(mark, OneOf) else leaves(plain)
    elif get_origin(hint) is None or get_origin(hint) is Literal:
        yield hint
    else:
        for part in get_args(hint):
            yield from leaves(part)


def is_section(hint: Any) -> bool:
    """Whether a type hint stands for a mapping with the arguments of its class."""
    return inspect.isclass(hint) and hint not in (str, bool, int, float, dict, type(None)) and not is_given(hint)


def is_given(hint: Any) -> bool:
    """Whether only the program can give such a value, because it is a network."""
    return hint in (Detector, nn.Module)


def default_of(call: Callable, name: str) -> Any:
    """The default of an argument; inspect.Parameter.empty without one."""
    if dataclasses.is_dataclass(call):  # its signature does not show what a factory returns
        field = next(field for field in dataclasses.fields(call) if field.name == name)
        if field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
    return parameters(call)[name][1]


def with_defaults(call: Callable, given: Mapping, choice: OneOf | None = None) -> dict[str, Any]:
    """The arguments of a section or component as written, with the defaults of all others, also in those below.

    Arguments that the program derives are left out unless they are given; unknown ones stay as they are.

    Args:
        choice: the table of types that lists `call`.
    """
    given = {full_name(name, parameters(call)): value for name, value in given.items()}
    hints = {name: hint for name, (hint, _) in parameters(call).items()
             if name in given or not (choice and name in choice.derived)}
    values = {name: default_of(call, name) for name in hints} | given
    return {name: _filled(value, hints.get(name, Any)) for name, value in values.items()}


def _filled(value: Any, hint: Any) -> Any:
    """A value with the defaults of the sections and components in it; tuples become lists."""
    if isinstance(value, (list, tuple)):
        return [_filled(each, hint) for each in value]
    if value is inspect.Parameter.empty:
        return None
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if not isinstance(value, Mapping):
        return value
    for leaf in leaves(hint):
        if isinstance(leaf, OneOf):
            kind = {"type": value.get("type", leaf.default)}
            options, own = split_options(value, leaf.common)
            common = with_defaults(leaf.common, options) if leaf.common else {}
            known = leaf.table.get(kind["type"])
            return kind | common | (with_defaults(known, own, leaf) if known else own)
        if is_section(leaf):
            return with_defaults(leaf, value)
    return dict(value)
