"""Checkpoints of runs: written whole or not at all, and found again."""
import os
from collections.abc import Callable
from pathlib import Path

import torch

from models.weights import CheckpointError

from ..exceptions import TrainingError

FORMAT = "densekd"


def save_checkpoint(path: Path, state: dict, keep: int = 1) -> None:
    """Write a checkpoint as `write_whole` does, so that a kill at any instant leaves a loadable one.

    Args:
        keep: how many there are of this name: last.pth, and before it last.1.pth, last.2.pth, ...
    Raises:
        TrainingError: it cannot be written, as on a full disk; the ones before are as they were.
    """
    names = [path] + [path.with_suffix(f".{i}{path.suffix}") for i in range(1, keep)]

    def make_room() -> None:
        for older, newer in zip(names[:0:-1], names[-2::-1]):
            if newer.exists():
                os.replace(newer, older)

    write_whole(path, {"format": FORMAT} | state, make_room)


def write_whole(path: Path, state: dict, before: Callable[[], None] = lambda: None) -> None:
    """Write a file of torch's beside its place, do what is to be done `before` it is there, and rename it.

    Raises:
        TrainingError: it cannot be written.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        before()
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        reason = " ".join(str(error).split())[:150]
        partial.unlink(missing_ok=True)
        raise TrainingError(f"{path} cannot be written ({reason}): what was there before is as it was; make room and "
                            "go on with --resume") from None


def read_checkpoint(path: Path) -> dict:
    """A checkpoint of a run, as it was given to `save_checkpoint`.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint of a run.
    """
    return read_plain(path, FORMAT, "checkpoint", "one that a run can be resumed from")


def read_plain(path: Path, form: str, name: str, what: str) -> dict:
    """A dict of tensors and plain values that this project wrote. Nothing in it can run code.

    Args:
        form: the dict's `format`.
        name, what: what the file is called, and what it is if it is one, in errors.
    Raises:
        CheckpointError: missing, damaged, or of another kind.
    """
    if not path.is_file():
        raise CheckpointError(f"{name} {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds for a damaged file, and advises to load it without protection
        raise CheckpointError(f"{name} {path} cannot be read: it is damaged or cut off, or holds more than tensors and "
                              "plain values") from None
    if not isinstance(state, dict) or state.get("format") != form or "step" not in state:
        raise CheckpointError(f"{name} {path} is not {what}")
    return state


def newest_checkpoint(work_dir: Path, missing_ok: bool = False) -> Path | None:
    """The newest checkpoint of a work dir that can be read.

    Raises:
        CheckpointError: there is none, and that is not `missing_ok`.
    """
    for path in sorted(work_dir.glob("*.pth"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            read_checkpoint(path)
            return path
        except CheckpointError:
            continue
    if missing_ok:
        return None
    raise CheckpointError(f"no checkpoint to resume from in {work_dir}")
