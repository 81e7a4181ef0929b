"""Detectors: build_detector(cfg["model"]) gives one."""
from .build import ConfigError
from .detector import BACKBONES, NECKS, Detector, DetectorPass, ModelConfig, Precision, build_detector
from .heads import HEADS, DenseHead, GFLHead, HeadOutputs
from .preprocess import Preprocess
from .targets import Assignment

__all__ = ["BACKBONES", "HEADS", "NECKS", "Assignment", "ConfigError", "DenseHead", "Detector", "DetectorPass",
           "GFLHead", "HeadOutputs", "ModelConfig", "Precision", "Preprocess", "build_detector"]
