"""What the scripts share: arguments, and errors that become one line and an exit code.

A script imports what it needs after it has read its arguments and its configuration, so that an error in them does not
wait seconds for PyTorch.
"""
import argparse
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.output import BAD_PATHS

from .early import check_early
from .exceptions import UsageError
from .work_dir.log import TqdmHandler

if TYPE_CHECKING:
    import torch

    from .config import Config

# Arguments that several scripts have.
SHARED = {
    "--cfg": {"required": True, "metavar": "FILE", "help": "configuration, see configs/"},
    "--checkpoint": {"required": True, "metavar": "PATH", "help": "file or URL of the weights, in any format"},
    "--part": {"choices": ("student", "teacher"), "help": "which model of an FGD checkpoint"},
    "--classes": {"nargs": "+", "metavar": "NAME",
                  "help": "names of the classes; default: the checkpoint's names, or those of data.val"},
    "--score-thr": {"type": float, "default": 0.3, "metavar": "SCORE",
                    "help": "detections with a lower score are left out; default: 0.3"},
    "runs": {"nargs": "+", "type": Path, "metavar": "RUN", "help": "work dirs of train.py; other paths are left out"},
    "--teacher-ap": {"type": float, "metavar": "POINTS", "help": "the teacher's AP, used if no run has recorded it"},
    "--device": {"choices": ("cpu", "cuda", "mps"),
                 "help": "default: cuda if there is one, otherwise cpu; mps is the GPU of a Mac"},
    "overrides": {"nargs": "*", "metavar": "key=value", "help": "settings that replace those of the file"}}


def parser(description: str, example: str, *shared: str, **changes: dict) -> argparse.ArgumentParser:
    """An argument parser whose help ends with an example.

    Args:
        shared: names of arguments from `SHARED`.
        changes: settings that replace those in `SHARED`, by the argument's name in Python.
    """
    result = argparse.ArgumentParser(description=description, epilog=f"example: {example}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in shared:
        result.add_argument(name, **SHARED[name] | changes.get(name.strip("-").replace("-", "_"), {}))
    result.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return result


def load_config(path: str | Path, overrides: Sequence[str], *splits: str,
                checkpoint: str | Path | None = None) -> "Config":
    """The configuration, see `kd.load_config`; errors are found before PyTorch is imported.

    Args:
        splits: parts of the data that are needed, "train" or "val"; their files must exist.
        checkpoint: a file that must exist, too, unless it is an address.
    """
    check_early(path, overrides, splits, checkpoint)
    from .config import load_config

    return load_config(path, overrides)


def choose_device(name: str | None) -> "torch.device":
    """The named device, by default CUDA if available, otherwise the CPU; UsageError if the device is not available."""
    import torch

    if name not in (None, "cpu") and not getattr(torch, name).is_available():
        raise UsageError(f"--device {name}: no {name.upper()} device is available here; use --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def fraction(points: float | None) -> float | None:
    """Convert an AP from points, as people give it, to the fraction that the code uses."""
    return None if points is None else points / 100


def say(text: str) -> None:
    """Print in the first process; the others print nothing."""
    from .processes.distributed import rank

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
    except (Exception, KeyboardInterrupt) as error:
        code, message = explain(error)
        if not code:
            raise
        if debug:
            traceback.print_exc()
        print(message, file=sys.stderr)
    if "torch" in sys.modules:
        from .processes.distributed import stop_processes

        stop_processes()
    sys.exit(code)


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code of an error and a line about it; the code is 0 if the error is not known."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if hasattr(error, "exit_code"):
        return error.exit_code, str(error) if error.exit_code > 128 else f"error: {error}"
    if isinstance(error, OSError) and error.filename is not None:
        return 2 if isinstance(error, BAD_PATHS) else 1, f"error: {error}"
    if type(error).__name__ == "OutOfMemoryError":  # PyTorch's
        return 1, (f"error: out of memory: {str(error).splitlines()[0]} Lower data.batch_size (train.accumulate makes "
                   "up for it) or data.scale, or set train.amp=bf16")
    return 0, ""
