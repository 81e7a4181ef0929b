"""The number format, memory layout and kernels that a configuration and the machine choose."""
import time
from functools import cache

import torch
from torch import nn

from ..config import TrainConfig
from ..processes.timing import interleave

PAYS = 1.2  # so many times as fast a kernel must be on this machine, to be chosen


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision as the `train.amp` setting says: none, fp16 or bf16."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp != "none")


def memory_format(channels_last: bool) -> torch.memory_format:
    """The layout of convolution weights in memory; features follow the weights."""
    return torch.channels_last if channels_last else torch.contiguous_format


def place(detector: nn.Module, device: torch.device, settings: TrainConfig) -> nn.Module:
    """Move a detector that only detects to a device, in its memory layout and with its kernels.

    `train.channels_last: auto` means channels_last here: a few images are not worth a measurement.
    """
    detector.to(device, memory_format=memory_format(settings.channels_last is not False))
    if pointwise_pays(device, settings.amp):
        route_pointwise(detector)
    return detector


def route_pointwise(module: nn.Module) -> None:
    """Let the 1x1 convolutions of a module use oneDNN, also with one thread; see `pointwise_pays`.

    PyTorch gives dilated convolutions to oneDNN, and dilation has no meaning for a kernel of one pixel.
    """
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == conv.stride == (1, 1):
            conv.dilation = (2, 2)


def pointwise_pays(device: torch.device, *precisions: str | None) -> bool:
    """Whether `route_pointwise` makes this process faster; it is measured once, in some milliseconds.

    With one thread, PyTorch gives 1x1 convolutions to its library for matrix products. On processors of AMD, Intel's
    library (MKL) reaches half the speed of oneDNN.

    Args:
        precisions: the settings that choose number formats. Only float32 has these two ways.
    """
    return (device.type == "cpu" and set(precisions) <= {"none", "fp32", None} and torch.get_num_threads() == 1
            and torch.backends.mkldnn.is_available() and _dilated_is_faster())


@cache
@torch.no_grad()
def _dilated_is_faster() -> bool:
    x, weight = (torch.ones(shape).to(memory_format=torch.channels_last)
                 for shape in ((2, 256, 20, 26), (256, 256, 1, 1)))
    seconds = interleave({dilation: lambda dilation=dilation: torch.conv2d(x, weight, dilation=dilation)
                          for dilation in (1, 2)}, rounds=7, clock=time.process_time)  # not the time of other programs
    return min(seconds[1]) > PAYS * min(seconds[2])
