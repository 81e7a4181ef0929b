"""The configuration reference: every key of a configuration, from the signatures that it is checked against."""
import dataclasses
import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from data.ranges import NotEmpty
from models.build import ALIASES, OneOf, choices, parameters

from .config import Config
from .hints import default_of, is_given, is_section, leaves
from .resume import rule_of

INTRODUCTION = f"""# Configuration reference

Every key that a configuration may have, its type and its default. `python scripts/write_reference.py` writes this page
from the signatures that configurations are checked against; the tests fail when it is out of date.

A default of "-" means that the key is required. "derived" means that it follows from other parts unless it is given.
The column "resume" says what a resumed run does if the value is not that of its checkpoint: "take" the new value, take
it and "warn" with both values in the log, or "refuse" to start. Two words: it depends on where the key is.
{", ".join(f"`{short}`" for short in ALIASES)} are short for {", ".join(f"`{full}`" for full in ALIASES.values())},
unless a type has an argument with the short name itself.
"""


def configuration_reference() -> str:
    """The page, in markdown."""
    places = collect(Config)
    blocks = [INTRODUCTION.strip()]
    for call, paths in places.sections.items():
        blocks += [f"## {section_heading(paths)}", summary(call), arguments(call, places, paths)]
    for choice, paths in places.tables.values():
        blocks += [f"## {table_heading(paths)}", f"For {', '.join(f'`{path}`' for path in paths)}."]
        if choice.common is not None:
            blocks += [summary(choice.common), arguments(choice.common, places, paths)]
        documented: dict[Callable, str] = {}
        for name, call in choice.table.items():
            blocks.append(f"### `type: {name}`" + (" (the default)" if name == choice.default else ""))
            if call in documented:
                blocks.append(f"As `{documented[call]}`.")
            else:
                documented[call] = name
                blocks += [summary(call), arguments(call, places, paths, choice)]
    return "\n\n".join(block for block in blocks if block) + "\n"


@dataclasses.dataclass
class Places:
    """The sections and tables of types in a configuration, and the dotted keys where they are used."""

    sections: dict[Callable, list[str]] = dataclasses.field(default_factory=dict)
    tables: dict[int, tuple[OneOf, list[str]]] = dataclasses.field(default_factory=dict)  # by the table's identity


def collect(root: Callable) -> Places:
    """Every section and table of types in a section and below, the upper ones first."""
    places = Places({root: [""]})
    pending = [("", root)]
    while pending:
        where, current = pending.pop(0)
        for name, (hint, _) in parameters(current).items():
            key = f"{where}.{name}" if where else name
            for leaf in leaves(hint):
                if isinstance(leaf, OneOf):
                    _, paths = places.tables.setdefault(id(leaf.table), (leaf, []))
                    inner = [*leaf.table.values(), *filter(None, [leaf.common])]
                elif is_section(leaf):
                    paths, inner = places.sections.setdefault(leaf, []), [leaf]
                else:
                    continue
                if not paths:
                    pending += [(key, each) for each in inner]
                if key not in paths:
                    paths.append(key)
    return places


