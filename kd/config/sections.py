"""The sections of a configuration that kd defines itself."""
from dataclasses import dataclass
from typing import Annotated, Literal

from data.ranges import Count, Few, NonNegative, Number, Positive, Range, Seed, Share, Some
from models import ModelConfig, Precision
from models.build import OneOf

from ..methods import METHODS
from ..methods.base import MethodOptions


@dataclass
class TrainConfig:
    """The `train` section."""

    epochs: Count = 12
    patience: Count | None = None                   # evaluations without a better AP that end training; null: none do
    seed: Seed = 0                                  # for initial weights, order of images and augmentation
    init: str | None = None                         # a detector's checkpoint to start from: path, URL or zoo:NAME
    init_classes: Some[str] | None = None           # names of its classes, in its order; null: its own, or COCO's
    amp: Literal["none", "fp16", "bf16"] = "none"   # mixed precision
    channels_last: bool = True                      # memory format of convolutions; affects only rounding and speed
    compile: bool = False                           # torch.compile backbones, necks and heads, also of teachers
    grad_clip: Positive | None = None               # largest norm of the whole gradient; null: no clipping
    accumulate: Count = 1                           # batches per optimiser step; each has its own loss normalisers
    ema: Share | None = None                        # decay of a moving average of the weights, which is then evaluated
    sync_bn: bool = False                           # trained batch norms use statistics of all processes (CUDA)
    checkpoint_every: Count | None = None           # steps between checkpoints; null: at the end of epochs
    keep: Few = 1                                   # checkpoints kept: last.pth, last.1.pth, ...; best.pth is kept, too
    log_every: Count = 10                           # steps between lines of metrics.jsonl and the log
    check_images: Number = 100                      # images for the teacher's AP before the first step; 0: off
    grad_norm_every: Number = 0                     # steps between gradient norms of each method; 0: never
    tensorboard: bool = False                       # also write metrics.jsonl's records for TensorBoard (extra viz)
    vis_period: Number = 500                        # steps between TensorBoard's pictures of detections; 0: none


@dataclass
class TilesConfig:
    """The `eval.tta.tiles` section: large images are cut into overlapping tiles, so that small objects stay visible.

    Each tile is resized to `data.scale`, or to each of `eval.tta.scales`, as an image of its own would be.
    """

    size: tuple[Annotated[int, Range(32)], Annotated[int, Range(32)]]  # width, height in pixels of the image
    overlap: Annotated[float, Range(0, 0.9)] = 0.2  # least part of a tile that it shares with the next one
    whole: bool = True  # also detect on the whole image: needed for objects that are larger than the overlap


@dataclass
class TTAConfig:
    """The `eval.tta` section: test-time augmentation, which merges detections on several views of every image."""

    flip: bool = False                               # also detect on each image mirrored
    scales: Some[tuple[Count, Count]] | None = None  # detect at all of these, in place of data.scale
    tiles: TilesConfig | None = None                 # also detect on overlapping tiles; null: on whole images only


@dataclass
class EvalConfig:
    """The `eval` section."""

    every: Number = 1              # epochs between evaluations; the last epoch is always evaluated
    batch_size: Count | None = None  # images per step; null: data.batch_size. The figures do not depend on it
    class_map: Some[Number] | None = None  # for each class of the data, the detector's; null: the same; not to train
    tta: TTAConfig | None = None   # augmentation in eval.py and predict.py; null: one view

    def __post_init__(self):
        self.tta = self.tta or TTAConfig()


@dataclass
class TeacherConfig:
    """A teacher: its model, from a configuration file or given here, and its weights."""

    checkpoint: str | None     # path or URL; null only for an untrained teacher
    cfg: str | None = None     # a configuration file with the teacher's `model` section
    model: ModelConfig | None = None
    part: Literal["student", "teacher"] | None = None  # which model of an FGD checkpoint
    name: str | None = None    # distinguishes its losses from those of other teachers
    weight: NonNegative = 1.0  # multiplies the losses of all methods with this teacher
    class_map: Some[Number] | None = None  # for each class of the student, the teacher's; null: the same
    precision: Precision | None = None  # of its convolutions; null: as the student's
    shard: bool = False        # for a teacher too large for one device: training spreads its weights over the processes


@dataclass
class DistillConfig:
    """The `distill` section."""

    teacher: TeacherConfig | Some[TeacherConfig]
    methods: list[Annotated[dict, OneOf(METHODS, "student", "teacher", common=MethodOptions)]]
    eval_teacher: bool = True  # false lets the teacher's norm layers use batch statistics
    init_student: bool = False  # the student's neck and head start from the first teacher's weights, as in FGD
