"""What a resumed run does with every setting that differs from its checkpoint's."""
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import pytest
from runs import config, model

from kd.config import Config, parse_config
from kd.config.hints import is_given, leaves, with_defaults
from kd.config.reference import collect
from kd.config.resume import REFUSE, RULES, TAKE, WARN, changes, rule_of
from models.build import parameters

# Whole subtrees with one rule: architecture, post-processing, and what an outer key decides.
SUBTREES = {"model.*", "model.test.*", "data.train_augment.*", "distill.teacher.model.*",
            "distill.teacher.arguments.*", "distill.teacher.preprocess.*", "distill.methods.*", "eval.tta.*"}
ALWAYS_THERE = {"data", "optimizer", "schedule", "train", "eval", "eval.tta"}


def all_keys() -> set[str]:
    """Every key of a configuration, with those of every type."""
    places, keys = collect(Config), set()
    used = [(call, paths) for call, paths in places.sections.items()]
    for choice, paths in places.tables.values():
        used += [(call, paths) for call in [*choice.table.values(), *filter(None, [choice.common])]]
        keys |= {f"{path}.type" for path in paths}
    for call, paths in used:
        keys |= {f"{path}.{name}".lstrip(".") for path in paths for name, (hint, _) in parameters(call).items()
                 if not any(map(is_given, leaves(hint)))}
    return keys


def test_every_key_has_a_rule():
    keys = all_keys()
    assert len(keys) > 200 and {"data.flip", "distill.methods.alpha_fgd", "model.head.loss_cls.alpha"} <= keys
    assert sorted(key for key in keys if rule_of(key) is None) == sorted(ALWAYS_THERE - {"eval.tta"})
    said = {key for key in RULES if key.endswith(".*")}
    assert {key for key in said if not key.startswith("model.head.")} == SUBTREES


def test_every_rule_is_of_a_key():
    assert {key.removesuffix(".*") for key in RULES} <= all_keys()


def settings(tree: Any, key: str = "") -> Iterator[tuple[str, Any, str | int]]:
    """The keys of values that are no mappings, each with the mapping or list that it is in and its name there."""
    for name, value in tree.items():
        path = f"{key}.{name}".lstrip(".")
        if isinstance(value, Mapping):
            yield from settings(value, path)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for i, entry in enumerate(value):
                yield from settings(entry, f"{path}.{i}")
        else:
            yield path, tree, name


def whole(tmp_path) -> dict:
    """A configuration with every optional section and the defaults of all keys."""
    methods = [{"type": "CrossKD", "loss_cls_kd": {"type": "KDQualityFocalLoss"}}, {"type": "FGD"}, {"type": "CWD"}]
    cfg = config(tmp_path, 2, {"teacher": {"model": model(), "checkpoint": "a.pth"}, "methods": methods})
    return with_defaults(Config, parse_config(cfg | {"eval": {"tta": {"flip": True}}}))


def test_each_changed_setting_is_found_with_its_rule(tmp_path):
    before, found = whole(tmp_path), {}
    for key, _, _ in settings(before):
        after = deepcopy(before)
        (place, name), = [(place, name) for other, place, name in settings(after) if other == key]
        place[name] = "another"
        change, = changes(before, after)
        assert (change.key, change.new) == (key, "another")
        found[key] = change.rule
    assert len(found) > 100 and set(found.values()) == {TAKE, WARN, REFUSE}
    expected = {
        TAKE: ["data.workers", "eval.every", "train.log_every", "train.keep", "eval.tta.flip"],
        WARN: ["optimizer.lr", "schedule.milestones", "data.flip", "data.train.images", "distill.methods.1.alpha_fgd",
               "distill.methods.0.loss_cls_kd.loss_weight", "distill.methods.0.weight", "train.epochs", "train.amp",
               "model.test.score_thr", "model.head.loss_cls", "distill.teacher.checkpoint"],
        REFUSE: ["model.backbone.depth", "model.head.num_classes", "model.preprocess.mean", "optimizer.type",
                 "distill.methods.0.type", "distill.methods.0.adapter_kernel", "train.ema", "train.seed",
                 "train.accumulate", "data.batch_size", "data.skip_empty"]}
    keys = found | {"model.head.loss_cls": rule_of("model.head.loss_cls"),
                    "model.head.num_classes": rule_of("model.head.num_classes"),
                    "model.preprocess.mean": rule_of("model.preprocess.mean")}
    for rule, names in expected.items():
        assert {keys[name] for name in names} == {rule}, rule


@pytest.mark.parametrize("path, value, text, rule", [
    ("distill", None, "distill was {", REFUSE),
    ("data.val", None, "data.val was {", WARN),
    ("distill.methods", [{"type": "PKD"}], 'distill.methods was ["CrossKD", "FGD", "CWD"] and is ["PKD"]', REFUSE),
    ("optimizer", {"type": "AdamW"}, 'optimizer.type was "SGD" and is "AdamW"', REFUSE),
    ("optimizer.lr", 0.001, "optimizer.lr was 0.01 and is 0.001", WARN),
    ("data.batch_size", 8, "data.batch_size times the number of processes was 4 and is 8", REFUSE)])
def test_the_text_of_a_change(tmp_path, path, value, text, rule):
    before = whole(tmp_path)
    after = deepcopy(before)
    *parents, name = path.split(".")
    place = after
    for parent in parents:
        place = place[parent]
    place[name] = value
    change, = changes(before, after)
    assert str(change).startswith(text) and len(str(change)) < 250 and change.rule == rule


def test_the_same_setting_written_in_another_way_is_no_change(tmp_path):
    short = config(tmp_path)
    written = config(tmp_path) | {"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}}
    written["train"] = written["train"] | {"seed": 0, "ema": None}
    written["data"] = written["data"] | {"flip": 0.5, "scale": (64, 64)}
    written["model"]["head"]["norm"] = written["model"]["head"].pop("norm_cfg")
    assert changes(short, written) == changes(written, short) == []
    one, several = ({"distill": {"teacher": teacher, "methods": []}} for teacher in (
        {"checkpoint": None, "model": model()}, [{"checkpoint": None, "model": model(), "weight": 1.0}]))
    assert changes(short | one, short | several) == []
    brief, full, other = (one["distill"] | {"methods": [{"type": "FGD", "weight": {"gradient_share": 0.3} | more}]}
                          for more in ({}, {"gradient_share_every": 20}, {"gradient_share_every": 21}))
    assert changes(short | {"distill": brief}, short | {"distill": full}) == []
    change, = changes(short | {"distill": brief}, short | {"distill": other})
    assert str(change) == "distill.methods.0.weight.gradient_share_every was 20 and is 21" and change.rule == WARN
    change, = changes(short | {"distill": brief}, short | {"distill": one["distill"] | {"methods": [{"type": "FGD"}]}})
    assert str(change).startswith("distill.methods.0.weight was {") and change.rule == WARN


def test_the_batch_size_counts_over_all_processes(tmp_path):
    """Batches are the same for 2 processes with 4 images and 4 with 2: a run may go on with other processes."""
    cfg = config(tmp_path)
    half = cfg | {"data": cfg["data"] | {"batch_size": 2}}
    assert changes(cfg, half, (2, 4)) == []
    change, = changes(cfg, cfg, (1, 2))
    assert (change.rule, change.old, change.new) == (REFUSE, 4, 8)


def test_a_key_of_an_earlier_version_is_named(tmp_path):
    cfg = config(tmp_path)
    change, = changes(cfg | {"train": cfg["train"] | {"former": 1}}, cfg)
    assert (change.key, change.rule) == ("train.former", WARN)
