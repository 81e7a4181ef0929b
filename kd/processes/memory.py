"""Memory of this process."""
import resource
import sys

import torch


def peak_resident() -> int:
    """The most memory in bytes that this process has held since it started, without a GPU's."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_memory(device: torch.device) -> int:
    """The most memory in bytes that was in use so far: the device's on CUDA, otherwise this process's."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
