"""TensorBoard: figures of metrics.jsonl, and pictures of detections beside the ground truth. Needs the extra `viz`."""
import threading
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from data import CocoDataset, build_dataset
from data.extras import need
from data.output import naming, no_room
from models import Detector

from ..config import Config
from ..inference.draw import beside_truth
from ..inference.precision import autocast
from ..processes import distributed
from .run import Run

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

IMAGES = 4  # per picture


class Board:
    """An event file in `tensorboard/` of the work dir; it is created with the first record.

    Args:
        from_step: the step at which a resumed run continues; records of later steps are replaced.
        dataset: data.val, or None to take the pictures from data.train.
    """

    def __init__(self, cfg: Config, work_dir: Path, from_step: int, device: torch.device,
                 dataset: CocoDataset | None = None):
        self.cfg, self.folder, self.from_step, self.device = cfg, work_dir / "tensorboard", from_step, device
        self.open, self.dataset = None, dataset

    @property
    def writer(self) -> "SummaryWriter":
        if self.open is None:
            threading.excepthook = quiet_on_full_disk
            purge = self.from_step + 1 if self.from_step else None
            self.open = tensorboard().SummaryWriter(str(self.folder), purge_step=purge)
        return self.open

    def show(self, record: dict) -> None:
        """Write the numbers of a record under `train/`, `val/` or, for single classes, `val_class/`."""
        step = record["step"]
        for name, value in record.items():
            group = "val" if "AP" in record else "train"
            values = {f"{group}_class/{k}": v for k, v in value.items()} if isinstance(value, dict) else {
                name if "/" in name else f"{group}/{name}": value}
            for tag, number in values.items():
                if name not in ("epoch", "step") and number is not None:
                    with naming(self.folder):
                        self.writer.add_scalar(tag, number, step)
        with naming(self.folder):
            self.writer.flush()

    def pictures(self, step: int, detectors: dict[str, Detector]) -> None:
        """Every `vis_period` steps, write detections on the first images of data.val beside the ground truth."""
        period = self.cfg.train.vis_period
        if not period or step % period:
            return
        if self.dataset is None:
            self.dataset = build_dataset(self.cfg.data, "train", training=False)
        with autocast(self.device, self.cfg.train.amp):
            picture = beside_truth(detectors, self.dataset, IMAGES)
        with naming(self.folder):
            self.writer.add_image("detections", picture, step)


def quiet_on_full_disk(failed: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, except of TensorBoard's on a full disk: the next record raises its error."""
    if not no_room(failed.exc_value):
        threading.__excepthook__(failed)


def tensorboard() -> ModuleType:
    return need("tensorboard", "viz", "train.tensorboard", module="torch.utils.tensorboard")


def open_board(run: Run, work_dir: Path) -> Board | None:
    """The board of a run, in its first process, if `train.tensorboard` is set; MissingExtra without TensorBoard."""
    if not run.cfg.train.tensorboard:
        return None
    tensorboard()
    shown = run.val_loader.dataset if run.val_loader else None
    return Board(run.cfg, work_dir, run.step, run.device, shown) if distributed.rank() == 0 else None
