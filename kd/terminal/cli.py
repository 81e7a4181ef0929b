"""What the scripts share: common arguments, and errors as one line and an exit code."""
import argparse
import sys
from collections.abc import Callable

import torch

from data import DataError
from models import ConfigError
from models.weights import CheckpointError

from ..extras import MissingExtra
from ..inference.export import ExportError
from ..processes.distributed import rank, stop_processes
from ..processes.signals import Stopped
from ..work_dir.lock import WorkDirError
from ..work_dir.log import TrainingError

# What the system says of a path that was given and cannot be used.
BAD_PATHS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class UsageError(ValueError):
    """A command that cannot be carried out as it was given."""


class Incomplete(RuntimeError):
    """A command that was carried out but for what was told meanwhile."""


def parser(description: str, example: str, device: bool = True, needs_cfg: bool = True) -> argparse.ArgumentParser:
    """An argument parser with --cfg, --device and overrides, whose help ends with an example."""
    result = argparse.ArgumentParser(description=description, epilog=f"example: {example}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--cfg", required=needs_cfg, metavar="FILE", help="configuration, see configs/")
    if device:
        result.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    result.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    return result


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is.

    Raises:
        UsageError: CUDA was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is available here; use --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def say(text: str) -> None:
    """Print, of several processes in the first alone."""
    if rank() == 0:
        print(text)


def run(main: Callable[[], None]) -> None:
    """Run a script's main and exit: 0 done, 1 failed, 2 bad usage, configuration or data, 128 + n by signal n."""
    code = 0
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that cannot show a class's name is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ConfigError, DataError, CheckpointError, UsageError, MissingExtra, WorkDirError, *BAD_PATHS) as error:
        code, message = 2, f"error: {error}"
    except (TrainingError, ExportError, Incomplete) as error:
        code, message = 1, f"error: {error}"
    except torch.OutOfMemoryError as error:
        code, message = 1, (f"error: out of memory: {str(error).splitlines()[0]} Lower data.batch_size "
                            "(train.accumulate makes up for it) or data.scale, or set train.amp=bf16")
    except Stopped as error:
        code, message = 128 + error.signum, str(error)
    except OSError as error:  # a disk that is full, say
        code, message = 1, f"error: {error}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    if code:
        print(message, file=sys.stderr)
    stop_processes()
    sys.exit(code)
