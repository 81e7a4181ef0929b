"""A whole configuration: its sections as dataclasses, and the mapping that they were read from."""
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from data import DataConfig
from models import ModelConfig
from models.build import OneOf, read_section

from ..optim import OPTIMIZERS, OptimizerOptions, ScheduleConfig
from .sections import DistillConfig, EvalConfig, TeacherConfig, TrainConfig


@dataclass
class Config(MutableMapping):
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
    mapping: dict[str, Any] = field(init=False, repr=False)

    def __getitem__(self, name: str) -> Any:
        return self.mapping[name]

    def __setitem__(self, name: str, section: Any) -> None:
        self.mapping[name] = section

    def __delitem__(self, name: str) -> None:
        del self.mapping[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.mapping)

    def __len__(self) -> int:
        return len(self.mapping)

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
        """The configuration and its mapping with the head's class count set, unless it is set already."""
        head = self.model.with_num_classes(count).head
        return parse_config(self.mapping | {"model": self.mapping["model"] | {"head": head}})


def parse_config(cfg: Config | Mapping) -> Config:
    """Check a mapping with the sections of a configuration, or the mapping of a `Config`, which may have been changed.

    Raises:
        ConfigError, DataError: an unknown key, a wrong type, a missing value, or one out of range.
    """
    mapping = cfg.mapping if isinstance(cfg, Config) else cfg
    config = read_section(Config, mapping, "")
    config.mapping = mapping
    return config
