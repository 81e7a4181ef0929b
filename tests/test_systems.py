"""Other systems: modules, functions and signals that Windows lacks, and the number format that a Mac's GPU lacks."""
import json
import pickle
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from runs import ROOT, config, config_with, model
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from data import collate, generate_scenes
from data.coco.check import _ImageChecks
from data.inputs.files import ImageFiles, Sample
from data.sources.prepare import _Sizes, as_it_is
from kd import cli
from kd.config import parse_config
from kd.engine import train as engine
from kd.engine.run import build_run
from kd.engine.train import train
from kd.evaluation.evaluate import evaluate
from kd.exceptions import UsageError
from kd.inference.predict import as_it_is as as_it_is_in_predict
from kd.processes.distributed import start_processes
from kd.work_dir.checkpoint import read_checkpoint
from models.anchors import AnchorGenerator
from models.preprocess import Preprocess

CPU = torch.device("cpu")
# A program from which everything is hidden that Windows has not, also in the processes that it spawns. msvcrt, which
# only Windows has, locks with the hidden fcntl. SIGCHLD stays, because PyTorch takes this system for Linux. It prints
# the modules that it could import, and what scripts said.
WINDOWS = """
import contextlib, importlib, io, json, os, pathlib, pkgutil, runpy, signal, sys, types
import fcntl as hidden
import numpy, pycocotools.cocoeval, torch, torchvision  # first: they look for the system's name, and that is Linux's

def locking(number, mode, count):
    try:
        hidden.flock(number, hidden.LOCK_EX | hidden.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(13, "Permission denied") from None

sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
for name in ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "crypt", "readline"):
    sys.modules[name] = None
for name in ("fork", "forkpty", "setpgrp", "setpgid", "getpgid", "getpgrp", "setsid", "getsid", "killpg", "uname",
             "getuid", "geteuid", "getgid", "getegid", "getgroups", "seteuid", "setegid", "chown", "mkfifo", "nice",
             "register_at_fork", "sched_getaffinity", "getloadavg", "statvfs", "sysconf", "posix_fadvise"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGQUIT", "SIGPIPE", "SIGCONT",
             "SIGSTOP", "SIGTSTP", "alarm", "setitimer", "pause", "sigwait", "pthread_kill"):
    delattr(signal, name)

def main():
    sys.path.insert(0, os.getcwd())
    found = []
    for room in ("data", "losses", "models", "kd"):
        found += [module.name for module in pkgutil.walk_packages([room], f"{room}.")]
    for name in found:
        importlib.import_module(name)
    codes = {}
    for path in sorted(pathlib.Path("scripts").glob("*.py")):
        sys.argv = [str(path), "--help"]
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                runpy.run_path(str(path), run_name="__main__")
            except SystemExit as end:
                codes[path.name] = end.code
    from kd.engine.train import train
    from kd.exceptions import WorkDirError
    from kd.processes.memory import in_gib, peak_resident
    from kd.work_dir.lock import open_work_dir
    cfg, work_dir = json.load(sys.stdin)
    with contextlib.redirect_stdout(io.StringIO()):
        train(cfg, pathlib.Path(work_dir), torch.device("cpu"))
    with open_work_dir(pathlib.Path(work_dir)):
        try:
            open_work_dir(pathlib.Path(work_dir))
        except WorkDirError as error:
            locked = str(error)
    json.dump([found, codes, locked, in_gib(peak_resident())], sys.stdout)

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp("scenes"), train=8, val=4, size=(64, 64))


def test_everything_is_imported_and_a_run_trains_where_windows_functions_are_missing(scenes, tmp_path):
    """With spawned workers, its weights are those of a run without workers, bit for bit."""
    cfg = config(scenes, 1)
    (tmp_path / "program.py").write_text(WINDOWS, encoding="utf-8")
    given = [config_with(cfg, data={"workers": 1, "worker_start": "spawn"}), str(tmp_path / "windows")]
    done = subprocess.run([sys.executable, tmp_path / "program.py"], cwd=ROOT, input=json.dumps(given), text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found, codes, locked, memory = json.loads(done.stdout)
    files = [path for room in ("data", "losses", "models", "kd") for path in (ROOT / room).rglob("*.py")]
    assert len(found) == len(files) - 4  # the four rooms themselves
    assert codes == {path.name: 0 for path in (ROOT / "scripts").glob("*.py")}
    assert locked.startswith(f"another run is at work in {tmp_path / 'windows'}: ") and memory == "not measured"
    train(cfg, tmp_path / "linux", CPU)
    weights, others = (read_checkpoint(tmp_path / name / "last.pth")["model"] for name in ("windows", "linux"))
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def test_what_other_loaders_give_to_spawned_workers_can_be_pickled(scenes):
    """Those of check_data.py, prepare_data.py and predict.py start workers as the system does."""
    folder = scenes / "train"
    path = next(folder.glob("*.jpg"))
    entry = {"file_name": path.name, "width": 64, "height": 64}
    for dataset, expected in ((_ImageChecks(folder, scenes / "x.json", [entry]), (None, False)),
                              (_Sizes([path]), (64, 64)), (ImageFiles([path], [7], [(32, 32)]), 7)):
        found = pickle.loads(pickle.dumps(dataset))[0]
        assert (found.targets[0]["image_id"] if isinstance(found, Sample) else found) == expected
    for function in (collate, as_it_is, as_it_is_in_predict):
        assert pickle.loads(pickle.dumps(function)) is function


class NoFloat64(TorchDispatchMode):
    """Refuses what makes float64 out of something else, as a Mac's GPU does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        given, made = ({value.dtype for value in values if torch.is_tensor(value)}
                       for values in (args, result if isinstance(result, (list, tuple)) else [result]))
        if torch.float64 in made - given:
            raise TypeError(f"{func}: no float64 on this device")
        return result


