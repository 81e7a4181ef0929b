"""Signals that ask a run to stop."""
import signal

import pytest

from kd.processes import signals
from kd.processes.signals import StopSignals


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
        monkeypatch.setattr(signals, "ECHO", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
