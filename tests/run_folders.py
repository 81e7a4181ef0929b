"""Writes folders like those that runs leave."""
import copy
import json
from pathlib import Path

from runs import config

TEACHER = b"a teacher's checkpoint"


def run_config(seed: int = 0, epochs: int = 2, methods: tuple[str, ...] = (), teacher: Path | None = None,
               **train) -> dict:
    """A run's configuration as it is in run.json."""
    cfg = copy.deepcopy(config(Path("scenes"), epochs))
    cfg["model"]["head"]["num_classes"] = 6
    cfg["train"] |= {"seed": seed, **train}
    if methods:
        cfg["distill"] = {"teacher": {"cfg": "teacher.yaml", "checkpoint": str(teacher)},
                          "methods": [{"type": method} for method in methods]}
    return cfg


def write_run(folder: Path, aps: list[float | None], cfg: dict | None, teachers: dict[str, str] | None = None,
              checkpoint: bytes | None = None, seconds: float | None = None, peak: int | None = None,
              **provenance) -> Path:
    """Write a run with three steps per epoch and with an AP after each of its epochs.

    Args:
        seconds, peak: the time of training and its memory in bytes; None: not recorded.
        provenance: more entries of run.json.
    """
    folder.mkdir(parents=True)
    lines = []
    for epoch, ap in enumerate(aps):
        lines += [{"epoch": epoch, "step": 3 * epoch + i, "lr": 0.1, "loss_cls": 2.0 / (3 * epoch + i),
                   "loss": 4.0 / (3 * epoch + i), "images_per_second": 10.0 * i} for i in (1, 2, 3)]
        lines.append({"epoch": epoch, "step": 3 * epoch + 3, "AP": ap, "AP50": ap, "AP75": ap, "APs": None, "APm": ap,
                      "APl": ap, "per_class": {"disc": ap, "ring": None}})
        if seconds is not None:
            lines[-1] |= {"training_seconds": seconds * (epoch + 1) / len(aps), "peak_memory_bytes": peak}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if cfg is not None:
        (folder / "run.json").write_text(json.dumps({"config": cfg, "teachers": teachers or {}} | provenance))
    if checkpoint is not None:
        (folder / "last.pth").write_bytes(checkpoint)
    return folder
