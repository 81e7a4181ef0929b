"""Checkpoints of runs: written completely or not at all, and found again."""
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from data.errors import listed
from data.output import OutputError, reason_of, writing
from models import ConfigError
from models.build import check_value
from models.checkpoints.safetensors_file import is_safetensors
from models.checkpoints.wrappers import check_size
from models.weights import CheckpointError

from ..exceptions import TrainingError

FORMAT = "densekd"
WEIGHTS = object()  # marks an entry with tensors by name, for `check_entries`

log = logging.getLogger("densekd")


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that was cut off or overwritten, unlike a file of another kind."""


def save_checkpoint(path: Path, state: dict, keep: int = 1) -> None:
    """Write a checkpoint with `write_whole`, so that a process killed at any moment leaves a loadable one.

    Args:
        keep: how many are kept under this name: last.pth, and the ones before it as last.1.pth, last.2.pth, ...
    Raises:
        TrainingError: it cannot be written, for example on a full disk; the earlier ones are unchanged.
    """
    names = [path] + [path.with_suffix(f".{i}{path.suffix}") for i in range(1, keep)]

    def make_room() -> None:
        for older, newer in zip(names[:0:-1], names[-2::-1]):
            if newer.exists():
                os.replace(newer, older)

    write_whole(path, {"format": FORMAT} | state, make_room)


def write_whole(path: Path, state: dict, before: Callable[[], None] = lambda: None) -> None:
    """Save with torch to a temporary file, call `before`, and rename the file to `path`.

    Raises:
        TrainingError: it cannot be written.
    """
    try:
        with writing(path) as partial:
            with open(partial, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            before()
    except OutputError as error:
        raise TrainingError(f"{path} cannot be written ({reason_of(error.__cause__)}): what was there before is "
                            "unchanged; make room and go on with --resume") from None


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint that `save_checkpoint` wrote.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint of a run.
    """
    if path.is_file():
        with open(path, "rb") as file:
            if is_safetensors(file.read(9)):
                raise CheckpointError(f"checkpoint {path} holds only weights, as every .safetensors file: a run is "
                                      "resumed from its .pth file; train.init starts a new run from weights")
    return read_plain(path, FORMAT, "checkpoint", "one that a run can be resumed from")


def read_plain(path: Path, form: str, name: str, what: str) -> dict:
    """Read a dict of tensors and plain values that this project wrote. Nothing in the file can run code.

    Args:
        form: the dict's `format`.
        name, what: for errors: what the file is called, and what it should be.
    Raises:
        CheckpointError: missing, damaged, or of another kind.
    """
    if not path.is_file():
        raise CheckpointError(f"{name} {path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sparse tensors, which no run writes
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many types for a damaged file, and advises to load it unsafely
        raise DamagedCheckpoint(f"{name} {path} cannot be read: it is damaged or cut off, or holds more than tensors "
                                "and plain values") from None
    if not isinstance(state, dict) or state.get("format") != form or "step" not in state:
        raise CheckpointError(f"{name} {path} is not {what}")
    check_size(state.get("config"))
    return state


def check_entries(state: dict, hints: Mapping[str, Any], where: str) -> None:
    """Check the entries of a file that `read_plain` has read: each hint is a type, see `check_value`, or `WEIGHTS`.

    Args:
        hints: an entry whose type allows None may be missing.
        where: the file, for the error.
    Raises:
        CheckpointError: an entry is missing or of another type.
    """
    try:
        for key, hint in hints.items():
            value = check_value(state.get(key), dict if hint is WEIGHTS else hint, key)
            if hint is WEIGHTS and not all(isinstance(name, str) and torch.is_tensor(each)
                                           for name, each in value.items()):
                raise ConfigError(key, "must hold names and tensors")
    except ConfigError as error:
        raise CheckpointError(f"{where} is damaged: {error}") from None


def newest_checkpoint(work_dir: Path, missing_ok: bool = False) -> Path | None:
    """The newest readable checkpoint of a work dir; the log names the damaged ones that are newer.

    If there is none, or all are damaged, returns None if `missing_ok`, and raises CheckpointError otherwise.
    """
    damaged = []
    for path in sorted(work_dir.glob("*.pth"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            read_checkpoint(path)
        except DamagedCheckpoint as error:
            damaged.append(path)
            log.warning(f"passed over: {error}")
        except CheckpointError:  # a replay.pth, for example
            continue
        else:
            return path
    if missing_ok:
        return None
    if damaged:
        raise CheckpointError(f"no checkpoint in {work_dir} can be read ({listed([p.name for p in damaged], ', ')}): "
                              "give another one with --resume-from, or train into another --work-dir")
    raise CheckpointError(f"no checkpoint to resume from in {work_dir}")
