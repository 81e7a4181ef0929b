"""Work dirs with checkpoints of tiny detectors, for the page that report.py writes."""
import hashlib
from pathlib import Path

import torch
from run_folders import run_config, write_run
from runs import model, write_checkpoint

from data import generate_scenes

METHODS = ("CrossKD", "Mimic")


def trained(folder: Path) -> list[Path]:
    """Runs on generated scenes: the student alone over two seeds, two distilled settings, and their teacher's file."""
    scenes = generate_scenes(folder / "scenes", train=2, val=5, size=(96, 64))
    teacher = folder / "teacher.pth"
    write_checkpoint(teacher, {"model": model(12)})
    digest, paths = hashlib.sha256(teacher.read_bytes()).hexdigest(), []
    for seed in (0, 1):
        for i, name in enumerate(("alone", *METHODS)):
            cfg = run_config(seed, methods=(name,) if i else (), teacher=teacher)
            for split in ("train", "val"):
                cfg["data"][split] = {"images": str(scenes / split),
                                      "annotations": str(scenes / "annotations" / f"{split}.json")}
            if i:
                cfg["distill"]["teacher"] = {"model": model(12), "checkpoint": str(teacher)}
            paths.append(write_run(folder / "runs" / f"{name}_seed{seed}", [0.0, 0.01 * i], cfg,
                                   {str(teacher): digest} if i else {}, seconds=60.0 * (1 + i), peak=2 ** 30))
            write_checkpoint(paths[-1] / "last.pth", cfg)
            change(paths[-1] / "last.pth", 10 * seed + i)
    return paths


def change(checkpoint: Path, seed: int) -> None:
    """Give a checkpoint other weights."""
    torch.manual_seed(seed)
    content = torch.load(checkpoint, weights_only=True)
    content["model"] = {name: value + 0.1 * value.std() * torch.randn_like(value) if value.dim() > 1 else value
                        for name, value in content["model"].items()}
    torch.save(content, checkpoint)
