"""Errors in arguments and configurations come before PyTorch is imported, and are those of the full check."""
import json
import subprocess
import sys

import pytest
from runs import CONFIGS, ROOT

import data
import kd
from kd import load_config
from kd.checks import check_files

STUDENT, CROSSKD = "configs/bccd/student_gfl_r18w16.yaml", "configs/bccd/crosskd_gfl_r18w16_r18w32.yaml"
FGD = "configs/bccd/fgd_gfl_r18w16_r18w32.yaml"
BAD = [  # configuration, overrides, and what is needed
    ("none.yaml", [], (), None), (STUDENT, ["train.epohcs=3"], (), None), (STUDENT, ["data.flip=2"], (), None),
    (STUDENT, ["data.train_augment=ligth"], (), None),
    (STUDENT, ["data.train_augment=[{type: Mosaik}]"], (), None),
    (STUDENT, ["data.train_augment=[{type: MixUp}, {type: RandomCrop, scale: [0.9, 0.5]}]"], (), None),
    (STUDENT, ["no override"], (), None), (STUDENT, ["model.backbone.depht=18"], (), None),
    (STUDENT, ["model.head.type=GLFHead"], (), None), (STUDENT, ["model.head.assigner.topk=a"], (), None),
    (STUDENT, ["optimizer.momentum=2"], (), None), (STUDENT, ["schedule.gamma=[]"], (), None),
    (STUDENT, [], ("val",), None), (STUDENT, ["data.train=[{images: a, annotations: b}]"], ("train",), None),
    (STUDENT, ["data.train=[]"], (), None), (STUDENT, ["data.val.repeat=2"], (), None),
    (STUDENT, ["data.train=[{images: a}]"], (), None), (STUDENT, ["optimizer.lr={per_image: -1}"], (), None),
    (STUDENT, [], (), "none.pth"), (CROSSKD, ["distill.methods.0.idx=3"], (), None),
    (CROSSKD, ["distill.methods.0.weight={gradient_share: 0}"], (), None),
    (CROSSKD, ["distill.methods.0.weight.gradient_shre=1"], (), None),
    (CROSSKD, [], (), None), (CROSSKD, ["distill.teacher.cfg=none.yaml"], (), None),
    (CROSSKD, ["distill.teacher.checkpoint=none.pth"], (), None),
    (CROSSKD, ["distill.teacher.checkpoint=zoo:none"], (), None), (STUDENT, ["train.init=none.pth"], ("init",), None),
    (STUDENT, ["train.init=zoo:none"], ("init",), None), (STUDENT, ["train.init_classes=[a]"], (), None),
    (CROSSKD, ["train.init=a.pth", "distill.init_student=true"], (), None),
    (CROSSKD, ["distill.teacher.class_map=[null,null]"], (), None),
    (CROSSKD, ["distill.teacher.class_map=[0,null,1]"], (), None),
    (CROSSKD, ["distill.teacher={torchvision: fcos_resnet50_fpn, checkpoint: DEFAULT}"], (), None),
    (CROSSKD, ["distill.teacher={factory: no_such_module.teachers:build, checkpoint: null}"], (), None),
    (CROSSKD, ["distill.teacher={factory: build, checkpoint: null}"], (), None),
    (FGD, ["distill.teacher={torchvision: fcos_resnet50_fpn, checkpoint: none.pth}"], (), None),
    (CROSSKD, ["distill.cache=a", "data.train_augment=light"], (), None),
    (CROSSKD, ["distill.cache=a", "data.multi_scale=[[64, 64]]"], (), None),
    (CROSSKD, ["distill.cache=a", "distill.eval_teacher=false"], (), None),
    (CROSSKD, ["distill.cache=a", "distill.teacher.shard=true"], (), None),
    (CROSSKD, ["distill.cache={dir: a, precision: bf16}"], (), None), (CROSSKD, ["distill.cache=README.md"], (), None)]
