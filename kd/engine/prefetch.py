"""Copies the images of a step to the GPU while the step before it runs (`train.prefetch`)."""
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Batches = list[tuple[Tensor, list[dict]]]


def prefetched(steps: Iterable[Batches], device: torch.device) -> Iterator[Batches]:
    """The batches of each step, with their images on the device; targets stay as they are.

    The loader's pinned images are copied on a stream of their own. When a step's batches are fetched, the GPU still
    works on the step before, and the copy does not wait for this work.
    """
    copies = torch.cuda.Stream(device)
    for batches in steps:
        used = torch.cuda.current_stream(device)
        with torch.cuda.stream(copies):
            moved = [(images.to(device, non_blocking=True), targets) for images, targets in batches]
        used.wait_stream(copies)
        for images, _ in moved:
            images.record_stream(used)  # so that its memory is not written to before the step has used it
        yield moved
