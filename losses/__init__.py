"""Losses: functions with `weight`, `reduction` and `avg_factor`, and small modules that carry their settings."""
from .channels import rescaled_channels
from .classification import (
    CrossEntropyLoss,
    FocalLoss,
    QualityFocalLoss,
    binary_cross_entropy,
    quality_focal_loss,
    sigmoid_focal_loss,
)
from .distill import (
    KDQualityFocalLoss,
    KnowledgeDistillationKLDivLoss,
    PKDLoss,
    binary_kd_loss,
    channel_wise_divergence,
    dkd_loss,
    kd_kl_div_loss,
    kd_quality_focal_loss,
    pkd_loss,
)
from .iou import CIoULoss, DIoULoss, GIoULoss, IoULoss, aligned_iou, ciou_loss, diou_loss, giou_loss, iou_loss
from .reduce import (
    at_least_float32,
    channel_statistics,
    mean_over_processes,
    normalised_channels,
    reduce_loss,
    total_loss,
    widest_float,
)
from .regression import DistributionFocalLoss, L1Loss, SmoothL1Loss, distribution_focal_loss, l1_loss, smooth_l1_loss

# The losses that a configuration may name.
LOSSES = {loss.__name__: loss for loss in (
    FocalLoss, QualityFocalLoss, CrossEntropyLoss, DistributionFocalLoss, L1Loss, SmoothL1Loss, IoULoss, GIoULoss,
    DIoULoss, CIoULoss, KDQualityFocalLoss, KnowledgeDistillationKLDivLoss)}

__all__ = ["LOSSES", "CIoULoss", "CrossEntropyLoss", "DIoULoss", "DistributionFocalLoss", "FocalLoss", "GIoULoss",
           "IoULoss", "KDQualityFocalLoss", "KnowledgeDistillationKLDivLoss", "L1Loss", "PKDLoss", "QualityFocalLoss",
           "SmoothL1Loss", "aligned_iou", "at_least_float32", "binary_cross_entropy", "binary_kd_loss",
           "channel_statistics", "channel_wise_divergence", "ciou_loss", "diou_loss", "distribution_focal_loss",
           "dkd_loss", "giou_loss", "iou_loss", "kd_kl_div_loss", "kd_quality_focal_loss", "l1_loss",
           "mean_over_processes", "normalised_channels", "pkd_loss", "quality_focal_loss", "reduce_loss",
           "rescaled_channels", "sigmoid_focal_loss", "smooth_l1_loss", "total_loss", "widest_float"]
