"""What a detector costs."""
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import Detector


def count_parameters(detector: Detector) -> int:
    """Weights of backbone, neck and head."""
    return sum(parameter.numel() for parameter in detector.parameters())


@torch.no_grad()
def count_flops(detector: Detector, size: tuple[int, int]) -> int:
    """Floating-point operations of backbone, neck and head on one image of (height, width); a multiply-add is two."""
    was_training = detector.training
    detector.eval()
    parameter = next(detector.parameters())
    with FlopCounterMode(display=False) as counter:
        detector.bbox_head(detector.extract_features(parameter.new_zeros(1, 3, *size)))
    detector.train(was_training)
    return counter.get_total_flops()
