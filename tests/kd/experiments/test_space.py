"""The file of a search: what it may contain, and what is drawn from it."""
import json
import re
import subprocess
import sys
from dataclasses import fields
from math import log
from pathlib import Path

import pytest
import yaml
from runs import ROOT, config, model, run_script, write_config

from data import generate_scenes
from kd.experiments.halving import Rung, plan_rungs
from kd.experiments.space import (
    OWN,
    RANGES,
    Base,
    Draws,
    SearchConfig,
    candidates,
    check_search,
    draw,
    read_search,
    variants,
)
from models import ConfigError
from models.checkpoints.sources import CheckpointError

METHODS = {"choice": [
    [{"type": "FGD", "weight": {"gradient_share": {"log": [0.01, 1]}}}],
    [{"type": "CrossKD", "reused_teacher_head_idx": {"choice": [0, 1]}}], [{"type": "PKD", "loss_weight": 6}]]}
SPACE = {"optimizer.lr": {"log": [0.001, 0.1]}, "distill.methods": METHODS}
LEVELS = {"data.repeat_factor": {"uniform": [0, 1]}, "train.accumulate": {"int": [1, 3]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A configuration that distils, on generated scenes."""
    folder = tmp_path_factory.mktemp("space")
    scenes = generate_scenes(folder / "scenes", train=4, val=2, size=(64, 64))
    write_config(folder / "base.yaml", config(scenes, 9, {
        "teacher": {"model": model(), "checkpoint": None}, "methods": [{"type": "FGD"}]}))
    write_config(folder / "student.yaml", config(scenes, 9))
    return folder


def written(folder, **keys):
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"budget": {"runs": 20}, "space": SPACE} | keys, sort_keys=False), encoding="utf-8")
    return path


def check(folder, cfg="base.yaml", overrides=(), **keys):
    check_search(folder / cfg, written(folder, **keys), overrides)


def test_a_good_file(folder):
    check(folder)
    check(folder, space=SPACE | LEVELS, test={"images": str(folder / "scenes" / "train"),
                                              "annotations": str(folder / "scenes" / "annotations" / "train.json")})


@pytest.mark.parametrize("keys, expected", [
    ({"spcae": {}}, 'spcae: unknown key; did you mean "space"?'), ({"space": {}}, "space: is empty: name keys"),
    ({"space": {"optimizer.lr": 0.1}}, "space: has only one candidate: give a choice"),
    ({"space": [1]}, "space: must be a mapping"), ({"space": {1: {"choice": [1, 2]}}}, "space.1: must be a key of"),
    ({"space": {"optimizer.lrr": {"choice": [1, 2]}}}, 'optimizer.lrr: unknown key; did you mean "lr"?'),
    ({"space": {"optimizer.lr": {"choice": [0.1, -1]}}}, "optimizer.lr: must be at least 0, not -1"),
    ({"space": {"optimizer.lr": {"choice": []}}}, r"space.optimizer.lr.choice: must be a list of at least one value"),
    ({"space": {"optimizer.lr": {"log": [0, 1]}}}, r"space.optimizer.lr.log: must rise from above 0, and \[0, 1\]"),
    ({"space": {"optimizer.lr": {"uniform": [1, 1]}}}, r"uniform: must rise, and \[1, 1\] does not"),
    ({"space": {"optimizer.lr": {"uniform": [1, 2, 3]}}}, r"must be \[lowest, highest\], two numbers, not \[1, 2, 3\]"),
    ({"space": {"train.accumulate": {"int": [1, 2.5]}}}, "two integers, not"),
    ({"space": {"optimizer.lr": {"log": [0.1, 1], "int": [1, 2]}}}, "log must be the only key of its mapping"),
    ({"space": {"optimizer.lr": {"log": [0.1, 1]}, "optimizer": {"choice": [{"lr": 1}]}}},
     "space.optimizer.lr: would be replaced by optimizer, which comes later"),
    ({"space": {"train.epochs": {"choice": [1, 2]}}}, "train.epochs: cannot be searched: the search sets it"),
    ({"space": {"train": {"choice": [{}, {"seed": 1}]}}}, "space.train: cannot be searched, because of train.epochs"),
    ({"space": {"data.val.first": {"choice": [1, 2]}}}, "data.val.first: cannot be searched, because of data.val: all"),
    ({"space": {"distill.methods": {"choice": [[{"type": "FDG"}], []]}}}, 'unknown type "FDG"; did you mean "FGD"?'),
    ({"space": {"distill.methods.0.reused_teacher_head_idx": {"choice": [1, 2]}}}, "reused_teacher_head_idx: unknown"),
    ({"budget": {}}, "budget: give either runs or hours"),
    ({"budget": {"runs": 1, "hours": 1}}, "budget: give either runs or hours"),
    ({"budget": {"runs": 0}}, "budget.runs: must be above 0"), ({"seeds": [0, 1]}, "seeds: must be fresh"),
    ({"seeds": []}, "seeds: must be a list with at least one entry"), ({"shortest": 10}, "shortest: must be at most 9"),
    ({"against": ["teacher"]}, "against.0: must be one of alone, base"),
    ({"storage": "sqlite:///a.db"}, "storage: is of use only with engine: optuna")])
def test_bad_files(folder, keys, expected):
    """Each is one line, which names the file."""
    with pytest.raises(ConfigError, match=expected) as caught:
        check(folder, **keys)
    assert "space.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_space_that_does_not_fit_the_configuration(folder):
    with pytest.raises(ConfigError, match=r"distill.*space.yaml does not fit .*student.yaml"):
        check(folder, "student.yaml")
    with pytest.raises(ConfigError, match="test: has the annotations of data.val"):
        check(folder, test={"images": "a", "annotations": str(folder / "scenes" / "annotations" / "val.json")})
    teachers = {"distill.teacher.checkpoint": {"choice": [None, "none.pth"]}}
    with pytest.raises(CheckpointError, match="none.pth"):
        check(folder, space=teachers)
    with pytest.raises(ConfigError, match="data.val: missing in .*base.yaml"):
        check(folder, overrides=["data.val=null"])


def test_errors_come_before_pytorch_is_imported(folder):
    """What the script would print."""
    path = written(folder, space={"optimizer.lr": {"choice": [0.1, -1]}})
    code = ("import sys; from pathlib import Path; from kd.early import early\n"
            f"try: early('kd.experiments.space', 'check_search', Path({str(folder / 'base.yaml')!r}), "
            f"Path({str(path)!r}), [])\n"
            "except Exception as error: print(error, error.exit_code, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, check=True, stdout=subprocess.PIPE)
    assert done.stdout.startswith("optimizer.lr: must be at least 0, not -1") and done.stdout.endswith(" 2 False\n")


def test_the_same_seed_draws_the_same(folder):
    base, search = Base(folder / "base.yaml", []), read_search(written(folder))
    assert candidates(base, search, 9) == candidates(base, search, 9)
    assert candidates(base, search, 9)[:5] == candidates(base, search, 5)
    search.seed = 5
    assert candidates(base, search, 9) != candidates(base, read_search(written(folder)), 9)


def test_draws_are_balanced_and_in_range(folder):
    draws = Draws(3)
    found = [draw(SPACE | LEVELS, draws.pick, draws.between) for _ in range(24)]
    kinds = [each["distill.methods"][0]["type"] for each in found]
    assert all(kinds.count(kind) == 8 for kind in ("FGD", "CrossKD", "PKD"))
    assert [each["distill.methods"][0]["reused_teacher_head_idx"] for each in found
            if each["distill.methods"][0]["type"] == "CrossKD"].count(0) == 4
    rates = [each["optimizer.lr"] for each in found]
    assert min(rates) >= 0.001 and max(rates) <= 0.1
    assert sum(log(rate) < log(0.01) for rate in rates) == 12  # half of them in the lower half of the logarithm
    assert {each["train.accumulate"] for each in found} == {1, 2, 3}
    assert all(0 <= each["data.repeat_factor"] <= 1 for each in found)
    assert all("gradient_share" in each["distill.methods"][0].get("weight", {}) for each in found
               if each["distill.methods"][0]["type"] == "FGD")


def test_a_small_space_has_no_candidate_twice(folder):
    """One of its options is what the configuration has already."""
    base = Base(folder / "base.yaml", ["distill.methods.0.temp=0.5"])
    search = read_search(written(folder, space={"distill.methods.0.temp": {"choice": [0.5, 0.7, 0.9]}}))
    found = candidates(base, search, 20)
    assert found[0] == {} and sorted(each["distill.methods.0.temp"] for each in found[1:]) == [0.7, 0.9]


def test_variants_have_each_option_and_both_ends():
    found = list(variants(SPACE))
    assert {each["optimizer.lr"] for each in found} == {0.001, 0.1} and len(found) == 6
    texts = [json.dumps(each["distill.methods"]) for each in found]
    assert all(any(part in text for text in texts) for part in ("0.01}", "1}}", '_idx": 0', '_idx": 1', "PKD"))


def test_the_script_refuses_what_a_search_does_not_take(folder, monkeypatch, capsys):
    words = ["--cfg", folder / "base.yaml", "--search", written(folder), "--work-dir", folder / "w"]
    for more, expected in ((["--seeds", 1], "--seeds is not for --search"),
                           (["--teacher-ap", 40], "--teacher-ap is not for --search"),
                           (["--cfg", folder / "student.yaml"], "--search takes one --cfg")):
        assert run_script(monkeypatch, "sweep.py", *words, *more) == 2
        assert expected in capsys.readouterr().err
    assert not Path(folder / "w").exists()


def test_the_examples_fit_their_configurations(tmp_path):
    """The one of the page, and those in configs."""
    page = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    example = tmp_path / "space.yaml"
    example.write_text(re.search(r"^```yaml\n(.*?)^```", page, re.S | re.M)[1], encoding="utf-8")
    found = [(example, re.search(r"--cfg (\S+)", page)[1])]
    found += [(path, path.with_name(path.name.removeprefix("space_"))) for path in (ROOT / "configs").rglob("space_*")]
    assert len(found) == 2
    for path, cfg in found:
        search, base = read_search(path), Base(ROOT / cfg, [])
        assert search.test.annotations.endswith("test.json")
        assert all(base.with_settings(settings).distill for settings in variants(search.space))


def test_the_page_names_every_key_and_form():
    page = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    assert all(f"`{field.name}`" in page for field in fields(SearchConfig))
    assert all(f"`{{{kind}: [" in page for kind in ("choice", *RANGES)) and all(f"`{key}`" in page for key in OWN)
    assert "62 runs of 2 epochs" in page and plan_rungs(30 - 9, 15, 3, None) == [Rung(62, 2), Rung(20, 5), Rung(6, 15)]
