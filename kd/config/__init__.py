"""Configurations: their sections, and how they are read and checked."""
from .config import Config, parse_config
from .load import load_config, override_config
from .sections import DistillConfig, EvalConfig, TeacherConfig, TilesConfig, TrainConfig, TTAConfig

__all__ = ["Config", "DistillConfig", "EvalConfig", "TTAConfig", "TeacherConfig", "TilesConfig", "TrainConfig",
           "load_config", "override_config", "parse_config"]
