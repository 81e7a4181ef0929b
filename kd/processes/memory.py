"""The memory that this process uses."""
import resource
import sys

import torch


def peak_resident() -> int:
    """The peak CPU memory of this process since it started, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_memory(device: torch.device) -> int:
    """The peak memory so far, in bytes: of the device on CUDA, otherwise of this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
