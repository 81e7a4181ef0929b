"""distill.cache: answers of other settings are never used; what a run says about it, and what is refused."""
import sys
from pathlib import Path

import pytest
import torch
from caches import CROSSKD, FLOAT, SETS, caching, run_config
from small_models import make_batch, same_losses, small_config, teacher_entry

from data.augment.presets import PRESETS
from data.samplers import TrainBatchSampler
from kd.cache import fingerprint, store
from kd.cache.expected import expect
from kd.config import parse_config
from kd.engine.check import check
from kd.engine.train import train
from models import ConfigError

CPU = torch.device("cpu")


def folders(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


@pytest.mark.parametrize("what, change", [
    ("weights", {"seed": 1}), ("preprocess.student.order", {"student": {"preprocess": {"channel_order": "bgr"}}}),
    ("preprocess.teacher.statistics", {"teacher": teacher_entry(preprocess={"mean": [1, 2, 3]})}),
    ("model.neck", {"teacher": teacher_entry(neck={"add_extra_convs": "on_input"})}),
    ("precision", {"teacher": teacher_entry() | {"precision": "bf16"}}), ("dtype", {"dtype": torch.float64}),
    ("needs.cuts", {"methods": [CROSSKD | {"reused_teacher_head_idx": 2}]}),
    ("needs.levels", {"methods": [CROSSKD, {"type": "PKD", "levels": [2]}]}),
    ("numbers.stored", {"precision": "fp16"})])
def test_other_settings_get_a_folder_of_their_own(what, change, tmp_path):
    change = dict(change)
    distiller = caching(*SETS["CrossKD"], folder=tmp_path)
    distiller.loss(*make_batch(**FLOAT))
    distiller.caches[0].finish()
    before = folders(tmp_path)
    other = caching(*change.pop("methods", SETS["CrossKD"]), folder=tmp_path, **change)
    other.loss(*make_batch(dtype=change.get("dtype", torch.float32)))
    other.caches[0].finish()
    assert other.caches[0].computed == 2 and len(folders(tmp_path)) == 2 and before < folders(tmp_path)
    line, = store.others(tmp_path, other.caches[0].settings, {other.caches[0].fingerprint})
    assert str(tmp_path / before.pop()) in line and what in line and "delete it if no run needs it" in line


def test_a_factory_whose_code_has_changed_is_another_teacher(tmp_path, monkeypatch):
    """The weights and the configuration are the same; only the file that computes with them differs."""
    monkeypatch.syspath_prepend(tmp_path)
    source = (Path(__file__).parents[2] / "feature_networks.py").read_text(encoding="utf-8")
    batch, expected = make_batch(**FLOAT), None
    for folder_count, code in ((1, source), (1, source), (2, source + "\n# changed\n")):
        (tmp_path / "changing_teacher.py").write_text(code, encoding="utf-8")
        monkeypatch.delitem(sys.modules, "changing_teacher", raising=False)
        distiller = caching({"type": "PKD"}, folder=tmp_path / "answers",
                            teacher={"factory": "changing_teacher:build", "checkpoint": None})
        losses = distiller.loss(*batch)
        distiller.caches[0].finish()
        assert len(folders(tmp_path / "answers")) == folder_count
        assert expected is None or same_losses(losses, expected)
        expected = losses


def test_answers_of_other_code_are_not_used(tmp_path, monkeypatch):
    def run():
        distiller = caching(*SETS["CrossKD"], folder=tmp_path)
        distiller.loss(*make_batch(**FLOAT))
        distiller.caches[0].finish()
        return distiller.caches[0]

    assert len(fingerprint.code_hash()) == 32 and run().computed == 2 and run().computed == 0
    monkeypatch.setattr(fingerprint, "code_hash", lambda: "other")
    changed = run()
    assert changed.computed == 2 and len(folders(tmp_path)) == 2
    assert "code was" in store.others(tmp_path, changed.settings, {changed.fingerprint})[0]


def test_a_run_names_the_folders_that_it_does_not_use(scenes, tmp_path):
    for run, changes in (("a", {}), ("b", {"scale": [96, 64]}), ("c", {"antialias": True})):
        cfg = run_config(tmp_path, scenes, SETS["LD"], epochs=1, cache=str(tmp_path / "answers"))
        cfg["data"] |= changes
        train(parse_config(cfg), tmp_path / run, CPU)
    text = (tmp_path / "c" / "train.log").read_text()
    assert "is not used (data.antialias was false and is true)" in text
    assert "data.scale was [96, 64] and is [64, 64], data.antialias was false and is true" in text


def test_another_machine_is_named(tmp_path, monkeypatch):
    distiller = caching(*SETS["LD"], folder=tmp_path)
    assert distiller.caches[0].open() == [] and distiller.caches[0].open() == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    line, = distiller.caches[0].open()
    assert "may differ from this machine's by rounding: threads was" in line and "is 99" in line


@pytest.mark.parametrize("message, distill, data", [
    ("cannot be used with data.train_augment", {}, {"train_augment": "light"}),
    ("cannot be used with data.train_augment", {}, {"train_augment": PRESETS["light"]}),
    ("cannot be used with data.multi_scale", {}, {"multi_scale": [[64, 64], [96, 96]]}),
    ("distill.cache: needs distill.eval_teacher: true", {"eval_teacher": False}, {}),
    ("distill.cache: does not work with distill.teacher.shard", {"teacher": teacher_entry() | {"shard": True}}, {}),
    ("distill.cache.precision.*fp32, fp16", {"cache": {"dir": "a", "precision": "bf16"}}, {}),
    ("distill.cache: must name a folder", {"cache": ""}, {}), ("distill.cache.dir: missing", {"cache": {}}, {})])
def test_refused(message, distill, data):
    cfg = {"model": small_config(), "data": {"train": {"images": "a", "annotations": "b"}, **data},
           "distill": {"teacher": teacher_entry(), "methods": [CROSSKD], "cache": "answers"} | distill}
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(cfg)
    assert "\n" not in str(caught.value)


def test_another_precision_around_it_is_refused(tmp_path):
    distiller = caching(CROSSKD, folder=tmp_path)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match="holds answers for train.amp=none"):
        distiller.loss(*make_batch(**FLOAT))


