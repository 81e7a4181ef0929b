"""What data.skip_unreadable leaves out of a run."""
import logging

from ..processes import distributed


class SkippedImages:
    """The images that could not be read and were skipped: each named once in the log, and counted over the processes.

    A resumed run begins to count anew.
    """

    def __init__(self, log: logging.Logger):
        self.log = log
        self.lines: set[str] = set()

    def note(self, targets: list[dict]) -> None:
        """Take what was skipped out of a batch's targets."""
        for target in targets:
            self._add(target.pop("skipped", ()))

    def report(self, epoch: int) -> None:
        """At the end of an epoch, the number of all processes; those of other processes are named by now, too."""
        self._add(distributed.gather(sorted(self.lines)))
        if self.lines:
            self.log.warning("epoch %d: %d images could not be read so far, and others took their places", epoch + 1,
                             len(self.lines))

    def _add(self, lines: list[str]) -> None:
        for line in lines:
            if line not in self.lines:
                self.lines.add(line)
                self.log.warning("skipped: %s", line)
