"""Stops a run after its state is saved."""
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .distributed import Agreement

# Windows sends SIGBREAK, for Ctrl-Break, and to a process group; it has no SIGTERM from other processes.
STOP = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
ECHO = 2.0  # seconds in which a signal counts as a repeat: a launcher forwards signals that all processes have got



class StopAsked(KeyboardInterrupt):
    """Raised where `StopSignals` is asked to stop; its argument is the signal's number."""


class StopSignals:
    """Remembers the signals `STOP` while the context is open; a second one ends the program at once.

    `asked` is the number of the received signal, 0 before that.
    """

    def __init__(self):
        self._agreement, self._at_once = Agreement(), False

    def agreed(self) -> int:
        """The signal that any process had received by the previous call, or 0; the same answer in all processes."""
        return self._agreement(self.asked)

    def agreed_now(self) -> int:
        """The signal that any process has received, or 0; it waits until all processes have come here."""
        self.agreed()
        return self.agreed()

    def raise_agreed(self) -> None:
        """Raise StopAsked, in all processes at the same call, if any had received a signal by the previous call."""
        if number := self.agreed():
            raise StopAsked(number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A context for long work in this process alone: a signal raises StopAsked there."""
        self._at_once = True
        try:
            if self.asked:
                raise StopAsked(self.asked)
            yield
        finally:
            self._at_once = False

    def __enter__(self) -> "StopSignals":
        self.asked, self._when = 0, 0.0
        self._previous = {number: signal.signal(number, self._remember) for number in STOP}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        if not self.asked:
            self.asked, self._when = number, time.monotonic()
            if self._at_once:
                raise StopAsked(number)
        elif time.monotonic() - self._when > ECHO:
            self.__exit__()
            signal.raise_signal(number)
