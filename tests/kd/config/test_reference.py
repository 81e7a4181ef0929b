"""The configuration reference agrees with the code, and is complete."""
import re

import pytest
import yaml
from runs import CONFIGS, ROOT, run_script

from kd import METHODS
from kd.config.load import Yaml12Loader
from kd.config.reference import argument_docs, configuration_reference, descriptions, slug
from kd.methods.fgd import FGD
from kd.optim import OPTIMIZERS
from losses import LOSSES
from models import BACKBONES, HEADS, NECKS
from models.build import ALIASES
from models.heads import GFLHead

PAGE = ROOT / "docs" / "configuration.md"


def test_the_page_is_current(tmp_path, monkeypatch):
    assert run_script(monkeypatch, "write_reference.py", "--out", tmp_path / "page.md") == 0
    assert (tmp_path / "page.md").read_text("utf-8") == PAGE.read_text("utf-8"), (
        "docs/configuration.md is out of date: run python scripts/write_reference.py")


def test_every_type_is_there():
    types = re.findall(r"^### `type: (\w+)`", configuration_reference(), re.M)
    assert set(types) >= {*METHODS, *OPTIMIZERS, *LOSSES, *BACKBONES, *HEADS, *NECKS} and len(set(types)) == len(types)


def test_links_lead_somewhere():
    page = configuration_reference()
    headings = {slug(heading) for heading in re.findall(r"^#+ (.*)$", page, re.M)}
    links = set(re.findall(r"\]\(#([^)]+)\)", page))
    assert links and links <= headings


def keys_of(value):
    if isinstance(value, dict):
        yield from (key for key in value if key not in ("type", "_base_"))
        for each in value.values():
            yield from keys_of(each)
    elif isinstance(value, list):
        for each in value:
            yield from keys_of(each)


@pytest.mark.parametrize("path", [*CONFIGS, *(ROOT / "configs" / "_base_").glob("*.yaml")], ids=lambda p: p.stem)
def test_every_key_of_the_configurations_is_there(path):
    rows = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text("utf-8"), re.M))
    said = set(keys_of(yaml.load(path.read_text("utf-8"), Loader=Yaml12Loader)))
    assert {ALIASES.get(key, key) for key in said} <= rows


def test_what_a_row_says():
    page = configuration_reference()
    assert not re.search(r"\b(None|True|False)\b", page), "a configuration says null, true and false"
    assert "| `warmup` | one of `linear`, `constant` | `linear` | warn | rises from warmup_factor to 1, or" in page
    assert "| `milestones` | list of number at least 0 | `[8, 11]` | warn | epochs after which gamma is" in page
    assert "| `checkpoint` | text or null | - | warn | path or URL; null only for an untrained teacher |" in page
    assert "| `strides` | non-empty list of integer at least 1 | - | refuse | pixels per cell, for each level |" in page
    assert "| `loss_bbox` | [mapping with a type](#types-of-loss_cls-and-the-like) that compares boxes or num" in page
    assert "| `assigner` | [mapping with a type](#types-of-assigner) | `{type: ATSSAssigner, topk: 9}` | warn |" in page
    assert "| `num_classes` | integer at least 1 | derived | refuse | object classes, background not counted |" in page
    assert " anything " not in page and "`student`" not in re.findall(r"^\| (`\w+`) \|", page, re.M)


def test_descriptions_are_followed_to_where_they_are():
    assert descriptions(GFLHead)["stacked_convs"].startswith("convolutions per tower")  # of DenseHead
    assert descriptions(FGD)["levels"].startswith("numbers of the student's neck outputs")  # of FeaturePairs
    assert descriptions(METHODS["Mimic"], METHODS)["loss_cls_kd"].startswith("losses on class scores")  # of CrossKD


def test_arguments_of_a_docstring():
    assert argument_docs("What.\n\nArgs:\n    a, b: one\n        and on.\n    c: two\n\nMore: x") == {
        "a": "one and on.", "b": "one and on.", "c": "two"}
