"""The origin of a run's figures."""
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from models.checkpoints.sources import file_hash, local_path

from ..checks import teacher_model
from ..config import Config
from ..processes.distributed import world_size


def provenance(cfg: Config, device: torch.device, init: dict[str, str]) -> dict:
    """The origin of a run's figures: configuration, code, versions, machine, and the files of weights.

    Args:
        init: SHA-256 of `train.init` by path, or nothing.
    """
    paths = [teacher.source for teacher in cfg.teachers]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": command(), "config": cfg,
        "commit": commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__} | {
            name: version(name) for name in ("torchvision", "numpy", "pycocotools")},
        "machine": {"system": platform.platform(), "threads": torch.get_num_threads(),
                    "processes": world_size(),
                    "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type},
        "teachers": {path: file_hash(local_path(path)) for path in paths if path is not None},
        "teacher_models": teacher_models(cfg), "init": init}


def command() -> list[str]:
    """The words of this process's command. A script of this project has its path in the project, from wherever it was
    called, so that records name no folder of one machine.
    """
    script, project = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[2]
    inside = script.is_relative_to(project)
    return [script.relative_to(project).as_posix() if inside else sys.argv[0], *sys.argv[1:]]


def teacher_models(cfg: Config) -> list[dict | None]:
    """What each teacher is built from, because its configuration file may change; None for networks of others."""
    models = [None if entry.cfg is None and entry.model is None else
              teacher_model(entry).with_num_classes(cfg.model.head.get("num_classes")) for entry in cfg.teachers]
    return [model and {"backbone": model.backbone, "neck": model.neck, "head": model.head} for model in models]


def commit() -> str | None:
    """The commit of the code, with a + if files have changed since; None outside a git checkout."""
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
