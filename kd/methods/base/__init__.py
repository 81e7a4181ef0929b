"""What the distillation methods share."""
from .features import FeaturePairs, adapter
from .method import BarChart, HeatMap, Method, link
from .options import MethodOptions
from .predictions import (
    BoxLoss,
    CenternessLoss,
    ScoreLoss,
    build_mimic_losses,
    check_same_grid,
    check_same_predictions,
    mimic,
)

__all__ = ["BarChart", "BoxLoss", "CenternessLoss", "FeaturePairs", "HeatMap", "Method", "MethodOptions", "ScoreLoss",
           "adapter", "build_mimic_losses", "check_same_grid", "check_same_predictions", "link", "mimic"]