# Runs in a new process: reads cases as JSON, and writes the message of each, and what was imported.
ALL_EARLY = """
import json, sys
from kd.early import OURS, SLOW, check_early
there, messages = set(sys.modules), []
for case in json.load(sys.stdin):
    try:
        check_early(*case)
        messages.append(None)
    except Exception as error:
        messages.append([type(error).__name__, str(error), error.exit_code])
new = [name for name in set(sys.modules) - there if name.partition(".")[0] in OURS + SLOW]
import data, kd
left = [name for name in ("build", "config", "methods") if name in vars(kd)]
json.dump([messages, new + left], sys.stdout)
"""
# Runs in a new process: each script with an argument that does not exist.
ALL_SCRIPTS = """
import contextlib, io, json, pathlib, runpy, sys
codes = {}
for path in sorted(pathlib.Path("scripts").glob("*.py")):
    sys.argv = [str(path), "--no-such-argument"]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        codes[path.name] = end.code
    codes[path.name] = codes.get(path.name), "torch" in sys.modules
json.dump(codes, sys.stdout)
"""


def in_new_process(code: str, given: object = None):
    """The JSON that the code prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, input=json.dumps(given), text=True, check=True,
                          capture_output=True)
    return json.loads(done.stdout)


def full_check(path: str, overrides: list[str], splits: tuple[str, ...], checkpoint: str | None) -> list:
    with pytest.raises(Exception) as caught:
        check_files(load_config(path, overrides), splits, checkpoint)
    return [type(caught.value).__name__, str(caught.value), caught.value.exit_code]


def test_the_early_check_says_what_the_full_check_says(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DENSEKD_DATA", str(tmp_path))
    messages, new = in_new_process(ALL_EARLY, [*BAD, (STUDENT, [], (), None)])
    assert messages == [full_check(*case) for case in BAD] + [None] and not new


def test_every_configuration_is_read_with_stand_ins():
    """An error that is not ours would hide here: the early check would say nothing, and errors would be late."""
    code = """
import json, sys
from importlib import import_module
from kd.early import stand_ins
with stand_ins():
    for path in json.load(sys.stdin):
        import_module("kd.checks").check_files(import_module("kd.config").load_config(
            path, [] if "/_base_/" in path else ["distill=null"]))
print("torch" in sys.modules)
"""
    paths = list(map(str, CONFIGS))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, input=json.dumps(paths), text=True,
                          capture_output=True)
    assert (done.stdout, done.stderr) == ("False\n", "") and len(paths) > 50


def test_a_logger_that_is_not_installed_is_found_before_pytorch_is_imported():
    code = """
import json, sys
sys.modules["mlflow"] = None
from kd.early import check_early
try:
    check_early(json.load(sys.stdin), ["train.loggers=[mlflow]"], ("train", "val"))
except Exception as error:
    print(json.dumps([type(error).__name__, error.exit_code, str(error)[:45], "torch" in sys.modules]))
"""
    assert in_new_process(code, STUDENT) == ["MissingExtra", 2, "train.loggers needs mlflow, which is not inst", False]


def test_no_script_imports_pytorch_for_its_arguments():
    codes = in_new_process(ALL_SCRIPTS)
    assert codes == {path.name: [2, False] for path in (ROOT / "scripts").glob("*.py")}


def test_missing_runs_and_checkpoints_are_found_before_pytorch_is_imported():
    """In scripts without a configuration."""
    code = (f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r})\nfor name, arguments in "
            "(('compare', 'a'), ('plot', 'a --out b'), ('convert', '--checkpoint a --to mmdet --out b')):\n"
            "    sys.argv = [name, *arguments.split()]\n    try:\n"
            f"        runpy.run_path({str(ROOT / 'scripts')!r} + f'/{{name}}.py', run_name='__main__')\n"
            "    except SystemExit as end:\n        print(end.code, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.stdout == "2 False\n" * 3
    runs = "error: no run among a: give work dirs of train.py"
    assert done.stderr.splitlines() == [runs, runs, "error: no such checkpoint file: a"]


@pytest.mark.parametrize("package", [kd, data])
def test_names_of_packages(package):
    """Names that are imported when they are used are all there, and others are not."""
    assert all(getattr(package, name).__name__ for name in package.__all__ if name != "METHODS")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018
