"""What a call asks of a device: kernels, waits and bytes. These numbers have no noise, and need no GPU."""
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .timing import Call

ALLOCATES = ("empty", "new_empty", "_unsafe_view")  # starts of names of operators that compute nothing
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique", "is_nonzero", "equal.")


class Launches(NamedTuple):
    """The work of a call as a device gets it, one operator after the other."""

    kernels: int  # operators that compute something; on a GPU each launches a kernel, some launch several
    waits: int    # operators whose result the CPU must know to go on
    bytes: int    # read and written by operators that are not convolutions


class Counter(TorchDispatchMode):
    """Counts the operators that run while it is active, also those of backward passes."""

    def __init__(self):
        super().__init__()
        self.kernels = self.waits = self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2] + "." + function._overloadname
        if function.namespace == "profiler" or function.is_view or name.startswith(ALLOCATES):
            return result
        by_mask = name.startswith("index.") and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
        self.waits += by_mask or name.startswith(WAITS)
        self.kernels += 1
        if "conv" not in name:
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor))
        return result


def count_launches(call: Call) -> Launches:
    """The kernels, waits and bytes of a call. What an earlier call leaves for it, such as anchors, does not count."""
    with Counter() as counter:
        call()
    return Launches(counter.kernels, int(counter.waits), counter.bytes)
