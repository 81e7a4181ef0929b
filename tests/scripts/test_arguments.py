"""Arguments of every script: a number has a range, a text has choices or is free, and one line refuses the rest."""
import argparse
import runpy
import sys
from math import inf
from typing import get_args

import pytest
from runs import ROOT, run_script

from data.ranges import Range

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
# Names, paths and headings.
FREE = {"cfg", "checkpoint", "classes", "input", "out", "overrides", "runs", "server", "title"}


class Found(Exception):
    """Holds the parser of a script."""


def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a script makes."""
    def stop(parser, *arguments):
        raise Found(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        patch.setattr(sys, "argv", [script])
        with pytest.raises(Found) as found:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    return found.value.args[0]


def arguments_of(script: str, parser: argparse.ArgumentParser, before: tuple = ()):
    """Every argument of a script and of its commands, with all that must be given, too."""
    actions = parser._actions
    for action in actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from arguments_of(script, command, (*before, name))
        elif action.nargs != 0:
            needed = [word for each in actions if each.required and each.option_strings and each is not action
                      for word in (each.option_strings[0], list(each.choices or "x")[0])]
            yield script, action, (*before, *needed)


ARGUMENTS = [each for script in SCRIPTS for each in arguments_of(script, parser_of(script))]
NUMBERS = [each for each in ARGUMENTS if hasattr(each[1].type, "hint")]
CHOICES = [each for each in ARGUMENTS if each[1].choices]
name = {"ids": lambda value: getattr(value, "dest", value if isinstance(value, str) else " ")}


def test_the_arguments_are_found():
    said = {(script, action.option_strings[0]) for script, action, _ in NUMBERS}
    assert said >= {("benchmark.py", "--rounds"), ("predict.py", "--score-thr"), ("prepare_data.py", "--workers"),
                    ("sweep.py", "--seeds"), ("summary.py", "--size"), ("compare.py", "--teacher-ap")}
    assert len(NUMBERS) > 25 and len(CHOICES) > 10


def test_each_argument_is_a_number_in_a_range_a_choice_a_path_or_free():
    left = {f"{script} {action.dest}" for script, action, _ in ARGUMENTS if action.dest not in FREE
            and (action.type in (int, float) or action.type is None and not action.choices)}
    assert not left


@pytest.mark.parametrize("script, action, needed", NUMBERS, **name)
def test_numbers_out_of_range(script, action, needed, monkeypatch, capsys):
    kind, allowed = get_args(action.type.hint)
    assert isinstance(allowed, Range)
    outside = [allowed.low - 1, *[allowed.low] * allowed.open, *[allowed.high + 1] * (allowed.high != inf), "many", ""]
    outside += ["1.5", "1e2"] if kind is int else ["nan", "inf", "1e999"]
    for value in map(str, outside):
        value = f"train={value}" if action.dest in ("class_thr", "split", "fixed") else value
        words = [f"{action.option_strings[0]}={value}"]
        if action.nargs == 2:
            words = [action.option_strings[0], value, value]
        refused(monkeypatch, capsys, script, *needed, *words, part=f"argument {action.option_strings[0]}: must be ")


@pytest.mark.parametrize("script, action, needed", CHOICES, **name)
def test_words_that_are_no_choice(script, action, needed, monkeypatch, capsys):
    option = action.option_strings[0]
    refused(monkeypatch, capsys, script, *needed, option, "nothing", part=f"argument {option}: invalid choice: 'noth")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_argument(script, monkeypatch, capsys):
    words = next((needed for each, _, needed in ARGUMENTS if each == script), ())
    refused(monkeypatch, capsys, script, *words, "--nothing", part="")


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, script: str, *words: str, part: str):
    """Exit code 2, and one line on stderr."""
    assert run_script(monkeypatch, script, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {part}") and len(error.splitlines()) == 1, (words, error)
