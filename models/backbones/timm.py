"""Any features-only model of timm (pip install timm) as a backbone. The strides of its maps select the features."""
import math
from difflib import get_close_matches
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import one_line
from data.extras import need
from data.ranges import Count, Number, Some

from ..build import ConfigError
from ..checkpoints.unpickler import CheckpointError
from ..layers import keep_in_eval
from ..weights import load_backbone_weights
from .torchvision import PROBE, as_map, layout

DIVISOR = 32  # of the height and width of the detectors' images
OWN = {"features_only", "out_indices", "pretrained", "checkpoint_path"}  # arguments of create_model that are given here


class TimmBackbone(nn.Module):
    """Features of a timm model, with its parameter names. Needs the extra `timm`.

    Args:
        name: timm's name of the model: mobilenetv3_large_100, tf_efficientnet_lite0, convnext_tiny, ...; a tag says
            which of its weights are meant (convnext_tiny.fb_in22k).
        out_strides: strides of the maps that are returned, from fine to coarse.
        weights: backbone weights to start from, see `models.weights.load_backbone_weights`; DEFAULT means the weights
            that timm recommends for this model, or those of its tag. timm downloads them from the Hugging Face hub.
        frozen_stages: stages that are not trained and stay in eval mode, from the input on. A stage ends where timm
            takes a feature (`feature_info`); in most models, stage 1 is the stem, and 2 ends at stride 4.
        norm_eval: batch norm uses its running statistics also in training.
        out_norm: add a LayerNorm over the channels of each output, `norm0`, `norm1`, ..., which transformers need. The
            norm of an output that the neck does not use is never trained: name only strides that the neck uses.
        options: further arguments of timm's `create_model`, for example `{drop_path_rate: 0.1}`; Swin needs
            `{strict_img_size: false}`.

    `out_channels` and `out_strides` have one entry per output. `preprocess` has the pixel statistics of timm's weights,
    the default of `model.preprocess`. Models that accept only one image size cannot be backbones.
    """

    def __init__(self, name: str, out_strides: Some[Count] = (8, 16, 32), weights: str | None = None,
                 frozen_stages: Number = 0, norm_eval: bool = True, out_norm: bool = False,
                 options: dict = {}):
        super().__init__()
        if taken := OWN & options.keys():
            raise ConfigError(f"options.{min(taken)}", "is set by densekd: use the arguments of TimmBackbone")
        timm = need("timm", "timm", f"the backbone {name}")
        if not timm.is_model(name):
            close = get_close_matches(name, timm.list_models(), 1)
            advice = f'did you mean "{close[0]}"?' if close else "timm.list_models() in Python lists them"
            raise ConfigError("name", f'timm has no model "{name}"; {advice}')
        with torch.device("meta"):  # only to read their names
            whole = create(timm, name, options)
            stages = create(timm, name, options | {"features_only": True}).feature_info
        ends = [stages[i]["module"] for i in range(len(stages))]
        indices = choose([stages[i]["reduction"] for i in range(len(stages))], list(out_strides), name)
        net = create(timm, name, options | {"features_only": True, "out_indices": indices})
        self.net = (net,)  # hidden in a tuple: its modules get the names that the whole model gives them
        self._adopt(net, whole)
        self.out_strides, self.norm_eval, self.out_norm, self.frozen = list(out_strides), norm_eval, out_norm, []
        self.divisor = 1  # of the heights and widths that `forward` takes
        self.out_channels, self.channels_last = self._measure(name, same_padded(net))
        norms = {f"norm{i}": nn.LayerNorm(channels) for i, channels in enumerate(self.out_channels) if out_norm}
        for norm, module in norms.items():
            self.add_module(norm, module)
        statistics = whole.pretrained_cfg
        self.preprocess = {key: [round(255 * value, 6) for value in statistics[key]] for key in ("mean", "std")}
        if weights is not None:
            source = pretrained(timm, name, options) if weights == "DEFAULT" else weights
            load_backbone_weights(getattr(self, "model", self), source, allow_missing=[f"{norm}.*" for norm in norms])
        self.frozen = self._frozen_modules(ends, frozen_stages, indices[-1] + 1)
        for module in self.frozen:
            module.requires_grad_(False)
        self.train()

    def _adopt(self, net: nn.Module, whole: nn.Module) -> None:
        """Register net's modules under their names in the whole model: timm calls its `stages.0` `stages_0` here."""
        flat = {f"{outer}_{inner}": (outer, inner)
                for outer, module in whole.named_children() for inner, _ in module.named_children()}
        for child, module in net.named_children():
            outer, inner = flat.get(child, (child, ""))
            if inner:
                if outer not in self._modules:
                    self.add_module(outer, nn.Module())
                self.get_submodule(outer).add_module(inner, module)
            else:
                self.add_module(child, module)

    def _measure(self, name: str, padded: list[nn.Module]) -> tuple[list[int], list[bool]]:
        """Channels, and whether channels come last, for each output on one black image.

        Parameters that no output depends on are frozen: timm keeps some, and they would never have a gradient. The
        layers `padded` then pad by constant widths where they can, see `fix_padding`.
        """
        self.eval()
        sizes: dict[nn.Module, tuple[int, int]] = {}

        def note(layer: nn.Module, args: tuple[Tensor]) -> None:
            sizes[layer] = tuple(args[0].shape[2:])

        hooks = [layer.register_forward_pre_hook(note) for layer in padded]
        try:
            outs = self.net[0](torch.zeros(1, 3, *PROBE))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError("name", f"{name} cannot run on an image of {PROBE[0]}x{PROBE[1]}; a backbone must accept "
                                      f"any multiple of 32 ({one_line(error, 120)})") from error
        for hook in hooks:
            hook.remove()
        divisor = min(self.out_strides[-1], DIVISOR)
        if any([fix_padding(layer, size, divisor) for layer, size in sizes.items()]):
            self.divisor = divisor
        found = [layout(out) for out in outs]
        if [each and each[1] for each in found] != self.out_strides:
            raise ConfigError("name", f"{name} gives {[list(out.shape) for out in outs]} for an image of "
                                      f"{PROBE[0]}x{PROBE[1]}, not maps with the strides {self.out_strides}")
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(sum(out.sum() for out in outs), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients):
            parameter.requires_grad_(gradient is not None)
        return [channels for channels, _, _ in found], [last for _, _, last in found]

    def _frozen_modules(self, ends: list[str], count: int, used: int) -> list[nn.Module]:
        """The modules of the first `count` stages, each with everything in it; `ends` are the stages' last modules."""
        if count > used:
            raise ConfigError("frozen_stages", f"must be from 0 to {used}, the stages that out_strides "
                                               f"{self.out_strides} needs, not {count}")
        if not count:
            return []
        names = [name for name, _ in self.named_modules() if name]
        end = ends[count - 1]
        inside = [i for i, name in enumerate(names) if f"{name}.".removeprefix("model.").startswith(f"{end}.")]
        if not inside:
            raise ConfigError("frozen_stages", f"timm does not say where stage {count} of this model ends; use 0")
        later = names[inside[-1] + 1:]
        return [self.get_submodule(name) for name in names[:inside[-1] + 1]
                if not any(other.startswith(f"{name}.") for other in later)]

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Sets training mode, except for frozen modules and, with `norm_eval`, for the batch norms."""
        super().train(mode)
        keep_in_eval(self, self.frozen, self.norm_eval)
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (N, C, H / stride, W / stride), one per output.

        Args:
            x: images (N, 3, H, W); H and W are multiples of the last stride.
        Raises:
            ValueError: they are not, and layers that depend on it pad by constant widths, see `fix_padding`.
        """
        if x.shape[2] % self.divisor or x.shape[3] % self.divisor:
            raise ValueError(f"this backbone takes heights and widths that are multiples of {self.divisor}, not "
                             f"{x.shape[2]} x {x.shape[3]}")
        norms = [getattr(self, f"norm{i}") if self.out_norm else None for i in range(len(self.out_strides))]
        return [as_map(*each) for each in zip(self.net[0](x), self.channels_last, norms)]


