"""What the scripts share: arguments, and errors that become one line and an exit code.

A script imports what it needs after it has read its arguments and its configuration, so that an error in them does not
wait seconds for PyTorch.
"""
import argparse
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_args

from data.output import BAD_PATHS, REASONS, OutputError, check_output, reason_of
from data.ranges import Range, Share

from .early import check_early
from .exceptions import UsageError
from .processes.interrupts import interrupts
from .work_dir.log import TqdmHandler

if TYPE_CHECKING:
    import torch

    from .config import Config


NO_MEMORY = ("DefaultCPUAllocator: ", "Storage size calculation overflowed")  # in PyTorch's messages
NUMBERS = {int: "an integer", float: "a number"}


def number(hint: Any) -> Callable[[str], float]:
    """The argparse type of the numbers that a hint from data/ranges.py allows."""
    kind, allowed = get_args(hint)

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {NUMBERS[kind]}, not text ({text!r})") from None
        if not abs(value) < (2 ** 32 if kind is int else inf):  # also for NaN
            raise argparse.ArgumentTypeError(f"must be a number that is not too large, not {text}")
        if value not in allowed:
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {value}")
        return value

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


def number_or_named(hint: Any) -> Callable[[str], tuple[str | None, float]]:
    """The argparse type of texts of the form NUMBER or NAME=NUMBER: the name, or None, and the number."""
    def read(text: str) -> tuple[str | None, float]:
        return named(hint)(text) if "=" in text else (None, number(hint)(text))

    read.hint = hint
    return read


def out_file(text: str, folder: bool = False) -> Path:
    """The argparse type of a file that is written at the end. If it cannot be, this says so before the work."""
    try:
        check_output(Path(text), folder)
    except OutputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def out_folder(text: str) -> Path:
    """The same of a folder that files are written to."""
    return out_file(text, folder=True)


# A --cfg that need not be given.
OPTIONAL = {"required": False, "help": "configuration; default: the one in the checkpoint"}
# Arguments that several scripts have.
SHARED = {
    "--cfg": {"required": True, "metavar": "FILE", "help": "configuration, see configs/"},
    "--checkpoint": {"required": True, "metavar": "PATH",
                     "help": "the weights, in any format: a file, a URL or zoo:NAME (summary.py --zoo)"},
    "--exported": {"type": Path, "metavar": "FILE",
                   "help": "a file of export.py (.onnx, .pt2 or .xml), instead of a checkpoint"},
    "--part": {"choices": ("student", "teacher"), "help": "which model of an FGD checkpoint"},
    "--classes": {"nargs": "+", "metavar": "NAME",
                  "help": "names of the classes; default: the checkpoint's names, or those of data.val"},
    "--score-thr": {"type": number(Share), "default": 0.3, "metavar": "SCORE",
                    "help": "detections with a lower score are left out; default: 0.3"},
    "runs": {"nargs": "+", "type": Path, "metavar": "RUN", "help": "work dirs of train.py; other paths are left out"},
    "--teacher-ap": {"type": number(Annotated[float, Range(0, 100)]), "metavar": "POINTS",
                     "help": "the teacher's AP, used if no run has recorded it"},
    "--device": {"choices": ("cpu", "cuda", "mps"),
                 "help": "default: cuda if there is one, otherwise cpu; mps is the GPU of a Mac"},
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
    one_of = result.add_mutually_exclusive_group(required=True) if "--exported" in shared else result
    for name in shared:
        settings = SHARED[name] | changes.get(name.strip("-").replace("-", "_"), {})
        if name in ("--checkpoint", "--exported"):
            one_of.add_argument(name, **settings | ({} if one_of is result else {"required": False}))
        else:
            result.add_argument(name, **settings)
    result.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return result


def load_config(path: str | Path | None, overrides: Sequence[str], *needed: str,
                checkpoint: str | Path | None = None) -> "Config":
    """The configuration, see `kd.load_config`; errors are found before PyTorch is imported.

    Args:
        path: a file; None for the configuration of the checkpoint, see `find_config`.
        needed: what must exist, see `kd.checks.check_files`.
        checkpoint: a file that must exist, too, unless it is an address.
    """
    check_early(path, overrides, needed, checkpoint)
    if path is None:
        from .checks import check_files
        from .inference.detectors import find_config

        cfg = find_config(checkpoint, overrides)
        check_files(cfg, needed)
        return cfg
    from .config import load_config

    return load_config(path, overrides)


def check_exported(args: argparse.Namespace, needs_cfg: bool = False) -> None:
    """Raise UsageError, before PyTorch is imported, for --exported with a missing file or with what is not for it."""
    if args.exported is None:
        return
    if not args.exported.is_file():
        raise UsageError(f"no such exported file: {args.exported}")
    if args.part is not None:
        raise UsageError("--part chooses from a checkpoint, and --exported is a single model: remove it")
    if getattr(args, "classes", None):
        raise UsageError("--classes names the classes of a checkpoint, and an exported file holds its names: remove it")
    if args.cfg is None and (needs_cfg or args.overrides):
        what = "with data.val" if needs_cfg else f"in which {args.overrides[0]} is set"
        raise UsageError(f"--exported needs --cfg, a configuration {what}: the file holds none")


def check_runs(paths: Sequence[Path]) -> None:
    """Raise UsageError, before PyTorch is imported, if none of the runs exists."""
    if not any(path.exists() for path in paths):
        raise UsageError(f"no run among {', '.join(map(str, paths))}: give work dirs of train.py")


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
        with interrupts():
            main()
            sys.stdout.flush()  # so that a full disk is reported here
    except (Exception, KeyboardInterrupt) as error:
        code, message = explain(error)
        if not code:
            raise
        if debug:
            traceback.print_exc()
        print(" ".join(message.splitlines()), file=sys.stderr)  # a path may have line breaks
    if "torch" in sys.modules:
        from .processes.distributed import stop_processes

        stop_processes()
    sys.exit(code)


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code of an error and a line about it; the code is 0 if the error is not known."""
    if isinstance(error, KeyboardInterrupt):
        number, = error.args or (signal.SIGINT,)
        return 128 + number, "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    if hasattr(error, "exit_code"):
        return error.exit_code, str(error) if error.exit_code > 128 else f"error: {error}"
    if isinstance(error, OSError) and error.filename is not None:
        return 2 if isinstance(error, BAD_PATHS) else 1, f"error: {error.filename}: {reason_of(error)}"
    if isinstance(error, OSError) and error.errno in REASONS:  # of the file that the shell sends the output to
        return 1, f"error: what this command prints cannot be written ({REASONS[error.errno]}): make room"
    if is_out_of_memory(error):
        reason = next(iter(str(error).splitlines()), "this machine has too little.").partition("DefaultCPUAllocator: ")
        return 1, (f"error: out of memory: {reason[2] or reason[0]} Lower data.batch_size (train.accumulate makes up "
                   "for it) or data.scale, or set train.amp=bf16")
    return 0, ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too small: PyTorch's error on a GPU, its message on a CPU, or Python's error."""
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or any(text in str(error) for text in NO_MEMORY))
