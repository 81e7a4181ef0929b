"""SIGTERM as an error, like SIGINT."""
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

AGAIN = 0.1  # seconds until a signal whose error Python has ignored is sent again


@contextmanager
def interrupts() -> Iterator[None]:
    """A context in which SIGTERM raises KeyboardInterrupt, as SIGINT does, with its number."""
    def interrupt(number: int, frame) -> None:
        raise KeyboardInterrupt(number)

    def again(ignored: "sys.UnraisableHookArgs") -> None:
        """Python ignores errors in some places, such as callbacks of a fork: the signal is sent once more."""
        if isinstance(ignored.exc_value, KeyboardInterrupt):
            number, = ignored.exc_value.args or (signal.SIGINT,)
            threading.Timer(AGAIN, os.kill, (os.getpid(), number)).start()
        else:
            hook(ignored)

    hook, sys.unraisablehook = sys.unraisablehook, again
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        sys.unraisablehook = hook
