"""Measurements of calls: time, what takes it, operations, and memory."""
import os
import platform
import re
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, register_flop_formula

from ..processes.timing import Call, synchronize
from ..work_dir.provenance import commit

# Operators that are a convolution or a normalisation, forward or backward, on any device: aten::conv2d,
# aten::mkldnn_convolution, aten::convolution_backward, aten::cudnn_batch_norm, aten::native_group_norm_backward, ...;
# mkldnn::_convolution_pointwise is a convolution with what follows it.
CONVOLUTION = re.compile(r"(aten|mkldnn)::\w*conv(olution|\d)")
NORM = re.compile(r"aten::\w*(batch|group|layer)_norm")
BETWEEN = "between operators"  # Python, and the profiler itself


def shares(call: Call, times: int, device: torch.device, listed: int = 12) -> dict:
    """The shares of a call's time, from a profile of `times` calls.

    An operator counts as convolution or norm if it is one (see above) or runs inside one, for example a copy that
    changes the layout or precision of a convolution's input. Everything else is overhead: activations, additions,
    anchors, assignment, losses, distillation arithmetic, the optimiser.

    On the CPU, shares are of wall time: the own time of each operator, and the time between operators as overhead. On a
    GPU, they are of the time of its kernels, copies and fills, each counted for the operator that launched it. The time
    in which the GPU is idle is not included; it is the difference between a step's time and `device_ms`.
    Returns:
        Shares `convolution`, `norm` and `overhead`, which add up to 1; `largest`, the `listed` largest shares within
        the overhead, by operator; on a GPU `device_ms`, its busy time per call.
    """
    on_gpu = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler announces each of its stages
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        with record_function(BETWEEN):
            for _ in range(times):
                call()
            synchronize()
    spent = Counter()
    for event in profiler.events():
        if event.device_type == DeviceType.CPU:
            # Kernels are listed at the operator that launched them; one with the event's own name is an annotation.
            on_device = sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)
            spent[kind(event)] += on_device if on_gpu else event.self_cpu_time_total
    total = sum(spent.values())
    found = {name: spent.pop(name, 0) / total for name in ("convolution", "norm")}
    found["overhead"] = sum(spent.values()) / total
    found["largest"] = {name: value / total for name, value in spent.most_common(listed)}
    return found | ({"device_ms": total / times / 1e3} if on_gpu else {})


def kind(event: Any) -> str:
    """The kind of a profiler's event: "convolution", "norm", or the name of the operator itself."""
    above = event
    while above is not None:
        for name, pattern in (("convolution", CONVOLUTION), ("norm", NORM)):
            if pattern.match(above.name):
                return name
        above = above.cpu_parent
    return event.name


if hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
    @register_flop_formula(torch.ops.mkldnn._convolution_pointwise)
    def fused_flops(x_shape: list[int], *given: object, out_shape: list[int], **more: object) -> int:
        """Operations of a convolution that is fused with an activation, or with a sum: then the other map comes first.
        """
        return conv_flop_count(x_shape, given["add" in given], out_shape)


def with_flops(call: Call) -> tuple[Any, int]:
    """A call's result, and the floating-point operations of its convolutions and matrix products, also backward."""
    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, counter.get_total_flops()


def matmul_call(device: torch.device, side: int = 8192, times: int = 10) -> tuple[Call, int]:
    """A call of large bf16 matrix products, which shows what the device can reach, and their operations."""
    a, b, out = (torch.randn(side, side, device=device).bfloat16() for _ in range(3))

    def multiply() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    return multiply, times * 2 * side ** 3


def peak_gpu_memory(call: Call) -> int:
    """The peak bytes of tensors on the GPU in the second of two calls; the first one creates the optimiser state."""
    call()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated()


def machine(device: torch.device) -> dict:
    """The machine and the code of a measurement."""
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(), "cpu": cpu_name(),
            "threads": torch.get_num_threads(), "system": platform.platform(), "python": platform.python_version(),
            "torch": torch.__version__, "torchvision": torchvision.__version__, "commit": commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text(encoding="utf-8")) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
