"""A whole configuration: a dictionary, and its sections as dataclasses."""
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from data import DataConfig
from models import ConfigError, ModelConfig
from models.build import OneOf, read_section

from ..optim import OPTIMIZERS, OptimizerOptions, ScheduleConfig, check_scaling
from .sections import DistillConfig, EvalConfig, TeacherConfig, TrainConfig


@dataclass(eq=False)
class Config(dict):
    """A whole configuration.

    The code reads `cfg.train.epochs`. `cfg["train"]` is the section as it was written, which runs record. After a
    change to it, pass the configuration to `parse_config` again.
    """

    model: ModelConfig
    data: DataConfig | None = None
    distill: DistillConfig | None = None  # absent: plain training
    optimizer: Annotated[dict, OneOf(OPTIMIZERS, "model", common=OptimizerOptions, default="SGD")] = field(
        default_factory=dict)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self):
        if self.train.init is None and self.train.init_classes is not None:
            raise ConfigError("train.init_classes", "names the classes of train.init, which is missing")
        if self.train.init is not None and self.distill is not None and self.distill.init_student:
            raise ConfigError("train.init", "and distill.init_student both give the student its first weights: remove "
                                            "one of them")
        check_scaling(self.optimizer)
        if self.distill is not None and self.distill.cache is not None and self.data is not None:
            check_views(self.data)

    @property
    def teachers(self) -> list[TeacherConfig]:
        """The teachers; none without a `distill` section."""
        found = [] if self.distill is None else self.distill.teacher
        return found if isinstance(found, list) else [found]

    @property
    def input(self) -> DataConfig:
        """The `data` section, or its defaults if there is none: how images are prepared for the detector."""
        return self.data or DataConfig(train=None)

    def with_num_classes(self, count: int) -> "Config":
        """The configuration with the head's class count, unless it has one already."""
        return parse_config(self | {"model": self["model"] | {"head": self.model.with_num_classes(count).head}})


def check_views(data: DataConfig) -> None:
    """Raise ConfigError if training shows too many views of an image for `distill.cache` to store."""
    said = next((key for key, used in (("data.train_augment", data.train_augment != "none"),
                                       ("data.multi_scale", data.multi_scale is not None)) if used), None)
    if said is not None:
        raise ConfigError("distill.cache", f"cannot be used with {said}, which shows each image in many ways, so that "
                                           "stored answers would hardly ever be read: remove one of them (data.flip "
                                           "shows an image in two ways only, and may stay)")


def parse_config(cfg: Mapping) -> Config:
    """Check a dictionary with the sections of a configuration; it may be a `Config` that was changed.

    Raises:
        ConfigError, DataError: an unknown key, a wrong type, a missing value, or one out of range.
    """
    config = read_section(Config, dict(cfg), "")
    config.update(cfg)
    return config
