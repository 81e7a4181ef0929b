"""Signals that ask a run to stop."""
import signal

import pytest

from kd.engine import signals
from kd.engine.signals import StopSignals


def test_a_signal_and_its_echo_ask_and_a_later_one_ends_the_program(monkeypatch):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert stop.asked == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # torchrun passes on what the whole process group has got
        signal.raise_signal(signal.SIGINT)
        assert stop.asked == signal.SIGTERM
        monkeypatch.setattr(signals, "ECHO", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
