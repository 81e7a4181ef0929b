"""Weights & Biases."""
import os

from ..run import Run
from .base import Ended, Logger, figures, keep_id, known_id

SECONDS = 60  # to log in, and at the end to send what is left: without a network, both would wait for long


class Wandb(Logger):
    """A run of Weights & Biases, with its files in `wandb/` of the work dir.

    Its own variables choose everything else: WANDB_PROJECT (here "densekd" by default), WANDB_MODE, WANDB_API_KEY, ...
    """

    def __init__(self, run: Run, origin: dict):
        self.work_dir, self.from_step, self.origin, self.open = run.work_dir, run.step, origin, None

    def start(self) -> None:
        import wandb

        before = known_id(self.work_dir, "wandb") if self.from_step else None
        limits = {name: SECONDS for name in ("login_timeout", "finish_timeout") if name in wandb.Settings.model_fields}
        project = os.environ.get("WANDB_PROJECT") or "densekd"
        about = {name: value for name, value in self.origin.items() if name != "config"}
        self.open = wandb.init(
            dir=str(self.work_dir), project=project, name=str(self.work_dir)[-128:],
            config=self.origin["config"] | {"run": about}, allow_val_change=True, id=before,
            resume="allow" if before else None, settings=wandb.Settings(console="off", **limits))
        keep_id(self.work_dir, "wandb", self.open.id)
        # Its own count of steps drops what comes at an earlier step, as in a run that is resumed from there.
        self.open.define_metric("*", step_metric="step")

    def show(self, record: dict) -> None:
        self.open.log({"step": record["step"], "epoch": record["epoch"]} | figures(record))

    def end(self, ended: Ended) -> None:
        self.open.finish(exit_code=0 if ended == "finished" else 1)
