"""The number format and memory layout that a configuration sets."""
import torch

from ..config import TrainConfig


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision as the `train.amp` setting says: none, fp16 or bf16."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp != "none")


def memory_format(settings: TrainConfig) -> torch.memory_format:
    """The layout of convolution weights in memory, see `train.channels_last`; features follow the weights."""
    return torch.channels_last if settings.channels_last else torch.contiguous_format
