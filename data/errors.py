"""What bad data raises."""


class DataError(ValueError):
    """Data that cannot be used. The message is one line: what is wrong, in which file, what to do about it."""

    def __init__(self, message: str):
        # An error from a DataLoader worker is raised again in the main process with its whole traceback as the
        # message; the last line of that is the message which was meant.
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f"{__name__}.{type(self).__name__}: "))


class UnreadableImage(DataError):
    """An image file that is missing, damaged or of an unknown format: the one error that training may skip."""
