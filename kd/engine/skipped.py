"""The images that data.skip_unreadable leaves out of a run."""
import logging

from ..processes import distributed


class SkippedImages:
    """The images that could not be read and were skipped: each named once in the log, and counted over the processes.

    A resumed run counts from zero again.
    """

    def __init__(self, log: logging.Logger):
        self.log = log
        self.lines: set[str] = set()

    def note(self, targets: list[dict]) -> None:
        """Log the images that were skipped in a batch, and remove their messages from its targets."""
        for target in targets:
            self._add(target.pop("skipped", ()))

    def report(self, epoch: int) -> None:
        """At the end of an epoch, log the images that other processes skipped, and the number over all processes."""
        self._add(distributed.gather(sorted(self.lines)))
        if self.lines:
            self.log.warning("epoch %d: %d images could not be read so far, and others took their places", epoch + 1,
                             len(self.lines))

    def _add(self, lines: list[str]) -> None:
        for line in lines:
            if line not in self.lines:
                self.lines.add(line)
                self.log.warning("skipped: %s", line)
