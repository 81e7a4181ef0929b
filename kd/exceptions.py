"""The errors of kd. Each message is one line: what is wrong, where, and what to do. Scripts end with its `exit_code`.

`ConfigError` and `CheckpointError` are in models, `DataError` and `MissingExtra` in data.
"""


class UsageError(ValueError):
    """A command that cannot be carried out as it was given."""

    exit_code = 2


class Incomplete(RuntimeError):
    """A command that was carried out except for some parts, which were reported before."""

    exit_code = 1


class TrainingError(RuntimeError):
    """Training that cannot continue."""

    exit_code = 1


class WorkDirError(OSError):
    """A work dir that a run cannot use."""

    exit_code = 2


class ExportError(RuntimeError):
    """An exported file that does not do what it should."""

    exit_code = 1


class ExportedFileError(ValueError):
    """An exported file that was given, and that cannot be used."""

    exit_code = 2


class Stopped(Exception):
    """A run that a signal stopped, after its state was saved."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """As shells do it."""
        return 128 + self.signum
