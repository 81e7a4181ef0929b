"""What the scripts share: arguments, and errors that become one line and an exit code."""
import argparse
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import torch

from data import DataError
from data.extras import MissingExtra
from data.output import OutputError
from data.ranges import Range, Share
from data.sources.download import DownloadError
from models import ConfigError
from models.build import check_value
from models.weights import CheckpointError

from .exceptions import ExportError, Incomplete, Stopped, TrainingError, UsageError, WorkDirError
from .processes.distributed import rank, stop_processes
from .work_dir.log import TqdmHandler

BAD_INPUT = (ConfigError, DataError, CheckpointError, UsageError, MissingExtra, WorkDirError)
FAILURES = (TrainingError, ExportError, DownloadError, Incomplete)
# Errors of the operating system about a path that the user gave.
BAD_PATHS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def number(hint: Any) -> Callable[[str], float]:
    """The argparse type of the numbers that a hint from data/ranges.py allows."""
    kind, _ = get_args(hint)

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = text  # which is then refused
        try:
            return check_value(value, hint, "")
        except ConfigError as error:
            raise argparse.ArgumentTypeError(error.problem) from None

    read.hint = hint
    return read


def named(hint: Any) -> Callable[[str], tuple[str, float]]:
    """The argparse type of texts of the form NAME=NUMBER, with the numbers that a hint allows: name and number."""
    def read(text: str) -> tuple[str, float]:
        name, _, value = text.rpartition("=")
        if not name:
            raise argparse.ArgumentTypeError(f'"{text}" is not of the form NAME=NUMBER')
        return name, number(hint)(value)

    read.hint = hint
    return read


# Arguments that several scripts have.
SHARED = {
    "--cfg": {"required": True, "metavar": "FILE", "help": "configuration, see configs/"},
    "--checkpoint": {"required": True, "metavar": "PATH", "help": "file or URL of the weights, in any format"},
    "--part": {"choices": ("student", "teacher"), "help": "which model of an FGD checkpoint"},
    "--classes": {"nargs": "+", "metavar": "NAME",
                  "help": "names of the classes; default: the checkpoint's names, or those of data.val"},
    "--score-thr": {"type": number(Share), "default": 0.3, "metavar": "SCORE",
                    "help": "detections with a lower score are left out; default: 0.3"},
    "runs": {"nargs": "+", "type": Path, "metavar": "RUN", "help": "work dirs of train.py; other paths are left out"},
    "--teacher-ap": {"type": number(Annotated[float, Range(0, 100)]), "metavar": "POINTS",
                     "help": "the teacher's AP, used if no run has recorded it"},
    "--device": {"choices": ("cpu", "cuda"), "help": "default: cuda if there is one"},
    "overrides": {"nargs": "*", "metavar": "key=value", "help": "settings that replace those of the file"}}


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong argument in one line, as all errors are reported."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help shows all arguments\n")


def parser(description: str, example: str, *shared: str, **changes: dict) -> argparse.ArgumentParser:
    """An argument parser whose help ends with an example.

    Args:
        shared: names of arguments from `SHARED`.
        changes: settings that replace those in `SHARED`, by the argument's name in Python.
    """
    result = Parser(description=description, epilog=f"example: {example}",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in shared:
        result.add_argument(name, **SHARED[name] | changes.get(name.strip("-").replace("-", "_"), {}))
    result.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return result


def choose_device(name: str | None) -> torch.device:
    """The named device, by default CUDA if available, otherwise the CPU; UsageError if "cuda" is not available."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is available here; use --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def fraction(points: float | None) -> float | None:
    """Convert an AP from points, as people give it, to the fraction that the code uses."""
    return None if points is None else points / 100


def say(text: str) -> None:
    """Print in the first process; the others print nothing."""
    if rank() == 0:
        print(text)


def wrote(*paths: Path) -> None:
    """Print which files were written, see `say`."""
    say(f"wrote {' and '.join(map(str, paths))}")


def run(main: Callable[[], None]) -> None:
    """Run a script's main and exit: 0 done, 1 failed, 2 bad usage, configuration or data, 128 + n stopped by signal n.

    A known error prints one line, an unknown error its traceback; with --debug, all errors print their tracebacks. An
    error from the operating system is known if it names the path.
    """
    debug = "--debug" in sys.argv  # in any place, also after a subcommand
    sys.argv = [word for word in sys.argv if word != "--debug"]
    if hasattr(sys.stdout, "reconfigure"):  # for terminals that cannot show a class's name
        sys.stdout.reconfigure(errors="backslashreplace")
    log = logging.getLogger("densekd")  # reports from the code, for example on loaded weights
    log.handlers, log.propagate = [TqdmHandler()], False
    log.setLevel(logging.INFO)
    code = 0
    try:
        main()
    except (*BAD_INPUT, *FAILURES, Stopped, torch.OutOfMemoryError, OSError, KeyboardInterrupt) as error:
        code, message = explain(error)
        if not code:
            raise
        if debug:
            traceback.print_exc()
        print(message, file=sys.stderr)
    stop_processes()
    sys.exit(code)


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code of an error and a line about it; the code is 0 if the error is not known."""
    if isinstance(error, Stopped):
        return 128 + error.signum, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, torch.OutOfMemoryError):
        return 1, (f"error: out of memory: {str(error).splitlines()[0]} Lower data.batch_size (train.accumulate makes "
                   "up for it) or data.scale, or set train.amp=bf16")
    if isinstance(error, BAD_INPUT):
        return 2, f"error: {error}"
    if isinstance(error, FAILURES):
        return 1, f"error: {error}"
    cause = error.__cause__ if isinstance(error, OutputError) else error
    if isinstance(error, OutputError) or error.filename is not None:
        return 2 if isinstance(cause, BAD_PATHS) else 1, f"error: {error}"
    return 0, ""
