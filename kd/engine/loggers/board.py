"""TensorBoard: figures of metrics.jsonl, and pictures of detections beside the ground truth."""
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data import CocoDataset, build_dataset
from data.output import naming, no_room
from models import Detector

from ...config import Config
from ...inference.draw import beside_truth
from ...inference.precision import autocast
from ..run import Run
from .base import Ended, Logger, figures

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

IMAGES = 4  # per picture


class Board(Logger):
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
            from torch.utils.tensorboard import SummaryWriter

            self.open = SummaryWriter(str(self.folder), purge_step=purge)
        return self.open

    def show(self, record: dict) -> None:
        with naming(self.folder):
            for tag, number in figures(record).items():
                self.writer.add_scalar(tag, number, record["step"])
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

    def end(self, ended: Ended) -> None:
        if self.open is not None:
            with naming(self.folder):
                self.open.close()


def quiet_on_full_disk(failed: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, except of TensorBoard's on a full disk: the next record raises its error."""
    if not no_room(failed.exc_value):
        threading.__excepthook__(failed)


def open_board(run: Run, origin: dict) -> Board:
    """The board of a run; its origin is in run.json only."""
    shown = run.val_loader.dataset if run.val_loader else None
    return Board(run.cfg, run.work_dir, run.step, run.device, shown)
