"""A GPU on which nothing is computed: shapes, types and devices of a training step are checked without a GPU."""
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Finds what the CPU waits for: copies between CPU and GPU, and operators whose result's size depends on values.

    FakeTensorMode itself raises for these operators, except within `unknown_sizes`, and for item().
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(function)
        if name.startswith("aten._to_copy") and "device" in kwargs:
            moved = torch.device(kwargs["device"]).type != args[0].device.type
        else:
            moved = name.startswith("aten.copy_") and args[0].device.type != args[1].device.type
        waits = moved and not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        if name.startswith(("aten.index.", "aten.index_put", "aten._index_put")):
            indices = [x for x in args[1] if x is not None]
            waits = any(x.dtype == torch.bool or x.device != args[0].device for x in indices)
        if waits or name.startswith(("aten.nonzero", "aten._local_scalar_dense", "torchvision.nms")):
            self.found.append(name)
        return function(*args, **kwargs)


@contextmanager
def pretended_gpu() -> Iterator[list[str]]:
    """A GPU on which nothing is computed; yields what the CPU waited for.

    New tensors are on the CPU by default, as in training. Gradients are computed by `run_backward`, because PyTorch's
    engine asks for a driver, and the random numbers of new weights are left out.
    """
    with ExitStack() as stack:
        for name, value in {
                "torch.autograd.grad": run_backward, "torch._fused_sgd_": fused_sgd,
                "torch.nn.init.trunc_normal_": lambda tensor, *_, **__: tensor,
                "torch.nn.Module.float": lambda module: module,  # all are, and these tensors cannot be exchanged
                "torch.cuda.Event": MagicMock(), "torch.cuda.is_bf16_supported": lambda: True,
                "torch.cuda.amp.common.amp_definitely_not_available": lambda: False}.items():
            stack.enter_context(patch(name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Waits()).found


@contextmanager
def unknown_sizes() -> Iterator[None]:
    """Let operators run whose result's size depends on values; their results have sizes that are not known."""
    mode = detect_fake_mode()
    mode.shape_env = ShapeEnv()
    try:
        yield
    finally:
        mode.shape_env = None


def on_gpu(targets: list[dict]) -> list[dict]:
    """The targets with their tensors on the GPU."""
    return [{k: v.to("cuda", non_blocking=True) if torch.is_tensor(v) else v for k, v in t.items()} for t in targets]


def run_backward(outputs: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor],
                 grad_outputs: Tensor | Sequence[Tensor] | None = None, retain_graph: bool | None = None,
                 allow_unused: bool = False) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad`, node by node in Python. Nothing is freed. PyTorch's engine needs a driver for tensors on a
    GPU, also for those without content."""
    outputs, inputs = ([x] if torch.is_tensor(x) else list(x) for x in (outputs, inputs))
    grads = [torch.ones_like(x) for x in outputs] if grad_outputs is None else grad_outputs
    ends = [tuple(get_gradient_edge(x))[:2] for x in inputs]
    arrived, result = defaultdict(dict), {}

    def arrive(node, index: int, grad: Tensor | None) -> None:
        if node is None or grad is None:
            return
        like = node._input_metadata[index]
        if grad.shape != like.shape:  # the engine undoes broadcasting, and promotion below
            grad = grad.sum_to_size(tuple(like.shape))
        grad = grad if grad.dtype == like.dtype else grad.to(like.dtype)
        arrived[node][index] = grad + arrived[node][index] if index in arrived[node] else grad

    starts = [tuple(get_gradient_edge(x))[:2] for x in outputs]
    for (node, index), grad in zip(starts, [grads] if torch.is_tensor(grads) else grads):
        arrive(node, index, grad)
    with torch.no_grad():
        for node in in_order([node for node, _ in starts]):
            got = arrived.pop(node, {})
            result |= {end: got[end[1]] for end in ends if end[0] is node and end[1] in got}
            if got and node.next_functions:
                for edge, grad in zip(*call(node, [got.get(i) for i in range(len(node._input_metadata))])):
                    arrive(*edge, grad)
    missing = [end for end in ends if end not in result]
    assert allow_unused or not missing, f"{len(missing)} inputs have no part in the outputs"
    return tuple(result.get(end) for end in ends)


def in_order(starts: list) -> list:
    """The nodes of an autograd graph, each after all that it gets gradients from."""
    waiting, known, stack = defaultdict(int), dict.fromkeys(starts), list(starts)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waiting[node] += 1
                if node not in known:
                    known[node] = None
                    stack.append(node)
    ready, order = [node for node in known if not waiting[node]], []
    while ready:
        order.append(ready.pop())
        for node, _ in order[-1].next_functions:
            if node is not None:
                waiting[node] -= 1
                if not waiting[node]:
                    ready.append(node)
    return order


def call(node, grads: list[Tensor | None]) -> tuple[list, list]:
    """A node's edges and the gradients for them."""
    if not hasattr(node, "needs_input_grad"):
        found = node(*grads)
        return list(node.next_functions), list(found) if isinstance(found, tuple) else [found]
    found = node.apply(*grads)  # a torch.autograd.Function, which also answers for arguments that are no tensors
    found = found if isinstance(found, tuple) else (found,)
    return ([edge for edge in node.next_functions if edge[0] is not None],
            [grad for grad, needed in zip(found, node.needs_input_grad) if needed])


def fused_sgd(*lists: list[Tensor], **settings: object) -> None:
    """`torch._fused_sgd_`, which has no form without content: only the devices are checked."""
    tensors = [x for each in (*lists, *settings.values()) for x in (each if isinstance(each, list) else [each])
               if torch.is_tensor(x)]
    assert {x.device.type for x in tensors} == {"cuda"}


def set_gradients(model: nn.Module, loss: Tensor) -> None:
    """`loss.backward()` for the trained parameters of a model."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter, grad in zip(trained, run_backward(loss, trained, allow_unused=True)):
        parameter.grad = grad
