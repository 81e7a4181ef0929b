"""GI imitation: features where the class scores of student and teacher differ most, as in LD's code."""
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.ranges import Few, NonNegative, Share
from losses import at_least_float32, mean_over_processes
from models import Detector, DetectorPass
from models.assigners import pairwise_overlap

from .base import Method, check_same_predictions, compared_scores, levels_with_positives


class GI(Method):
    """Features mimic the teacher's in a few cells of each level, where the class scores differ most.

    The idea is general instance distillation (Dai et al., arXiv:2103.02340, section 3.1). The selection and the loss
    are those of LD's code (arXiv:2102.12252), `imitation_method: gibox`. The score of an anchor is the largest
    difference among its class scores. Its box is the teacher's if the teacher's score of that class is at least the
    student's, otherwise the student's. Non-maximum suppression over all images of the batch, level by level, keeps the
    best anchors. The loss is the mean squared error of the features in their cells, summed over levels.

    Args:
        loss_weight: weight of the loss. The authors published 2 together with another selection (fine-grained).
        top: number of anchors that are kept on each level.
        iou_threshold: IoU above which an anchor is suppressed by a better one.
        only_levels_with_positives: leave out levels without a positive anchor in the batch of this process, as the
            authors' code does.
        adapter_kernel: kernel size of the convolutions that are added where student and teacher differ in channels.
    """

    teacher_head = True
    some_classes = True
    needs = ("features", "scores", "boxes", "same heads", "same classes")

    def __init__(self, student: Detector, teacher: Detector, loss_weight: NonNegative = 2.0, top: Few = 10,
                 iou_threshold: Share = 0.3, only_levels_with_positives: bool = True,
                 adapter_kernel: Literal[1, 3] = 1):
        super().__init__()
        check_same_predictions(student.bbox_head, teacher.bbox_head, "GI", boxes=False)
        self.pair_features(student, teacher, None, None, None, adapter_kernel)
        self.loss_weight, self.top, self.iou_threshold = loss_weight, top, iou_threshold
        self.only_levels_with_positives = only_levels_with_positives

    def forward(self, student: DetectorPass, teacher: DetectorPass) -> dict[str, Tensor]:
        chosen, real = self.choose(student, teacher)
        if self.only_levels_with_positives:
            real = real * levels_with_positives(student.assignment).unsqueeze(1)
        weight = real / mean_over_processes(real.sum(1), least=1).unsqueeze(1)
        anchors, total = student.head.prior_generator.num_anchors, 0.0
        for (own, other), index, share in zip(self.pairs(student, teacher), chosen, weight):
            own, other = (at_least_float32(rows(features, index // anchors)) for features in (own, other))
            total = total + ((own - other).square().mean(-1) * share).sum()
        return {"loss_im": self.loss_weight * total}

    @torch.no_grad()
    def choose(self, student: DetectorPass, teacher: DetectorPass) -> tuple[Tensor, Tensor]:
        """The anchors that are kept on each level.

        Returns:
            Their indices (L, top) among the level's anchors of all images, image after image; and (L, top) 1 where
            there is such an anchor, else 0.
        """
        own, other = (at_least_float32(scores).sigmoid() for scores in compared_scores(student, teacher))
        score, label = (other - own).abs().max(-1)
        teacher_wins = (other - own).gather(-1, label.unsqueeze(-1)) >= 0
        own, other = (seen.head.boxes(seen.outputs, seen.head.priors(seen.outputs)) for seen in (student, teacher))
        sizes = student.assignment.priors.level_sizes
        # Levels have different numbers of anchors; padding has a score below all others.
        score = pad_sequence([x.flatten() for x in score.split(sizes, 1)], batch_first=True, padding_value=-1.0)
        box = pad_sequence([x.flatten(0, 1) for x in torch.where(teacher_wins, other, own).split(sizes, 1)],
                           batch_first=True)
        return best_apart(score, box, self.top, self.iou_threshold)


def best_apart(scores: Tensor, boxes: Tensor, top: int, iou_threshold: float) -> tuple[Tensor, Tensor]:
    """The first `top` boxes that non-maximum suppression keeps in each row. Nothing waits for the GPU.

    Args:
        scores: (L, M), negative for boxes that do not count.
        boxes: (L, M, 4).
    Returns:
        Indices (L, top), best first; and (L, top) in the scores' dtype: 1 where there is such a box, otherwise 0, and
        then the index is 0.
    """
    found = []
    for _ in range(top):
        best = scores.argmax(1, keepdim=True)
        found.append((best, scores.gather(1, best) >= 0))
        box = boxes.gather(1, best.unsqueeze(-1).expand(-1, -1, 4))
        near = pairwise_overlap(box, boxes).squeeze(1) > iou_threshold
        scores = scores.masked_fill(near, -1.0).scatter(1, best, -1.0)
    index, real = (torch.cat(parts, 1) for parts in zip(*found))
    return torch.where(real, index, 0), real.to(scores.dtype)


def rows(features: Tensor, cells: Tensor) -> Tensor:
    """Feature vectors (K, C) of a map (N, C, H, W) in the given cells (K,), counted image after image."""
    features = features.flatten(2)
    return features[cells // features.shape[-1], :, cells % features.shape[-1]]
