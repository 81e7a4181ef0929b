"""The sections of a configuration that kd defines itself."""
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from data.errors import shown
from data.ranges import Count, Few, NonNegative, Number, Positive, Range, Seed, Share, Some
from models import ConfigError, ModelConfig, Precision
from models.build import OneOf
from models.preprocess import Preprocess

from ..methods import METHODS
from ..methods.base import MethodOptions
from .loggers import LoggerName


@dataclass
class TrainConfig:
    """The `train` section."""

    epochs: Count = 12
    patience: Count | None = None                   # evaluations without a better AP that end training; null: none do
    seed: Seed = 0                                  # for initial weights, order of images and augmentation
    init: str | None = None                         # a detector's checkpoint to start from: path, URL or zoo:NAME
    init_classes: Some[str] | None = None           # names of its classes, in its order; null: its own, or COCO's
    amp: Literal["none", "fp16", "bf16"] = "none"   # mixed precision
    channels_last: bool | Literal["auto"] = "auto"  # memory layout; auto times both at the start of training
    compile: bool = False                           # torch.compile backbones, necks and heads, also of teachers
    prefetch: bool = False                          # copy images to the GPU while the step before runs (CUDA)
    grad_clip: Positive | None = None               # largest norm of the whole gradient; null: no clipping
    accumulate: Count = 1                           # batches per optimiser step; each has its own loss normalisers
    ema: Share | None = None                        # decay of a moving average of the weights, which is then evaluated
    sync_bn: bool = False                           # trained batch norms use statistics of all processes (CUDA)
    checkpoint_every: Count | None = None           # steps between checkpoints; null: at the end of epochs
    keep: Few = 1                                   # checkpoints kept: last.pth, last.1.pth, ...; best.pth is kept, too
    log_every: Count = 10                           # steps between lines of metrics.jsonl and the log
    check_images: Number = 100                      # images for the teacher's AP before the first step; 0: off
    grad_norm_every: Number = 0                     # steps between gradient norms of each method; 0: never
    loggers: list[LoggerName] = field(default_factory=list)  # also get metrics.jsonl's records; each needs an extra
    tensorboard: bool = False                       # the same as tensorboard in loggers (extra viz)
    vis_period: Number = 500                        # steps between TensorBoard's pictures of detections; 0: none

    def __post_init__(self):
        twice = next((name for name in self.loggers if self.loggers.count(name) > 1), None)
        if twice:
            raise ConfigError("loggers", f"has {twice} twice: name each once")

    @property
    def all_loggers(self) -> dict[str, str]:
        """For each logger the key that asks for it: `loggers`, or `tensorboard`."""
        return ({"tensorboard": "train.tensorboard"} if self.tensorboard else {}) | dict.fromkeys(
            self.loggers, "train.loggers")


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
    """A teacher and its weights: a detector from a configuration file or given here, or a network of another project
    that gives feature maps only.
    """

    checkpoint: str | None     # path or URL; null only for an untrained teacher
    cfg: str | None = None     # a configuration file with the teacher's `model` section
    model: ModelConfig | None = None
    torchvision: str | None = None  # a detector of torchvision with an FPN; methods on feature maps can use it
    factory: str | None = None  # module:function, whose code runs; the network it returns gives feature maps
    arguments: dict | None = None  # of the factory
    preprocess: Preprocess | None = None  # pixel statistics of torchvision or factory; null: the network's own
    part: Literal["student", "teacher"] | None = None  # which model of an FGD checkpoint
    name: str | None = None    # distinguishes its losses from those of other teachers
    weight: NonNegative = 1.0  # multiplies the losses of all methods with this teacher
    class_map: Some[Number | None] | None = None  # for each class of the student, the teacher's, or null if it has none
    precision: Precision | None = None  # of its convolutions; null: as the student's
    shard: bool = False        # for a teacher too large for one device: training spreads its weights over the processes

    def __post_init__(self):
        if self.class_map is not None and not any(k is not None for k in self.class_map):
            raise ConfigError("class_map", "is null for every class: name those that the teacher knows")
        if self.arguments is not None and self.factory is None:
            raise ConfigError("arguments", "are those of factory, which is missing")
        if not self.features_only:
            if self.preprocess is not None:
                raise ConfigError("preprocess", "is for torchvision or factory; the model section of another teacher "
                                                "has its own")
            return
        if self.torchvision is not None and (self.checkpoint or "").startswith(("zoo:", "torchvision://")):
            raise ConfigError("checkpoint", f"{self.checkpoint} has weights of another network than torchvision's "
                                            f"{self.torchvision}: write DEFAULT for its own, or a path or address")
        key = "torchvision" if self.factory is None else "factory"
        if sum(value is not None for value in (self.cfg, self.model, self.torchvision, self.factory)) > 1:
            raise ConfigError(key, "describes the teacher, and so do others of cfg, model, torchvision and factory: "
                                   "keep one")
        for name in ("class_map", "part"):
            if getattr(self, name) is not None:
                raise ConfigError(name, f"makes no sense with {key}, which gives feature maps only: remove it")
        if self.factory is not None and not re.fullmatch(r"\w+(\.\w+)*:\w+", self.factory):
            raise ConfigError("factory", f"must be module:function, not {shown(self.factory)}")

    @property
    def features_only(self) -> bool:
        """Whether this teacher gives feature maps and no predictions."""
        return self.torchvision is not None or self.factory is not None

    @property
    def source(self) -> str | None:
        """The path or address of its weights."""
        if self.torchvision is not None and self.checkpoint == "DEFAULT":
            return f"torchvision-detector://{self.torchvision}/DEFAULT"
        return self.checkpoint


@dataclass
class CacheConfig:
    """The `distill.cache` section: what the methods need of the teachers is stored for each image, and read again.

    `cache: DIR` is short for `cache: {dir: DIR}`.
    """

    dir: str  # a folder; each teacher, and each set of settings that changes its answers, gets its own folder in it
    precision: Literal["fp32", "fp16"] = "fp32"  # of what is stored: fp32 keeps every bit, fp16 rounds to half the size

    def __post_init__(self):
        if not self.dir:
            raise ConfigError("dir", "must name a folder")


@dataclass
class DistillConfig:
    """The `distill` section."""

    teacher: TeacherConfig | Some[TeacherConfig]
    methods: list[Annotated[dict, OneOf(METHODS, "student", "teacher", common=MethodOptions)]]
    eval_teacher: bool = True  # false lets the teacher's norm layers use batch statistics
    init_student: bool = False  # the student's neck and head start from the first teacher's weights, as in FGD
    teacher_stream: bool = False  # teachers run at the same time as the student (CUDA)
    cache: str | CacheConfig | None = None  # a folder that keeps the teachers' answers; null: teachers run at each step

    def __post_init__(self):
        teachers = self.teacher if isinstance(self.teacher, list) else [self.teacher]
        if self.teacher_stream and any(teacher.shard for teacher in teachers):
            raise ConfigError("teacher_stream", "does not work with distill.teacher.shard: remove one of them")
        if self.cache is None:
            return
        if isinstance(self.cache, str):
            try:
                self.cache = CacheConfig(self.cache)
            except ConfigError as error:
                raise ConfigError("cache", error.problem) from None
        if not self.eval_teacher:
            raise ConfigError("cache", "needs distill.eval_teacher: true, because with batch statistics a teacher's "
                                       "answer for an image depends on the other images: remove one of them")
        if any(teacher.shard for teacher in teachers):
            raise ConfigError("cache", "does not work with distill.teacher.shard, because all processes must run a "
                                       "sharded teacher together: remove one of them")
