"""Stops a run after its state is saved."""
import signal
import time

from .distributed import Agreement

# Windows sends SIGBREAK, for Ctrl-Break, and to a process group; it has no SIGTERM from other processes.
STOP = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
ECHO = 2.0  # seconds in which a signal counts as a repeat: a launcher forwards signals that all processes have got


class StopSignals:
    """Remembers the signals `STOP` while the context is open; a second one ends the program at once.

    `asked` is the number of the received signal, 0 before that.
    """

    def __init__(self):
        self._agreement = Agreement()

    def agreed(self) -> int:
        """The signal that any process had received by the previous call, or 0; the same answer in all processes."""
        return self._agreement(self.asked)

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
        elif time.monotonic() - self._when > ECHO:
            self.__exit__()
            signal.raise_signal(number)
