"""A training step up to its backward pass, which training, --check, --replay and the benchmark share."""
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.transforms import padded_size
from losses import total_loss
from models import Detector, DetectorPass

from ..exceptions import TrainingError
from ..inference.precision import autocast


class StepLosses(NamedTuple):
    """The result of `compute_losses`."""

    losses: dict[str, Tensor]
    total: Tensor
    student: DetectorPass


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the random numbers of a step (masks of a method, dropped paths of a backbone) with the step's number.

    A resumed run then draws the same numbers, and each process draws its own.
    """
    torch.manual_seed(hash((seed, step, rank)))


def to_device(images: Tensor, targets: list[dict], student: Detector, device: torch.device
              ) -> tuple[Tensor, list[dict]]:
    """Move uint8 images (N, 3, H, W) and targets to the device, and normalise the images for the student."""
    fast = device.type == "cuda"  # on MPS, copies that nobody waits for can be wrong (pytorch/pytorch#189690)
    images = student.preprocess(images.to(device, non_blocking=fast), targets)
    return images, [{k: v.to(device, non_blocking=fast) if torch.is_tensor(v) else v for k, v in t.items()}
                    for t in targets]


def compute_losses(model: nn.Module, images: Tensor, targets: list[dict], device: torch.device, amp: str) -> StepLosses:
    """The losses of a batch from `to_device`.

    Args:
        model: a detector or a distiller in training, or a wrapper around one.
        amp: the `train.amp` setting.
    Raises:
        TrainingError: a batch norm gets a single value per channel, which has no variance.
    """
    try:
        with autocast(device, amp):
            losses, student = model(images, targets, with_pass=True)
            return StepLosses(losses, total_loss(losses), student)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):  # PyTorch's check
            raise
        n, _, h, w = images.shape
        raise TrainingError(f"a batch norm gets a single value per channel, from {n} x {h} x {w} pixels: use a larger "
                            "data.batch_size or data.scale, or fixed statistics (norm_eval of the backbone)") from None


def random_batch(size: tuple[int, int], images: int, boxes: int, classes: int, device: torch.device
                 ) -> tuple[Tensor, list[dict]]:
    """Random images and targets as the loader gives them, on the device, for measurements.

    Args:
        size: height and width of the images before they are padded.
        boxes: for each image; their sides are 1/32 to 0.7 of the image's sides.
    """
    (height, width), padded = size, padded_size(size)
    pixels = torch.zeros(images, *padded, 3, dtype=torch.uint8)
    pixels[:, :height, :width] = torch.randint(0, 256, (images, height, width, 3))
    targets = []
    for number in range(images):
        sides = torch.tensor([width, height]) * 2 ** (4.5 * torch.rand(boxes, 2) - 5)
        low = torch.rand(boxes, 2) * (torch.tensor([width, height]) - sides)
        targets.append({
            "boxes": torch.cat([low, low + sides], dim=1).to(device),
            "labels": torch.randint(classes, (boxes,)).to(device), "image_size": size,
            "pad_size": padded, "original_size": size, "image_id": number,
            "ignored_boxes": torch.zeros(0, 4, device=device)})
    return pixels.permute(0, 3, 1, 2).to(device), targets
