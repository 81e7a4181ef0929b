"""Whether other processes use the machine while something is measured."""
import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
OTHERS = 0.05  # share of all CPUs' time that others may use before there is a warning
STOLEN = 0.02  # share of all CPUs' time that other virtual machines may use
LOADED = 0.5   # processes per CPU that may be running at the start, where the system does not tell more


class BusyWatch:
    """Adds up over its contexts how much of the machine others use.

    Attributes:
        seconds: the length of all contexts.
        others: CPUs that other processes used, on average; None where the system does not say (not Linux).
        stolen: CPUs that other virtual machines used, likewise.
        load: processes that were running before the first context; None on Windows.
    """

    def __init__(self):
        self.cpus = os.cpu_count() or 1
        self.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self.seconds, self._used = 0.0, [0.0, 0.0]

    def __enter__(self) -> "BusyWatch":
        self._start = time.perf_counter(), used()
        return self

    def __exit__(self, *_: object) -> None:
        start, before = self._start
        self.seconds += time.perf_counter() - start
        now = used()
        self._used = None if None in (before, now, self._used) else [
            total + new - old for total, new, old in zip(self._used, now, before)]

    @property
    def others(self) -> float | None:
        return None if self._used is None or not self.seconds else max(0.0, self._used[0] / self.seconds)

    @property
    def stolen(self) -> float | None:
        return None if self._used is None or not self.seconds else max(0.0, self._used[1] / self.seconds)

    def record(self) -> dict:
        """What was found, for the report, with the warning or None."""
        return {"cpus": self.cpus, "load": self.load, "others": self.others, "stolen": self.stolen,
                "warning": self.warning()}

    def warning(self) -> str | None:
        """A line if times are not to be trusted; None on a quiet machine, or where the system does not tell."""
        found = []
        if self.others is not None:
            if self.others > OTHERS * self.cpus:
                found.append(f"other processes used {self.others:.1f} of {self.cpus} CPUs")
            if self.stolen > STOLEN * self.cpus:
                found.append(f"other virtual machines took {self.stolen / self.cpus:.0%} of the CPUs' time")
        elif self.load is not None and self.load > LOADED * self.cpus:
            found.append(f"{self.load:.1f} processes were running at the start, on {self.cpus} CPUs")
        return f"WARNING: {' and '.join(found)}: times vary; measure on a quiet machine" if found else None


def used() -> tuple[float, float] | None:
    """CPU seconds so far of all other processes, and of other virtual machines; None if the system does not say."""
    try:
        numbers = STAT.read_text(encoding="ascii").split("\n", 1)[0].split()
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, irq, softirq, stolen = (int(number) / tick for number in numbers[1:9])
    except (OSError, ValueError, AttributeError):
        return None
    own = os.times()
    return user + nice + system + irq + softirq - sum(own[:4]), stolen
