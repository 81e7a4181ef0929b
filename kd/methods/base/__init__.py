"""What the distillation methods share."""
from .features import FeaturePairs, adapter
from .method import BarChart, HeatMap, Method, link
from .options import GradientShare, MethodOptions
from .predictions import (
    BoxLoss,
    CenternessLoss,
    ScoreLoss,
    build_mimic_losses,
    check_same_grid,
    check_same_predictions,
    compared_scores,
    known_anchors,
    known_scores,
    level_sums,
    levels_with_positives,
    mimic,
    split_levels,
    to_anchors,
)

__all__ = ["BarChart", "BoxLoss", "CenternessLoss", "FeaturePairs", "GradientShare", "HeatMap", "Method",
           "MethodOptions", "ScoreLoss", "adapter", "build_mimic_losses", "check_same_grid", "check_same_predictions",
           "compared_scores", "known_anchors", "known_scores", "level_sums", "levels_with_positives", "link", "mimic",
           "split_levels", "to_anchors"]
