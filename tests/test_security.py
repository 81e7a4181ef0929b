"""Attacks through configurations, checkpoints, data sets and downloads fail; the code contains no dangerous calls.

Other pickles are in tests/models/checkpoints/test_unpickler.py; checksums and redirections of downloads are
in tests/models/checkpoints/test_sources.py.
"""
import ast
import json
import os
import shutil

import pytest
import torch
from runs import ROOT, config, run_script, write_config

from data import CocoDataset, DataError, generate_scenes
from models.weights import CheckpointError, load_weights


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp("sound"), train=4, val=2, size=(64, 64))


@pytest.fixture
def scenes(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "scenes")


def assert_refused(code, capsys, *parts):
    """Exit code 2 and one line."""
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(error) == 1 and error[0].startswith("error: "), error
    for part in parts:
        assert part in error[0]


# --- configurations ---

@pytest.mark.parametrize("attack", [
    "!!python/object/apply:os.system ['touch {0}']", "!!python/object/new:os.system ['touch {0}']",
    "!!python/name:os.system", "!!python/module:os"])
@pytest.mark.parametrize("script", ["train.py", "check_data.py"])
@pytest.mark.parametrize("way", ["file", "override"])
def test_yaml_builds_no_objects(sound, tmp_path, monkeypatch, capsys, script, way, attack):
    attack = attack.format(tmp_path / "marker")
    path, overrides = write_config(tmp_path / "cfg.yaml", config(sound)), []
    if way == "file":
        path.write_text(path.read_text() + f"\neval: {attack}\n")
    else:
        overrides = [f"eval={attack}"]
    assert_refused(run_script(monkeypatch, script, "--cfg", path, *overrides), capsys, "is not valid YAML")
    assert not (tmp_path / "marker").exists()


def test_settings_are_never_run(sound, tmp_path, monkeypatch, capsys):
    path, marker = write_config(tmp_path / "cfg.yaml", config(sound)), tmp_path / "marker"
    for override in (f"train.epochs=__import__('os').system('touch {marker}')", f"optimizer.lr=$(touch {marker})",
                     f"model.backbone.type=`touch {marker}`", "model.head.type=os.system"):
        assert_refused(run_script(monkeypatch, "train.py", "--cfg", path, override), capsys, override.split("=")[0][:9])
    assert not marker.exists()


def test_names_of_files_reach_no_shell(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "$(touch marker);`touch marker`&touch marker|.jpg"
    file = scenes / "annotations" / "train.json"
    content = json.loads(file.read_text())
    (scenes / "train" / content["images"][0]["file_name"]).rename(scenes / "train" / name)
    content["images"][0]["file_name"] = name
    file.write_text(json.dumps(content))
    path = write_config(tmp_path / "$(touch marker).yaml", config(scenes, epochs=1))
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", tmp_path / "$(touch marker)", "--device",
                      "cpu") == 0
    assert not (tmp_path / "marker").exists() and (tmp_path / "$(touch marker)" / "last.pth").exists()


# --- checkpoints ---

