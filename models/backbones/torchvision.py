"""Any torchvision classification model as a backbone. The names of its nodes select the features."""
import difflib
from collections.abc import Callable, Collection, Sequence

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from data.errors import one_line
from data.ranges import Some

from ..build import ConfigError, nearest
from ..layers import keep_in_eval
from ..weights import load_backbone_weights

# The quotient of the sides is not a power of two, so height, width and channels of a map cannot be confused.
PROBE = (64, 96)


class TorchvisionBackbone(nn.Module):
    """Features of a torchvision classification model, with its parameter names, without modules that are not needed.

    Args:
        name: torchvision's name of the model: swin_t, convnext_tiny, mobilenet_v3_large, ...
        nodes: names of modules or operations whose outputs are returned, finest first. torchvision's
            `get_graph_node_names` lists the names; a module's name means its last operation. Choose stages or blocks:
            an in-place activation overwrites the output of the convolution or norm before it.
        weights: backbone weights to start from, see `models.weights.load_backbone_weights`; DEFAULT means the weights
            that torchvision recommends for this model.
        out_norm: add a LayerNorm over the channels of each output, `norm0`, `norm1`, ..., as in mmdet's Swin. The norm
            of an output that the neck does not use is never trained: name only nodes that the neck uses.
        frozen: names of modules whose parameters are not trained; they stay in eval mode, with all their submodules.
        norm_eval: batch norm uses its running statistics also in training.

    `out_channels` and `out_strides` have one entry per output; they are measured. Models that accept only one image
    size (ViT, MaxViT) cannot be backbones.
    """

    def __init__(self, name: str, nodes: Some[str], weights: str | None = None, out_norm: bool = False,
                 frozen: tuple[str, ...] = (), norm_eval: bool = True):
        super().__init__()
        models = torchvision.models.list_models(module=torchvision.models)
        if name not in models:
            raise ConfigError("name", f'torchvision has no classification model "{name}"; {nearest(name, models)}')
        self.nodes, self.out_norm, self.norm_eval, self.frozen = list(nodes), out_norm, norm_eval, ()
        children, self.graphs = extract(torchvision.models.get_model(name, weights=None), self.nodes)
        for child, module in children.items():
            self.add_module(child, module)
        self.out_channels, self.out_strides, self.channels_last = self._measure(name)
        norms = {f"norm{i}": nn.LayerNorm(channels) for i, channels in enumerate(self.out_channels) if out_norm}
        for norm, module in norms.items():
            self.add_module(norm, module)
        if weights is not None:
            source = f"torchvision://{name}/DEFAULT" if weights == "DEFAULT" else weights
            load_backbone_weights(self, source, allow_missing=[f"{norm}.*" for norm in norms])
        self._freeze(frozen)
        self.train()

    def _freeze(self, names: Sequence[str]) -> None:
        modules = {name: module for name, module in self.named_modules() if name}
        for name in names:
            if name not in modules:
                raise ConfigError("frozen", f'the nodes use no module "{name}"; {suggest(name, modules)}')
            modules[name].requires_grad_(False)
        self.frozen = tuple(names)

    @torch.no_grad()
    def _measure(self, name: str) -> tuple[list[int], list[int], list[bool]]:
        """Channels, stride, and whether channels come last, for each node's output on one black image."""
        self.eval()
        try:
            outs = self.graphs[False](self, torch.zeros(1, 3, *PROBE))
        except (AssertionError, RuntimeError) as error:
            raise ConfigError("name", f"{name} cannot run on an image of {PROBE[0]}x{PROBE[1]}; a backbone must accept "
                                      f"any multiple of 32 ({one_line(error, 120)})") from error
        if len(outs) < len(self.nodes):
            raise ConfigError("nodes", f"name the same output more than once: {', '.join(self.nodes)}")
        found = [layout(outs[node]) for node in self.nodes]
        for node, measured in zip(self.nodes, found):
            if measured is None:
                shape = list(outs[node].shape) if isinstance(outs[node], Tensor) else type(outs[node]).__name__
                raise ConfigError("nodes", f'"{node}" gives {shape} for an image of {PROBE[0]}x{PROBE[1]}, not a map '
                                           "with stride 1, 2, 4, 8, 16 or 32")
        channels, strides, last = (list(values) for values in zip(*found))
        if strides != sorted(set(strides)):
            raise ConfigError("nodes", f"must go from fine to coarse, but have strides {strides}")
        return channels, strides, last

    def train(self, mode: bool = True) -> "TorchvisionBackbone":
        """Sets training mode, except for frozen modules and, with `norm_eval`, for the batch norms."""
        super().train(mode)
        keep_in_eval(self, map(self.get_submodule, self.frozen), self.norm_eval)
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (N, C, H / stride, W / stride), one per node.

        Args:
            x: images (N, 3, H, W); H and W are multiples of the last stride.
        """
        found = self.graphs[self.training](self, x)
        outs = []
        for i, node in enumerate(self.nodes):
            norm = getattr(self, f"norm{i}") if self.out_norm else None
            outs.append(as_map(found[node], self.channels_last[i], norm))
        return outs


def extract(model: nn.Module, nodes: list[str]) -> tuple[dict[str, nn.Module], dict[bool, Callable]]:
    """The modules that `nodes` need, by name, and the computation for each mode (True is training).

    A computation takes a module with these children and images (N, 3, H, W), and returns a dict of outputs. Thus the
    children of a backbone can keep torchvision's names, in both modes.
    """
    names = {prefix for name in get_graph_node_names(model, suppress_diff_warning=True)[1] for prefix in prefixes(name)}
    for node in nodes:
        if node not in names:
            raise ConfigError("nodes", f'the model has no node "{node}"; {suggest(node, names)}')
    extractor = create_feature_extractor(model, nodes, suppress_diff_warning=True)
    graphs = {}
    for mode in (False, True):
        extractor.train(mode)  # this replaces the forward of the extractor's own class
        graphs[mode] = type(extractor).forward
    return dict(extractor.named_children()), graphs


def prefixes(name: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`, `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[:i + 1]) for i in range(len(parts))]


def suggest(name: str, valid: Collection[str]) -> str:
    """Advice on a wrong node or module: the nearest at its depth, or the children of the model and of `features`."""
    close = difflib.get_close_matches(name, [word for word in valid if word.count(".") == name.count(".")], 1)
    return nearest(name, close or [word for word in valid if "." not in word.removeprefix("features.")])


def as_map(out: Tensor, channels_last: bool, norm: nn.Module | None = None) -> Tensor:
    """An output as a contiguous map (N, C, H, W), after the norm over its channels if there is one."""
    if norm is not None:
        out, channels_last = norm(out if channels_last else out.permute(0, 2, 3, 1)), True
    return (out.permute(0, 3, 1, 2) if channels_last else out).contiguous()


def layout(out: Tensor) -> tuple[int, int, bool] | None:
    """Channels, stride, and whether channels come last, of the output for a `PROBE` image; None if not a map."""
    if not isinstance(out, Tensor) or out.dim() != 4:
        return None
    for last, (height, width, channels) in ((False, (*out.shape[2:], out.shape[1])), (True, tuple(out.shape[1:]))):
        stride = PROBE[0] // max(height, 1)
        if (height * stride, width * stride) == PROBE:
            return channels, stride, last
    return None
