"""The sections of a configuration that are kd's own."""
from dataclasses import dataclass
from typing import Annotated, Literal

from models import ConfigError, ModelConfig, Precision
from models.build import OneOf

from ..methods import METHODS
from ..methods.base import MethodOptions


@dataclass
class TrainConfig:
    """The `train` section."""

    epochs: int = 12
    seed: int = 0                                   # of the initial weights, the order and the augmentation
    amp: Literal["none", "fp16", "bf16"] = "none"   # mixed precision
    channels_last: bool = True                      # convolutions' memory format; changes rounding and speed only
    compile: bool = False                           # torch.compile backbones, necks and heads, the teachers' too
    grad_clip: float | None = None                  # largest norm of the whole gradient; null does not clip
    accumulate: int = 1                             # batches per optimiser step; each has its own loss normalisers
    ema: float | None = None                        # decay of a moving average of the weights, which is then evaluated
    sync_bn: bool = False                           # batch norms that learn share statistics among processes (CUDA)
    checkpoint_every: int | None = None             # steps between checkpoints; null: at the end of epochs
    keep: int = 1                                   # checkpoints kept: last.pth, last.1.pth, ...; best.pth beside them
    log_every: int = 10                             # steps between lines of metrics.jsonl and the log
    check_images: int = 100                         # the teacher's AP on so many is shown before the first step; 0: off
    grad_norm_every: int = 0                        # steps between gradient norms of each method; 0: never
    tensorboard: bool = False                       # write what metrics.jsonl gets for TensorBoard, too (extra viz)
    vis_period: int = 500                           # steps between TensorBoard's pictures of detections; 0: none

    def __post_init__(self):
        for name in ("accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}", f"must be at least 1, not {getattr(self, name)}")
        if self.ema is not None and not 0 <= self.ema <= 1:
            raise ConfigError("train.ema", f"must be from 0 to 1, not {self.ema}")


@dataclass
class TTAConfig:
    """The `eval.tta` section: test-time augmentation, views of every image whose detections are merged."""

    flip: bool = False                            # each image mirrored, too
    scales: list[tuple[int, int]] | None = None   # each image at all of these, in place of data.scale


@dataclass
class EvalConfig:
    """The `eval` section."""

    every: int = 1                 # epochs between evaluations; the last epoch is always evaluated
    batch_size: int | None = None  # images per step; null is data.batch_size. The figures do not depend on it
    class_map: list[int] | None = None  # the detector's class for each of the data's; null: the same. Not for training
    tta: TTAConfig | None = None   # augmentation in eval.py and predict.py; null: one view

    def __post_init__(self):
        self.tta = self.tta or TTAConfig()


@dataclass
class TeacherConfig:
    """A teacher: its model, from a configuration file or said here, and its weights."""

    checkpoint: str | None     # path or URL; null only where an untrained teacher is meant
    cfg: str | None = None     # a configuration file whose `model` section is the teacher's
    model: ModelConfig | None = None
    part: Literal["student", "teacher"] | None = None  # which model of an FGD checkpoint
    name: str | None = None    # tells its losses from another teacher's
    weight: float = 1.0        # multiplies the losses of all methods with this teacher
    class_map: list[int] | None = None  # the teacher's class for each of the student's; null: they have the same
    precision: Precision | None = None  # of its convolutions; null is the student's
    shard: bool = False        # for one too large for a device: in training its weights are spread over the processes


@dataclass
class DistillConfig:
    """The `distill` section."""

    teacher: TeacherConfig | list[TeacherConfig]
    methods: list[Annotated[dict, OneOf(METHODS, "student", "teacher", common=MethodOptions)]]
    eval_teacher: bool = True  # false lets the teacher's norm layers use batch statistics
    init_student: bool = False  # the student's neck and head start from the first teacher's weights, as in FGD