@pytest.mark.parametrize("head", ["GFLHead", "FCOSHead"])
def test_training_and_evaluation_need_no_float64(scenes, tmp_path, monkeypatch, head):
    """Only anchors may use it, which are computed on the CPU, and what is computed after the transfer to the CPU."""
    distill = {"teacher": {"model": model(head=head), "checkpoint": None},
               "methods": [{"type": "CrossKD", "reused_teacher_head_idx": 1},
                           {"type": "FGD", "weight": {"gradient_share": 0.3}}]}
    cfg = config_with(config(scenes, 1, distill, head), train={"grad_norm_every": 1})
    on_cpu, level, double = [], AnchorGenerator.level, torch.Tensor.double

    def aside(call):
        def wrapper(*args):
            on_cpu.append(call)
            with _disable_current_modes():
                return call(*args)
        return wrapper

    for allowed in ((), ("cpu",)):
        monkeypatch.setattr("losses.reduce.WITHOUT_FLOAT64", set(allowed))
        run = build_run(parse_config(cfg), tmp_path, CPU)
        run.model.to("cpu").train()
        assert run.student.preprocess.mean.dtype == (torch.float32 if allowed else torch.float64)
        with monkeypatch.context() as patch, NoFloat64():
            patch.setattr(AnchorGenerator, "level", aside(level))
            patch.setattr(torch.Tensor, "double", aside(double))
            if not allowed:  # so the test can fail
                with pytest.raises(TypeError, match="no float64"):
                    engine.train_step(run, run.model, [next(iter(run.train_loader))])
                continue
            losses, norms = engine.train_step(run, run.model, [next(iter(run.train_loader))])
            assert losses["loss"].isfinite() and norms.keys() == {"student", "CrossKD0", "FGD1"}
            run.student.test.score_thr = 0.0
            figures = evaluate(run.student, run.val_loader, CPU)
            assert figures["AP"] is not None and double in on_cpu and level in on_cpu


def test_statistics_are_float64_again_after_a_device_without_it(monkeypatch):
    net = Preprocess()
    before = net.mean.clone()
    monkeypatch.setattr("losses.reduce.WITHOUT_FLOAT64", {"meta"})
    assert net.to("meta").mean.dtype == torch.float32 and net.mean.device.type == "meta"
    assert torch.equal(net.to_empty(device="cpu").half().mean, before) and net.mean.dtype == torch.float64


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there(monkeypatch, name):
    monkeypatch.setattr(f"torch.{name}.is_available", lambda: False)
    with pytest.raises(UsageError) as caught:
        cli.choose_device(name)
    assert str(caught.value) == f"--device {name}: no {name.upper()} device is available here; use --device cpu"
    monkeypatch.setattr(f"torch.{name}.is_available", lambda: True)
    assert cli.choose_device(name).type == name


def test_mps_takes_one_process(monkeypatch):
    assert start_processes(torch.device("mps")) == torch.device("mps")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--device mps works with one process only"):
        start_processes(torch.device("mps"))


def test_a_broken_step_is_skipped_where_the_optimiser_does_not_heed_the_flag(scenes, tmp_path, monkeypatch):
    """On MPS, as far as it can be tested on another device: the step is not asked for at all."""
    run = build_run(parse_config(config(scenes, 1)), tmp_path, CPU)
    run.model.train()
    batch = next(iter(run.train_loader))
    asked = []
    monkeypatch.setattr(run.optimizer, "step", lambda *args: asked.append(run.step))
    original = engine.compute_losses

    def broken(*args):
        run.device = SimpleNamespace(type="mps")  # after the batch was moved
        result = original(*args[:3], CPU, *args[4:])
        return result if run.step == 0 else result._replace(total=result.total * float("nan"))

    monkeypatch.setattr(engine, "compute_losses", broken)
    for _ in range(2):
        run.device = CPU
        engine.train_step(run, run.model, [batch])
    assert asked == [0]


def test_signals_that_stop_a_run(monkeypatch):
    """SIGBREAK exists on Windows only."""
    from importlib import reload

    from kd.processes import signals
    assert signals.STOP == [signal.SIGINT, signal.SIGTERM]
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    assert reload(signals).STOP == [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    monkeypatch.undo()
    reload(signals)
