"""Makes detections from dense predictions."""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import nms

from data.ranges import AllOr, Share
from losses import widest_float

from .anchors import Priors
from .coders import clip_boxes
from .heads import DenseHead, HeadOutputs
from .layers import from_host


@dataclass
class TestConfig:
    """How detections are chosen."""

    score_thr: Share = 0.05                   # the class score must exceed this (with `quality: iou`, the whole score)
    nms_pre: AllOr = 1000                     # number of best scores kept per level; -1 keeps all
    nms_iou_threshold: Share | None = None    # null: the head's own, 0.5 for RetinaNet, 0.6 for the others
    max_per_img: AllOr = 100                  # number of detections kept per image; -1 keeps all
    min_bbox_size: float = 0                  # both sides must exceed this, in output pixels; negative keeps all boxes
    clip: Literal["before", "after"] = "before"  # clip boxes before NMS (mmdet, torchvision) or after (detectron2)


def postprocess(head: DenseHead, outputs: HeadOutputs, targets: list[dict], test: TestConfig, rescale: bool = True,
                with_nms: bool = True) -> list[dict]:
    """Detections of every image.

    Args:
        targets: one dict per image with `image_size` and, to rescale, `original_size`.
        rescale: return boxes in the original image's pixels, otherwise in the input's.
        with_nms: suppress overlaps and limit the number; otherwise all candidates are returned, level by level.
    Returns:
        A dict per image: boxes (n, 4) xyxy, scores (n,), labels (n,) int64; with NMS, best score first. Equal scores
        stay in the order of level, location and class.
    """
    priors = head.priors(outputs)
    scores = head.candidate_scores(outputs.cls, outputs.centerness)
    found = []
    for i, target in enumerate(targets):
        index, labels = _candidates(scores[i], priors, test)
        boxes, score = decode(head, outputs, i, priors, index, scores[i][index, labels])
        found.append(_finish(boxes, score, labels, target, test, rescale, with_nms))
    return found


def decode(head: DenseHead, outputs: HeadOutputs, i: int, priors: Priors, index: Tensor,
           scores: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (n, 4) and final scores (n,) of image `i` at the anchors `index` (n,), chosen by `scores` (n,)."""
    centerness = None if outputs.centerness is None else outputs.centerness[i][index]
    return head.decode(outputs.box[i][index], priors.take(index)), head.final_scores(scores, centerness)


def _candidates(scores: Tensor, priors: Priors, test: TestConfig) -> tuple[Tensor, Tensor]:
    """Anchor and class of the best scores (P, C) above the threshold: at most `nms_pre` per level, best first."""
    indices, labels, start = [], [], 0
    for size in priors.level_sizes:
        level = scores[start:start + size]
        anchor, label = (level > test.score_thr).nonzero(as_tuple=True)
        order = level[anchor, label].sort(descending=True, stable=True).indices
        if test.nms_pre > 0:
            order = order[:test.nms_pre]
        indices.append(anchor[order] + start)
        labels.append(label[order])
        start += size
    return torch.cat(indices), torch.cat(labels)


def _finish(boxes: Tensor, scores: Tensor, labels: Tensor, target: dict, test: TestConfig, rescale: bool,
            with_nms: bool) -> dict:
    """Clips, rescales, drops small boxes, suppresses and limits the number, in the order that `test.clip` sets."""

    def to_output(boxes: Tensor) -> Tensor:
        boxes = clip_boxes(boxes, target["image_size"])
        if rescale:
            (h, w), (full_h, full_w) = target["image_size"], target["original_size"]
            boxes = boxes * from_host([full_w / w, full_h / h, full_w / w, full_h / h], boxes)
        return boxes

    def large(boxes: Tensor) -> Tensor | slice:
        if test.min_bbox_size < 0:
            return slice(None)
        size = boxes[:, 2:] - boxes[:, :2]
        return (size > test.min_bbox_size).all(-1).nonzero().squeeze(1)

    if test.clip == "before":
        boxes = to_output(boxes)
        keep = large(boxes)
        boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
    if with_nms:
        keep = class_nms(boxes, scores, labels, test.nms_iou_threshold)
        if test.max_per_img >= 0:
            keep = keep[:test.max_per_img]
        boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
    if test.clip == "after":
        boxes = to_output(boxes)
        keep = large(boxes)
        boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
    return {"boxes": boxes, "scores": scores, "labels": labels}


def class_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes (n, 4) that non-maximum suppression within each class keeps, best score first.

    Of boxes with equal scores the first counts as better: torchvision's sort is stable, on the CPU and on CUDA.
    Like torchvision's `batched_nms`, it moves the classes apart and suppresses once. `batched_nms` starts at coordinate
    0 and uses the boxes' precision, so its result can differ from suppression class by class if boxes lie beyond the
    left border or if there are many classes. The result of this function does not differ.
    """
    if not len(boxes):
        return labels.new_zeros(0)
    exact = widest_float(boxes.device)
    boxes = boxes.to(exact)
    apart = labels * (boxes.max() - boxes.min() + 1)
    return nms(boxes + apart.unsqueeze(-1), scores.to(exact), iou_threshold)
