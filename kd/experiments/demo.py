"""The demo: a teacher, a student alone and the same student distilled, on generated scenes."""
import shutil
import time
from pathlib import Path

import torch

from data import CocoDataset, generate_scenes
from data.inputs.images import write_picture
from data.output import write_text
from data.tables import markdown_table, points
from models import Detector

from ..config import load_config
from ..engine.train import train
from ..evaluation.cost import count_flops, count_parameters
from ..inference.detectors import load_with_data
from ..inference.draw import beside_truth

PARTS = {"teacher": "teacher", "student": "student alone", "crosskd": "student with CrossKD"}
PICTURES, SCORE = 4, 0.5  # of the picture: the first scenes, boxes from this score on


def run_demo(work_dir: Path, device: torch.device, configs: Path = Path("configs/demo"), images: int = 400,
             overrides: tuple[str, ...] = ()) -> str:
    """Generate data, train the three, and leave checkpoints, a table and a picture in `work_dir`.

    Returns:
        The table, as markdown.
    """
    for part in PARTS:  # of an earlier demo
        shutil.rmtree(work_dir / part, ignore_errors=True)
    data = generate_scenes(work_dir / "scenes", train=images, val=images // 4).resolve()
    places = [f"data.{split}.images={data / split}" for split in ("train", "val")]
    places += [f"data.{split}.annotations={data / 'annotations' / split}.json" for split in ("train", "val")]
    rows, detectors, dataset = [], {}, None
    for part, title in PARTS.items():
        own = [f"distill.teacher.checkpoint={work_dir / 'teacher' / 'last.pth'}"] if part == "crosskd" else []
        cfg = load_config(configs / f"{part}.yaml", [*places, *own, *overrides])
        start = time.perf_counter()
        figures = train(cfg, work_dir / part, device)
        minutes = (time.perf_counter() - start) / 60
        detector, dataset = load_with_data(cfg, work_dir / part / "last.pth", device)
        detectors[f"{title}: AP {100 * figures['AP']:.1f}, scores from {SCORE}"] = detector
        rows.append(describe(title, detector, figures, minutes, dataset))
    table = markdown_table(["model", "AP", "AP50", "parameters (M)", "GFLOPs", "minutes"], rows)
    write_text(work_dir / "table.md", table + "\n")
    write_picture(work_dir / "detections.png", beside_truth(detectors, dataset, PICTURES, SCORE, zoom=2))
    return table


def describe(title: str, detector: Detector, figures: dict, minutes: float, dataset: CocoDataset) -> list[str]:
    """A row of the table; GFLOPs are for one image of the data set's size."""
    flops = count_flops(detector, dataset[0][1]["pad_size"])
    return [title, points(figures["AP"]), points(figures["AP50"]), f"{count_parameters(detector) / 1e6:.2f}",
            f"{flops / 1e9:.2f}", f"{minutes:.1f}"]