def same_padded(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that pad by the size of their input, as TensorFlow does: timm's `Conv2dSame` and others."""
    return [module for module in model.modules() if type(module).__name__.endswith("Same")
            and type(module).__module__.startswith("timm.layers.") and getattr(module, "same_pad", True)]


def fix_padding(layer: nn.Module, size: tuple[int, int], divisor: int) -> bool:
    """Make a layer of `same_padded` pad by constant widths, if they are the same for all images; whether they are.

    It pads to ceil(n / stride) outputs, by max((ceil(n / stride) - 1) * stride + (kernel - 1) * dilation + 1 - n, 0),
    half on each side. With sizes that vary, exporters take minutes with this. If n is always a multiple of the stride,
    the first term is n - stride, and the sum does not depend on n.

    Args:
        size: of its input, (h, w), for an image of size `PROBE`.
        divisor: heights and widths of images are multiples of it.
    """
    for image, n, stride in zip(PROBE, size, layer.stride):
        if image % n or divisor % (image // n * stride):
            return False
    pads = []
    for axis in (1, 0):  # F.pad takes the last axis first
        dilation = getattr(layer, "dilation", (1, 1))[axis]
        total = max((layer.kernel_size[axis] - 1) * dilation + 1 - layer.stride[axis], 0)
        pads += [total // 2, total - total // 2]
    value = -math.inf if isinstance(layer, nn.MaxPool2d) else 0
    if hasattr(layer, "same_pad"):
        layer.same_pad = False
    else:
        layer.__class__ = type(layer).__mro__[1]  # torch's layer, with this one's parameters and hooks
    if any(pads):
        layer.register_forward_pre_hook(partial(pad_input, pads=tuple(pads), value=value))
    return True


def pad_input(layer: nn.Module, args: tuple[Tensor], pads: tuple[int, ...], value: float) -> Tensor:
    return F.pad(args[0], pads, value=value)


def create(timm: ModuleType, name: str, options: dict) -> nn.Module:
    """timm's model; ConfigError if it refuses the name's tag or an option."""
    try:
        return timm.create_model(name, **options)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = f"timm cannot create {name} ({one_line(error, 160)})"
        raise ConfigError("options" if options else "name", reason) from error


def choose(reductions: list[int], strides: list[int], name: str) -> tuple[int, ...]:
    """The index of a model's last feature at each of the strides."""
    if strides != sorted(set(strides)):
        raise ConfigError("out_strides", f"must go from fine to coarse, each once, not {strides}")
    for stride in strides:
        if stride not in reductions:
            raise ConfigError("out_strides", f"{name} has no map with stride {stride}; its strides are "
                                             f"{', '.join(map(str, sorted(set(reductions))))}")
    return tuple(len(reductions) - 1 - reductions[::-1].index(stride) for stride in strides)


def pretrained(timm: ModuleType, name: str, options: dict) -> dict[str, Tensor]:
    """timm's own weights of a model, downloaded if need be."""
    try:
        return timm.create_model(name, pretrained=True, **options).state_dict()
    except Exception as error:  # each version of the hub's client has exceptions of its own
        raise CheckpointError(f"timm cannot load its weights of {name} ({one_line(error, 160)}); without network, give "
                              "the path of a file: weights: PATH") from error
