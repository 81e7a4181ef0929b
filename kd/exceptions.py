"""The errors of kd. Each message is one line: what is wrong, where, and what to do.

`ConfigError` and `CheckpointError` are in models, `DataError` and `MissingExtra` in data.
"""


class UsageError(ValueError):
    """A command that cannot be carried out as it was given."""


class Incomplete(RuntimeError):
    """A command that was carried out except for some parts, which were reported before."""


class TrainingError(RuntimeError):
    """Training that cannot continue."""


class WorkDirError(OSError):
    """A work dir that a run cannot use."""


class ExportError(RuntimeError):
    """An exported file that does not do what it should."""


class Stopped(Exception):
    """A run that a signal stopped, after its state was saved."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum
