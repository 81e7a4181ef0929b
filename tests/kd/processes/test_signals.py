"""Signals that ask a run to stop."""
import signal
import time

import pytest
import torch
from processes import together
from runs import config, config_with, run_script, write_config

from data import generate_scenes
from kd import cli
from kd.engine import train as engine
from kd.evaluation import evaluate
from kd.exceptions import Stopped
from kd.processes.distributed import rank
from kd.processes.interrupts import interrupts
from kd.processes.signals import StopAsked, StopSignals
from kd.work_dir.checkpoint import read_checkpoint
from models import Detector


@pytest.fixture
def interruptible():
    """Let SIGINT work as in a terminal; a process that a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_and_its_echo_ask_and_a_later_one_ends_the_program(interruptible, monkeypatch):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert stop.asked == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # torchrun forwards signals that the whole process group has got
        signal.raise_signal(signal.SIGINT)
        assert stop.asked == signal.SIGTERM
        monkeypatch.setattr("kd.processes.signals.ECHO", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# The process that gets the signal, and when: in its n-th batch of the evaluation, or while figures are computed.
CASES = [(1, 1), (1, 3), (0, "figures"), (1, "figures")]


def stop_at(which: int, place: int | str, cfg: dict, folder) -> list[int]:
    """The signal that stopped the run, the number of batches that were evaluated, and whether there are figures."""
    predict, compute, batches = Detector.predict, evaluate.coco_evaluation, 0

    def predict_and_ask(self, images, targets):
        nonlocal batches
        batches += 1
        if (rank(), batches) == (which, place):
            signal.raise_signal(signal.SIGTERM)
        return predict(self, images, targets)

    def compute_and_ask(*arguments):  # in the first process; the other one waits for it
        if (which, place) == (0, "figures"):
            signal.raise_signal(signal.SIGTERM)
        return compute(*arguments)

    def evaluate_and_ask(*arguments, **options):
        figures = evaluate.evaluate(*arguments, **options)
        if (which, place) == (1, "figures") and rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return figures

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr(Detector, "predict", predict_and_ask)
        patch.setattr(evaluate, "coco_evaluation", compute_and_ask)
        patch.setattr(engine, "evaluate", evaluate_and_ask)
        engine.train(cfg, folder, torch.device("cpu"))
    return [stopped.value.signum, batches, read_checkpoint(folder / "last.pth")["evaluated"]]


def stop_in_each_place(cfg: dict, folder) -> list[list[int]]:
    return [stop_at(which, place, cfg, folder / str(i)) for i, (which, place) in enumerate(CASES)]


def test_a_signal_to_one_process_stops_the_evaluation_of_all(tmp_path):
    """Of 7 batches, the first process has 4 and the second 3."""
    scenes = generate_scenes(tmp_path / "scenes", train=4, val=7, size=(64, 64))
    cfg = config_with(config(scenes, 2), data={"batch_size": 2}, eval={"batch_size": 1})
    first, second = together(stop_in_each_place, 2, tmp_path / "results", cfg, tmp_path)
    assert [signum for signum, _, _ in first] == [signum for signum, _, _ in second] == [signal.SIGTERM] * len(CASES)
    assert [evaluated for _, _, evaluated in first] == [False, False, False, True]
    # The others hear of it one batch later, all of them at the same.
    assert [batches for _, batches, _ in first] == [2, 4, 4, 4]
    assert [batches for _, batches, _ in second] == [2, 3, 3, 3]


def test_a_signal_is_heard_within_long_work_and_only_there():
    stop = StopSignals()
    with stop, pytest.raises(StopAsked) as caught:
        with stop.at_once():
            signal.raise_signal(signal.SIGTERM)
            time.sleep(60)
    assert caught.value.args == (signal.SIGTERM,)
    with stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StopAsked), stop.at_once():  # it came before
            time.sleep(60)
        assert stop.agreed() == stop.agreed_now() == signal.SIGTERM


@pytest.mark.parametrize("number, code, text", [(signal.SIGTERM, 143, "stopped by SIGTERM"),
                                                (signal.SIGINT, 130, "interrupted")])
def test_a_signal_ends_any_script_with_one_line(interruptible, tmp_path, monkeypatch, capsys, number, code, text):
    """Here while --check builds the model, in which nothing else listens."""
    before = signal.getsignal(signal.SIGTERM)
    path = write_config(tmp_path / "cfg.yaml", config(generate_scenes(tmp_path / "scenes", 2, 1, (64, 64))))
    monkeypatch.setattr("kd.engine.run.build_model", lambda *_, **__: signal.raise_signal(number))
    assert run_script(monkeypatch, "train.py", "--cfg", path, "--check", "--device", "cpu") == code
    assert capsys.readouterr().err.strip().splitlines()[-1] == text
    assert signal.getsignal(signal.SIGTERM) is before
    assert cli.explain(KeyboardInterrupt()) == (130, "interrupted")


def test_a_signal_is_not_lost_where_python_ignores_errors(interruptible):
    class Deaf:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt) as caught, interrupts():
        Deaf()
        time.sleep(30)
    assert caught.value.args == (signal.SIGTERM,) and time.monotonic() - start < 10
