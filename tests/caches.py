"""Small distillers and runs with `distill.cache`, for tests."""
import json
from pathlib import Path

import torch
from runs import config, model, write_checkpoint
from small_models import small_distiller

from kd import Distiller

FLOAT = {"dtype": torch.float32}
CROSSKD = {"type": "CrossKD", "reused_teacher_head_idx": 1}
SETS = {"CrossKD": [CROSSKD], "FGD": [{"type": "FGD"}], "PKD": [{"type": "PKD", "levels": [1, 3]}],
        "LD": [{"type": "LD", "vlr_weight": 0.25}], "all": [CROSSKD, {"type": "FGD"}, {"type": "LD"}, {"type": "PKD"}],
        "modules": [{"type": "FitNet", "student_modules": ["backbone.layer3", "neck.fpn_convs.0.conv"]}, CROSSKD]}


def without_teacher(distiller: Distiller) -> Distiller:
    """The distiller, whose teachers fail when they run."""
    for cache in distiller.caches:
        cache.finish()

    def fail(*_, **__):
        raise AssertionError("the teacher ran")
    for teacher in distiller.teachers:
        teacher.run = fail
    return distiller


def caching(*methods: dict, folder: Path, precision: str = "fp32", **more) -> Distiller:
    return small_distiller(*methods, cache={"dir": str(folder), "precision": precision}, **FLOAT | more)


def run_config(folder: Path, scenes: Path, methods: list[dict], epochs: int = 2, **distill) -> dict:
    """A configuration with a teacher that is written to `folder` if it is not there."""
    if not (folder / "t.pth").exists():
        write_checkpoint(folder / "t.pth", {"model": teacher_model()})
    cfg = config(scenes, epochs, distill={"teacher": {"model": teacher_model(), "checkpoint": str(folder / "t.pth")},
                                          "methods": methods, **distill})
    cfg["train"] |= {"check_images": 0}
    cfg["eval"] = {"every": 0}
    del cfg["data"]["val"]
    return cfg


def teacher_model() -> dict:
    return model(16) | {"preprocess": {"channel_order": "bgr"}}


def losses_of(work_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "loss" in key} for line in lines]