def test_a_module_without_an_entry_for_each_image_is_refused(tmp_path):
    distiller = caching({"type": "FitNet", "student_modules": ["neck.fpn_convs.0.conv"]}, folder=tmp_path)
    distiller.teacher.neck.fpn_convs[0].conv.register_forward_hook(lambda module, args, output: output.flatten(0, 1))
    with pytest.raises(ConfigError, match="module neck.fpn_convs.0.conv has no entry for each image"):
        distiller.caches[0].entry_size((64, 64), 2)


# --- what is expected, --check, resume ---

def test_expectations_are_what_happens():
    sampler = TrainBatchSampler([(50, 60)] * 40, 4, seed=0)
    found = expect(sampler, [(50, 60)] * 40, 0.5, 10, views=2)
    assert found.entries == 80 and found.common == (64, 64) and found.pixels == 80 * 64 * 64
    assert found.computed == pytest.approx(2 / 10)
    assert expect(sampler, [(50, 60)] * 40, 0.0, 10, views=1).computed == pytest.approx(1 / 10)
    several = expect(TrainBatchSampler([(50, 60)] * 20 + [(50, 90)] * 20, 4, seed=0), [(50, 60)] * 20 + [(50, 90)] * 20,
                     0.5, 10, views=2)
    assert several.entries > 100 and several.computed > 0.25


def test_check_writes_nothing_and_says_what_is_needed(scenes, tmp_path):
    cfg = run_config(tmp_path, scenes, SETS["all"], cache=str(tmp_path / "answers"))
    text = check(parse_config(cfg), CPU)
    assert "its answers are kept in" in text and "are free there" in text and "if nothing is stored yet" in text
    assert not (tmp_path / "answers").exists()


def test_a_resumed_run_ends_with_the_same_weights(scenes, tmp_path):
    cfg = run_config(tmp_path, scenes, SETS["all"], epochs=2, cache=str(tmp_path / "answers"))
    train(parse_config(cfg), tmp_path / "whole", CPU)
    cfg["train"]["epochs"] = 1
    train(parse_config(cfg), tmp_path / "parts", CPU)
    cfg["train"]["epochs"], cfg["distill"]["cache"] = 2, str(tmp_path / "elsewhere")
    train(parse_config(cfg), tmp_path / "parts", CPU, tmp_path / "parts" / "last.pth")
    states = [torch.load(tmp_path / run / "last.pth", weights_only=True)["model"] for run in ("whole", "parts")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert "distill.cache" not in (tmp_path / "parts" / "train.log").read_text().split("since the checkpoint")[-1][:80]
