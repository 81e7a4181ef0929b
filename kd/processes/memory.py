"""The memory that this process uses."""
import sys

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


def peak_resident() -> int | None:
    """The peak CPU memory of this process since it started, in bytes; None on Windows, where it is not measured."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_memory(device: torch.device) -> int | None:
    """The peak memory so far, in bytes: of the device on CUDA, otherwise of this process, see `peak_resident`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()


def in_gib(number: int | None) -> str:
    """Bytes for people: `1.50 GiB`."""
    return "not measured" if number is None else f"{number / 2 ** 30:.2f} GiB"


def in_mib(number: float) -> str:
    """Bytes for people: `1.5 MiB`."""
    return f"{number / 2 ** 20:.1f} MiB"