class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("way", ["load_weights", "--resume-from", "--resume", "--checkpoint", "teacher", "pretrained"])
def test_a_checkpoint_runs_no_command(sound, tmp_path, monkeypatch, capsys, zipped, way):
    marker, path = tmp_path / "marker", tmp_path / "run" / "last.pth"
    path.parent.mkdir()
    state = {"format": "densekd", "step": 1, "model": {"weight": torch.ones(2)}, "meta": Command(marker)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    cfg = config(sound)
    if way == "teacher":
        cfg["distill"] = {"teacher": {"model": cfg["model"], "checkpoint": str(path)}, "methods": [{"type": "FGD"}]}
    if way == "pretrained":
        cfg["model"]["backbone"]["weights"] = str(path)
    arguments = ["--cfg", write_config(tmp_path / "cfg.yaml", cfg), "--device", "cpu"]
    if way == "load_weights":
        with pytest.raises(CheckpointError, match="refused, it asks for .*system"):
            load_weights(torch.nn.Linear(2, 2), path, allow_missing="*")
    elif way == "--checkpoint":
        assert_refused(run_script(monkeypatch, "eval.py", *arguments, way, path), capsys, str(path))
    else:
        arguments += {"--resume-from": ["--work-dir", tmp_path / "new", way, path],
                      "--resume": ["--work-dir", path.parent, way]}.get(way, ["--work-dir", tmp_path / "new"])
        assert_refused(run_script(monkeypatch, "train.py", *arguments), capsys, str(path.parent))
        assert not (tmp_path / "new").exists()
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the attack is real: to read the file like this runs the command
    assert marker.exists()


def test_nothing_is_asked_for_over_plain_http(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match="is refused: .* https"):
        load_weights(torch.nn.Linear(2, 2), "http://weights.invalid/w-01234567.pth")
    assert not (tmp_path / "hub").exists()


# --- data sets ---

@pytest.fixture
def secret(scenes):
    """A data set with a picture next to its image folder that is not one of its images."""
    source = sorted((scenes / "train").iterdir())[0]
    (scenes / "train" / "deep").mkdir()
    return shutil.copy(source, scenes / "secret.jpg")


def name_first_image(scenes, name):
    file = scenes / "annotations" / "train.json"
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = name
    file.write_text(json.dumps(content))
    return scenes / "train", file


@pytest.mark.parametrize("name", [
    "../secret.jpg", "../../scenes/secret.jpg", "deep/../../secret.jpg", "./../secret.jpg", "..", "{0}",
    "..\\secret.jpg", "C:\\secret.jpg", "\\\\server\\secret.jpg"])
def test_annotations_name_no_file_outside_the_image_folder(scenes, secret, tmp_path, monkeypatch, capsys, name):
    source = name_first_image(scenes, name.format(secret))
    with pytest.raises(DataError, match="leads out of the image folder"):
        CocoDataset(*source, training=False)
    path = write_config(tmp_path / "cfg.yaml", config(scenes))
    assert_refused(run_script(monkeypatch, "train.py", "--cfg", path, "--work-dir", tmp_path / "run"), capsys,
                   "leads out of the image folder")
    assert not (tmp_path / "run").exists()


def test_links_that_the_owner_of_the_folder_has_made_are_followed(scenes, secret, tmp_path):
    # Not an attack: annotations cannot create links, and data folders often contain links.
    (scenes / "train" / "link.jpg").symlink_to(secret)
    (tmp_path / "linked").symlink_to(scenes / "train")
    _, file = name_first_image(scenes, "link.jpg")
    image, target = CocoDataset(tmp_path / "linked", file, training=False)[0]
    assert image.shape[0] == 3 and target["image_id"] == 1


# --- the code ---

FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "breakpoint"}
FORBIDDEN_MODULES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "pty", "ctypes"}
FORBIDDEN_CALLS = {
    "os": {"system", "popen", "execv", "execve", "execl", "execle", "execlp", "execvp", "spawnl", "spawnv"},
    "pickle": {"load", "loads"}, "subprocess": {"getoutput", "getstatusoutput"},
    "yaml": {"unsafe_load", "full_load", "load_all", "unsafe_load_all", "full_load_all"}, "tempfile": {"mktemp"}}


SAFE_LOADERS = ("Yaml12Loader", "yaml.SafeLoader", "yaml.BaseLoader")


def dangers(source: str) -> list[str]:
    """Calls and imports that can run data as code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            names = {alias.name for alias in node.names}
            found += FORBIDDEN_MODULES & ({module.split(".")[0]} | {name.split(".")[0] for name in names})
            found += FORBIDDEN_CALLS.get(module, set()) & names
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in FORBIDDEN_NAMES:
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [ast.unparse(node)] if node.attr in FORBIDDEN_CALLS.get(node.value.id, ()) else []
        if isinstance(node, ast.Call):
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            called = ast.unparse(node.func)
            if options.get("shell", "False") != "False" or options.get("allow_pickle", "False") != "False":
                found.append(f"{called} with shell or allow_pickle")
            if called == "torch.load" and options.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if called == "yaml.load" and options.get("Loader") not in SAFE_LOADERS:
                found.append("yaml.load without a safe loader")
    return found


@pytest.mark.parametrize("path", sorted(
    path for folder in ("kd", "models", "losses", "data", "scripts") for path in (ROOT / folder).rglob("*.py")),
    ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_runs_data(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", [
    "eval(x)", "f = exec", "os.system(x)", "from os import system", "run(x, shell=True)", "run(x, shell=y)",
    "pickle.load(f)", "pickle.loads(b)", "from pickle import load", "torch.load(f)",
    "torch.load(f, weights_only=False)", "yaml.load(t)", "yaml.load(t, Loader=yaml.Loader)", "yaml.unsafe_load(t)",
    "numpy.load(f, allow_pickle=True)", "import marshal", "import joblib.hashing", "__import__('os')"])
def test_the_search_finds_what_it_looks_for(source):
    assert dangers(source)


def test_the_search_lets_the_harmless_pass():
    assert not dangers("model.eval()\nsubprocess.run(['git', 'log'])\nre.compile('x')\neval: int = 1\n"
                       "yaml.load(t, Loader=Yaml12Loader)\ntorch.load(f, weights_only=True)\njson.load(f)\nnp.load(f)")
