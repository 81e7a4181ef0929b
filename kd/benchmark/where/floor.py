"""The floor of a training step: the same convolutions alone, each in its best memory layout, as one loop.

A gradient is in the loop if the step computes it: there is none to the input of the first trained layer, and none to
the weights of a frozen one.
"""
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...processes.timing import Call, interleave, medians_ms

aten = torch.ops.aten
LAYOUTS = ("ordinary", "channels_last")


@dataclass(frozen=True)
class Convolution:
    """One call of a convolution, forward or backward."""

    backward: bool
    x: tuple[int, ...]        # shapes
    weight: tuple[int, ...]
    out: tuple[int, ...]
    bias: bool
    dtype: torch.dtype
    settings: tuple           # stride, padding, dilation, transposed, output_padding, groups
    wanted: tuple[bool, ...]  # gradients of input, weight and bias, if it is backward

    def __str__(self) -> str:
        (_, channels, height, width), (outputs, _, *kernel), groups = self.x, self.weight, self.settings[-1]
        strided = "" if self.settings[0][0] == 1 else f" stride {self.settings[0][0]}"
        grouped = "" if groups == 1 else f" in {groups} groups"
        return f"{kernel[0]}x{kernel[1]}{strided}, {channels} to {outputs}{grouped}, {height} x {width}"

    @property
    def direction(self) -> str:
        """What it computes, in words."""
        names = ("input", "weight", "bias")
        gradients = ", ".join(name for name, wanted in zip(names, self.wanted) if wanted)
        return f"gradient of {gradients}" if self.backward else "forward"


class Recorder(TorchDispatchMode):
    """Lists the convolutions that run while it is active."""

    def __init__(self):
        super().__init__()
        self.found: list[Convolution] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is aten.convolution.default:
            x, weight, bias, *settings = args
            self.found.append(Convolution(False, tuple(x.shape), tuple(weight.shape), tuple(result.shape),
                                          bias is not None, x.dtype, hashable(settings), ()))
        elif function is aten.convolution_backward.default:
            grad, x, weight, biases, *settings, wanted = args
            self.found.append(Convolution(True, tuple(x.shape), tuple(weight.shape), tuple(grad.shape),
                                          biases is not None, x.dtype, hashable(settings), tuple(wanted)))
        return result


def hashable(value: Any) -> Any:
    """Lists as tuples."""
    return tuple(map(hashable, value)) if isinstance(value, (list, tuple)) else value


def record(call: Call) -> list[Convolution]:
    """The convolutions of a call, in order, each without what oneDNN could compute along with it."""
    enabled, *_ = torch.backends.mkldnn.set_flags(False)  # its context manager `flags` warns about other settings
    try:
        with Recorder() as recorder:
            call()
    finally:
        torch.backends.mkldnn.set_flags(enabled)
    return recorder.found


class Buffers:
    """Random tensors of any shape and layout. Those of one name share their memory, so that all fit on a GPU."""

    def __init__(self, device: torch.device):
        self.device, self.memory = device, {}

    def reserve(self, convolutions: Iterable[Convolution]) -> None:
        """Make room for the largest tensors."""
        for conv in convolutions:
            for name, shape in (("x", conv.x), ("weight", conv.weight), ("out", conv.out), ("bias", conv.out[1:2])):
                key, count = (name, conv.dtype), torch.Size(shape).numel()
                if len(self.memory.get(key, ())) < count:
                    self.memory[key] = torch.randn(count, device=self.device).to(conv.dtype)

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
        """A tensor of a shape (N, C, H, W) or (C,) in a layout."""
        flat = self.memory[name, dtype][:torch.Size(shape).numel()]
        if layout == "channels_last" and len(shape) == 4:
            n, c, h, w = shape
            return flat.view(n, h, w, c).permute(0, 3, 1, 2)
        return flat.view(shape)


def alone(conv: Convolution, layout: str, buffers: Buffers) -> Call:
    """A call of one convolution on tensors that are ready in a layout."""
    x, weight = (buffers.get(name, getattr(conv, name), conv.dtype, layout) for name in ("x", "weight"))
    if not conv.backward:
        bias = buffers.get("bias", conv.weight[:1], conv.dtype, layout) if conv.bias else None
        return lambda: aten.convolution(x, weight, bias, *conv.settings)
    grad, biases = buffers.get("out", conv.out, conv.dtype, layout), [conv.out[1]] if conv.bias else None
    return lambda: aten.convolution_backward(grad, x, weight, biases, *conv.settings, conv.wanted)


def build_floor(call: Call, device: torch.device, rounds: int = 3,
                note: Callable[[str], None] = lambda text: None) -> tuple[Call, list[dict]]:
    """The convolutions of a call as one loop, each in the layout in which it is fastest alone.

    Returns:
        The loop, and a row for each convolution that differs, those that take longest first: `what`, `direction`,
        `times` in a step, `ms` of one by layout, and the `flops` of one.
    """
    found = record(call)
    times, buffers = Counter(found), Buffers(device)
    buffers.reserve(times)
    best, rows = {}, []
    # On a CPU, the CPU time of this process for each thread, because other processes disturb it less.
    clock, threads = (time.process_time, torch.get_num_threads()) if device.type == "cpu" else (time.perf_counter, 1)
    note(f"timing {len(times)} different convolutions in both layouts")
    for conv, count in times.items():
        calls = {layout: alone(conv, layout, buffers) for layout in LAYOUTS}
        ms = {layout: value / threads for layout, value in medians_ms(interleave(calls, rounds, clock=clock)).items()}
        best[conv] = alone(conv, min(ms, key=ms.get), buffers)
        rows.append({"what": str(conv), "direction": conv.direction, "times": count, "ms": ms, "flops": flops(conv)})
    calls = [best[conv] for conv in found]

    @torch.no_grad()
    def loop() -> None:
        for each in calls:
            each()

    return loop, sorted(rows, key=lambda row: -row["times"] * min(row["ms"].values()))


def flops(conv: Convolution) -> int:
    """Floating-point operations of a convolution that is not transposed."""
    once = 2 * torch.Size(conv.out).numel() * torch.Size(conv.weight[1:]).numel()
    return once * sum(conv.wanted[:2]) if conv.backward else once