def arguments(call: Callable, places: Places, paths: Sequence[str], choice: OneOf | None = None) -> str:
    """A markdown table of the arguments of a class or function.

    Args:
        paths: the keys where it is used.
        choice: the table of types that lists it.
    """
    described = descriptions(call, choice.table if choice else {})
    rows = []
    for name, (hint, _) in parameters(call).items():
        made = choice is not None and name in choice.derived
        if any(is_given(leaf) for leaf in leaves(hint)) or (made and hint is Any):
            continue
        value = "derived" if made else show_default(default_of(call, name))
        what = in_yaml(re.sub(r"(?<!\.)\.$", "", described.get(name, ""))).replace("|", "\\|")
        rules = dict.fromkeys(filter(None, (rule_of(f"{path}.{name}" if path else name) for path in paths)))
        rows.append(f"| `{name}` | {type_name(hint, places)} | {value} | {' or '.join(rules)} | {what} |")
    head = ["| key | type | default | resume | what |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*head, *rows]) if rows else "No keys."


def in_yaml(text: str) -> str:
    """The description of an argument, with Python's constants as they are written in YAML."""
    return re.sub(r"\b(None|True|False)\b", lambda found: {"None": "null"}.get(found[0], found[0].lower()), text)


def show_default(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return "-"
    if default == {} or dataclasses.is_dataclass(default):
        return "its own defaults"
    text = yaml.safe_dump(plain(default), default_flow_style=True, sort_keys=False, width=10 ** 6)
    return f"`{text.removesuffix(chr(10)).removesuffix(chr(10) + '...')}`"


def plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def type_name(hint: Any, places: Places) -> str:
    """A type hint in words, with links to the sections and tables that it names."""
    words = {str: "text", bool: "true or false", int: "integer", float: "number", dict: "mapping", type(None): "null"}
    if hint in words:
        return words[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        plain, mark = inner
        if not isinstance(mark, OneOf):
            name = type_name(plain, places)
            return f"non-empty {name}" if isinstance(mark, NotEmpty) else f"{name} {mark}"
        _, paths = places.tables[id(mark.table)]
        what = f" that compares {' or '.join(mark.takes)}" if mark.takes else ""
        return f"[mapping with a type](#{slug(table_heading(paths))}){what}"
    if origin is Literal:
        return "one of " + ", ".join(f"`{word}`" for word in choices(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(part, places) for part in inner)
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"list of {len(inner)} × {type_name(inner[0], places)}"
    if origin is not None:
        return f"list of {type_name(inner[0], places)}"
    return f"[mapping](#{slug(section_heading(places.sections[hint]))})" if is_section(hint) else "anything"


def section_heading(paths: Sequence[str]) -> str:
    return ", ".join(f"`{path}`" for path in paths) if any(paths) else "Sections"


def table_heading(paths: Sequence[str]) -> str:
    names = [f"`{name}`" for name in dict.fromkeys(path.split(".")[-1] for path in paths)]
    return f"Types of {', '.join(names)}" if len(names) <= 3 else f"Types of {names[0]} and the like"


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# --- descriptions, out of docstrings and comments ---


def summary(call: Callable) -> str:
    """The first paragraph of a docstring; if it is only "`x` times `loss_weight`.", that of `x`."""
    text = " ".join((inspect.getdoc(call) or "").split("\n\n")[0].split())
    if dataclasses.is_dataclass(call) and text.startswith(f"{call.__name__}("):  # Python's default
        return ""
    other = re.fullmatch(r"`(\w+)` times `loss_weight`\.", text)
    named = getattr(sys.modules[call.__module__], other[1], None) if other else None
    return summary(named) if named is not None else text


def descriptions(call: Callable, siblings: Mapping[str, Callable] = {}) -> dict[str, str]:
    """The descriptions of the arguments that the code describes.

    If a docstring does not describe an argument, or only by "see `x`", the base classes and everything that the
    docstring mentions are searched, also among `siblings`.
    """
    if dataclasses.is_dataclass(call):
        return comments(call)
    sources = list(call.__mro__) if inspect.isclass(call) else [call]
    named = dict(siblings)
    for source in sources:
        named |= vars(sys.modules[source.__module__])
    found, seen = {}, set()
    while sources:
        source = sources.pop(0)
        if source in seen:
            continue
        seen.add(source)
        text = inspect.getdoc(source) or ""
        for name, description in argument_docs(text).items():
            if name not in found or re.search(r"\bsee `\w+`\.?$", found[name]):
                found[name] = description
        mentioned = [named.get(name) for name in re.findall(r"`(\w+)`", text)]
        sources += [each for each in mentioned if inspect.isclass(each) or inspect.isfunction(each)]
    return found


def argument_docs(docstring: str) -> dict[str, str]:
    """The entries of a docstring's "Args:", by name."""
    found, names = {}, []
    _, _, text = docstring.partition("Args:\n")
    for line in text.split("\n\n")[0].splitlines():
        if not line.startswith("    "):
            break
        entry = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def comments(call: type) -> dict[str, str]:
    """The comment behind each field of a dataclass."""
    found = {}
    for line in inspect.getsource(call).splitlines():
        entry = re.match(r"    (\w+): .*?  # (.*)", line)
        if entry:
            found[entry[1]] = entry[2]
    return found
