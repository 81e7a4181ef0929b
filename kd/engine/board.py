"""TensorBoard: metrics.jsonl's figures, and pictures of detections beside the ground truth. Needs the extra `viz`."""
from pathlib import Path
from typing import TYPE_CHECKING

from data import build_dataset
from models import ConfigError

from ..evaluation.evaluate import autocast
from ..inference.draw import beside_truth
from ..processes import distributed

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from .run import Run

IMAGES = 4  # in a picture


class Board:
    """An event file in `tensorboard/` of the work dir; it is made when there is something for it."""

    def __init__(self, folder: Path, from_step: int):
        self.folder, self.from_step, self.open, self.dataset = folder, from_step, None, None

    @property
    def writer(self) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter
        if self.open is None:  # what a resumed run does again replaces what was written of it
            self.open = SummaryWriter(str(self.folder), purge_step=self.from_step + 1 if self.from_step else None)
        return self.open

    def show(self, record: dict) -> None:
        """The numbers of one record, under `train/`, `val/` and, of classes, `val_class/`."""
        step = record["step"]
        for name, value in record.items():
            group = "val" if "AP" in record else "train"
            values = {f"{group}_class/{k}": v for k, v in value.items()} if isinstance(value, dict) else {
                name if "/" in name else f"{group}/{name}": value}
            for tag, number in values.items():
                if name not in ("epoch", "step") and number is not None:
                    self.writer.add_scalar(tag, number, step)
        self.writer.flush()

    def pictures(self, run: "Run") -> None:
        """At every `vis_period` steps, what the student detects on the first images of data.val, beside the truth."""
        period = run.settings.vis_period
        if not period or run.step % period:
            return
        if self.dataset is None:
            self.dataset = build_dataset(run.cfg["data"], "train" if run.val_loader is None else "val", training=False)
        with autocast(run.device, run.settings.amp):
            picture = beside_truth({"student" if run.distiller else "detector": run.evaluated_model}, self.dataset,
                                   IMAGES)
        self.writer.add_image("detections", picture, run.step)


def open_board(run: "Run") -> Board | None:
    """The run's board, of the first process, where `train.tensorboard` asks for it.

    Raises:
        ConfigError: TensorBoard is missing.
    """
    if not run.settings.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError:
        raise ConfigError("train.tensorboard", "needs TensorBoard: pip install 'densekd[viz]'") from None
    return Board(run.work_dir / "tensorboard", run.step) if distributed.rank() == 0 else None
