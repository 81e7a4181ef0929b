"""Any features-only model of timm (pip install timm) as a backbone. The strides of its maps select the features."""
from difflib import get_close_matches
from types import ModuleType

import torch
from torch import Tensor, nn

from data.errors import one_line
from data.extras import need
from data.ranges import Count, Number, Some

from ..build import ConfigError
from ..checkpoints.unpickler import CheckpointError
from ..layers import keep_in_eval
from ..weights import load_backbone_weights
from .torchvision import PROBE, as_map, layout

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
        self.out_channels, self.channels_last = self._measure(name)
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

    def _measure(self, name: str) -> tuple[list[int], list[bool]]:
        """Channels, and whether channels come last, for each output on one black image.

        Parameters that no output depends on are frozen: timm keeps some, and they would never have a gradient.
        """
        self.eval()
        try:
            outs = self.net[0](torch.zeros(1, 3, *PROBE))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError("name", f"{name} cannot run on an image of {PROBE[0]}x{PROBE[1]}; a backbone must accept "
                                      f"any multiple of 32 ({one_line(error, 120)})") from error
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
        """
        norms = [getattr(self, f"norm{i}") if self.out_norm else None for i in range(len(self.out_strides))]
        return [as_map(*each) for each in zip(self.net[0](x), self.channels_last, norms)]


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
