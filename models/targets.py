"""Ground truth of a batch as padded tensors, and the result of its assignment."""
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .anchors import Priors
from .layers import from_host

STRIDE_MULTIPLE = 32


@dataclass
class Truth:
    """Boxes of N images, padded to the same number; sizes also of the unlabelled images after them."""

    boxes: Tensor         # (N, G, 4) xyxy in input pixels, G at least 1
    labels: Tensor        # (N, G) int64
    real: Tensor          # (N, G) bool: true for a box, false for padding
    ignored: Tensor       # (N, M, 4), M may be 0
    ignored_real: Tensor  # (N, M) bool
    image_sizes: Tensor   # (N + unlabelled, 2) height, width before padding
    pad_sizes: Tensor     # (N + unlabelled, 2) height, width of the image's own padded size


@dataclass
class Assignment:
    """What every anchor of every image learns."""

    priors: Priors
    matched: Tensor        # (N, P) int64, index of the box, negative if there is none
    labels: Tensor         # (N, P) int64 in [0, C]; C is background
    label_weights: Tensor  # (N, P), zero if ignored or invalid
    box_targets: Tensor    # (N, P, 4) xyxy in input pixels; the anchor itself if not positive
    positive: Tensor       # (N, P) in the weights' dtype: 1 if the anchor learns a box, else 0
    avg_factor: Tensor     # scalar: number of positives in the batch, averaged over processes
    # With unlabelled images, which have no positives, `avg_factor` is the number in the labelled images times
    # `images_per_labelled`: as if all images had equally many. `labelled_factor` is the number itself.
    images_per_labelled: float = 1.0
    labelled_factor: Tensor | None = None

    def __post_init__(self):
        if self.labelled_factor is None:
            self.labelled_factor = self.avg_factor

    def of_labelled(self, count: int) -> "Assignment":
        """The assignment of the labelled images alone, the first `count`."""
        per_image = ("matched", "labels", "label_weights", "box_targets", "positive")
        return replace(self, **{name: getattr(self, name)[:count] for name in per_image},
                       avg_factor=self.labelled_factor, images_per_labelled=1.0)


def count_labelled(targets: list[dict]) -> int:
    """The number of labelled images, which come first in a batch. The others have `unlabelled: True` in their target.

    Raises:
        ValueError: no image is labelled, or a labelled one comes after an unlabelled one.
    """
    count = sum(not target.get("unlabelled") for target in targets)
    if any(target.get("unlabelled") for target in targets[:count]) or (targets and not count):
        raise ValueError("a batch needs at least one labelled image, and its unlabelled images must come last")
    return count


def pad_size(target: dict) -> tuple[int, int]:
    """Height and width up to which an image's anchors are valid."""
    if "pad_size" in target:
        return target["pad_size"]
    return tuple(-(-int(side) // STRIDE_MULTIPLE) * STRIDE_MULTIPLE for side in target["image_size"])


def pad_targets(targets: list[dict], dtype: torch.dtype, device: torch.device) -> Truth:
    """A batch's targets as padded tensors of one dtype on one device; those of unlabelled images only give sizes."""
    given = targets
    targets = [t for t in given if not t.get("unlabelled")]
    boxes = [t["boxes"].to(device, dtype).reshape(-1, 4) for t in targets]
    ignored = [t["ignored_boxes"].to(device, dtype).reshape(-1, 4) if "ignored_boxes" in t else boxes[0].new_zeros(0, 4)
               for t in targets]
    labels = [t["labels"].to(device) for t in targets]
    most = max(1, *map(len, boxes))

    def real(rows: list[Tensor], width: int) -> Tensor:
        counts = from_host([len(r) for r in rows], boxes[0], torch.long)
        return torch.arange(width, device=device) < counts.unsqueeze(1)

    def sizes(pairs: list) -> Tensor:
        return from_host([[int(h), int(w)] for h, w in pairs], boxes[0])

    padded, padded_labels = boxes[0].new_zeros(len(boxes), most, 4), labels[0].new_zeros(len(boxes), most)
    for i, (b, l) in enumerate(zip(boxes, labels)):
        padded[i, :len(b)], padded_labels[i, :len(l)] = b, l
    padded_ignored = pad_sequence(ignored, batch_first=True)
    return Truth(padded, padded_labels, real(boxes, most), padded_ignored, real(ignored, padded_ignored.shape[1]),
                 sizes([t["image_size"] for t in given]), sizes([pad_size(t) for t in given]))
