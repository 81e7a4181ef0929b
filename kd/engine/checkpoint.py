"""Checkpoints of runs: written whole or not at all, and found again."""
import os
from pathlib import Path

import torch

from models.weights import CheckpointError

FORMAT = "densekd"


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint beside its place and rename it, so that a kill at any instant leaves a loadable one."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as file:
        torch.save({"format": FORMAT} | state, file)
        file.flush()
        os.fsync(file.fileno())
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


def newest_checkpoint(work_dir: Path) -> Path:
    """The newest checkpoint of a work dir that can be read.

    Raises:
        CheckpointError: there is none.
    """
    for path in sorted(work_dir.glob("*.pth"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            read_checkpoint(path)
            return path
        except CheckpointError:
            continue
    raise CheckpointError(f"no checkpoint to resume from in {work_dir}")
