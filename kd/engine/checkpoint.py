"""Checkpoints of runs: written whole or not at all, and found again."""
import os
from pathlib import Path

import torch

from models.weights import CheckpointError

from .log import TrainingError

FORMAT = "densekd"


def save_checkpoint(path: Path, state: dict, keep: int = 1) -> None:
    """Write a checkpoint beside its place and rename it, so that a kill at any instant leaves a loadable one.

    Args:
        keep: how many there are of this name: last.pth, and before it last.1.pth, last.2.pth, ...
    Raises:
        TrainingError: it cannot be written, as on a full disk; the ones before are as they were.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        with open(partial, "wb") as file:
            torch.save({"format": FORMAT} | state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        reason = " ".join(str(error).split())[:150]
        partial.unlink(missing_ok=True)
        raise TrainingError(f"checkpoint {path} cannot be written ({reason}): the one before is as it was; make room "
                            "and go on with --resume") from None
    names = [path] + [path.with_suffix(f".{i}{path.suffix}") for i in range(1, keep)]
    for older, newer in zip(names[:0:-1], names[-2::-1]):
        if newer.exists():
            os.replace(newer, older)
    os.replace(partial, path)


def read_checkpoint(path: Path) -> dict:
    """A checkpoint of a run, as it was given to `save_checkpoint`.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint of a run.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or "step" not in state:
        raise CheckpointError(f"checkpoint {path} is not one that a run can be resumed from")
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
