"""The moving average of a detector's weights."""
import copy

import torch

from models import Detector


class WeightAverage:
    """Exponential moving average of a detector's weights and statistics; an update keeps the share `decay` of it.

    The first update copies them. PyTorch's `AveragedModel` with EMA is the same, but waits for the GPU at every update.
    """

    def __init__(self, detector: Detector, decay: float):
        self.module = copy.deepcopy(detector)  # the average
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, detector: Detector) -> None:
        """Add the weights after a step to the average."""
        pairs = list(zip(self.module.state_dict().values(), detector.state_dict().values()))
        own, other = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
        torch._foreach_lerp_(own, other, 1 - self.decay if self.updates else 1.0)
        for count, new in (pair for pair in pairs if not pair[0].is_floating_point()):
            count.copy_(new)
        self.updates += 1
