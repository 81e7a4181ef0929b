"""ResNet 18 to 152 (arXiv:1512.03385) and ResNeXt (arXiv:1611.05431) with torchvision's parameter names."""
from typing import Annotated, Literal

from torch import Tensor, nn

from data.ranges import Count, NotEmpty, Range

from ..build import ConfigError
from ..folding import conv_norm, strided_pointwise
from ..layers import Norm, build_norm, kaiming_init, keep_in_eval
from ..weights import load_backbone_weights


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, style: str, norm_cfg: Norm):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = build_norm(norm_cfg, channels)[1]
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = build_norm(norm_cfg, channels)[1]
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, channels, stride, norm_cfg)
        self.last_norm = "bn2"

    def forward(self, x: Tensor) -> Tensor:
        out = conv_norm(self.conv1, self.bn1, x, self.relu)
        return conv_norm(self.conv2, self.bn2, out, self.relu, x if self.downsample is None else self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut; the 3x3 (pytorch) or the first 1x1 (caffe) has the stride.

    The 3x3 has `groups` groups with `group_width` channels each, by default one group with `channels`.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, style: str, norm_cfg: Norm, groups: int = 1,
                 group_width: int | None = None):
        super().__init__()
        stride1, stride2 = (stride, 1) if style == "caffe" else (1, stride)
        width = (group_width or channels) * groups
        self.conv1 = strided_pointwise(in_channels, width, stride1)
        self.bn1 = build_norm(norm_cfg, width)[1]
        self.conv2 = nn.Conv2d(width, width, 3, stride2, 1, groups=groups, bias=False)
        self.bn2 = build_norm(norm_cfg, width)[1]
        self.conv3 = nn.Conv2d(width, channels * 4, 1, bias=False)
        self.bn3 = build_norm(norm_cfg, channels * 4)[1]
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, channels * 4, stride, norm_cfg)
        self.last_norm = "bn3"

    def forward(self, x: Tensor) -> Tensor:
        out = conv_norm(self.conv1, self.bn1, x, self.relu)
        out = conv_norm(self.conv2, self.bn2, out, self.relu)
        return conv_norm(self.conv3, self.bn3, out, self.relu, x if self.downsample is None else self.downsample(x))


class Shortcut(nn.Sequential):
    """A convolution and its norm."""

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(self[0], self[1], x)


def shortcut(in_channels: int, out_channels: int, stride: int, norm_cfg: Norm) -> nn.Module | None:
    """The projection that a shortcut needs if the shape changes, otherwise None."""
    if stride == 1 and in_channels == out_channels:
        return None
    conv = strided_pointwise(in_channels, out_channels, stride)
    return Shortcut(conv, build_norm(norm_cfg, out_channels)[1])


DEPTHS = {18: (BasicBlock, (2, 2, 2, 2)), 34: (BasicBlock, (3, 4, 6, 3)), 50: (Bottleneck, (3, 4, 6, 3)),
          101: (Bottleneck, (3, 4, 23, 3)), 152: (Bottleneck, (3, 8, 36, 3))}
Stage = Annotated[int, Range(0, 3)]


class ResNet(nn.Module):
    """A ResNet that returns features; with `groups` it is a ResNeXt (32x4d: `groups` 32, `base_width` 4).

    Args:
        depth: 18, 34, 50, 101 or 152.
        base_channels: width of the first stage; each later stage doubles it.
        stem_channels: width of the stem, by default `base_channels`.
        num_stages: number of stages, at most four.
        out_indices: stages whose outputs are returned, at strides 4, 8, 16, 32.
        frozen_stages: -1 trains everything, 0 freezes the stem, k freezes the stem and the first k stages.
        norm_eval: batch norm uses its running statistics also in training.
        norm_cfg: BN, SyncBN, FrozenBN or GN, see `build_norm`.
        style: which convolution of a bottleneck has the stride, see `Bottleneck`.
        zero_init_residual: the last norm of each block starts at zero.
        groups: groups of a bottleneck's 3x3 convolutions.
        base_width: channels of each group in the first stage; each later stage doubles them. The default is 4, or
            `base_channels` without groups.
        weights: backbone weights to start from: a file, an https address, or a name like
            `torchvision://resnet50`, see `models.weights.load_backbone_weights`.
    """

    def __init__(self, depth: Literal[18, 34, 50, 101, 152], base_channels: Count = 64,
                 stem_channels: Count | None = None, num_stages: Annotated[int, Range(1, 4)] = 4,
                 out_indices: Annotated[tuple[Stage, ...], NotEmpty()] = (0, 1, 2, 3),
                 frozen_stages: Annotated[int, Range(-1, 4)] = -1, norm_eval: bool = True, norm_cfg: Norm = "BN",
                 style: Literal["pytorch", "caffe"] = "pytorch", zero_init_residual: bool = True, groups: Count = 1,
                 base_width: Count | None = None,
                 weights: str | None = None):
        super().__init__()
        if frozen_stages > num_stages:
            raise ConfigError("frozen_stages", f"must be from -1 to num_stages, {num_stages}, not {frozen_stages}")
        if out_indices[-1] >= num_stages or list(out_indices) != sorted(set(out_indices)):
            raise ConfigError("out_indices", f"must be among 0..{num_stages - 1}, each once and in this order, not "
                                             f"{list(out_indices)}")
        block, counts = DEPTHS[depth]
        if block is BasicBlock and (groups != 1 or base_width is not None):
            raise ConfigError("groups", f"and base_width need the bottlenecks of depth 50 and more, not depth {depth}")
        base_width = base_width or (base_channels if groups == 1 else 4)
        self.num_stages, self.out_indices = num_stages, tuple(out_indices)
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        channels = stem_channels or base_channels
        self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.bn1 = build_norm(norm_cfg, channels)[1]
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for i, count in enumerate(counts[:num_stages]):
            width = base_channels * 2 ** i
            bottleneck = {"groups": groups, "group_width": base_width * 2 ** i} if block is Bottleneck else {}
            blocks = []
            for j in range(count):
                blocks.append(block(channels, width, 2 if i and not j else 1, style, norm_cfg, **bottleneck))
                channels = width * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.out_channels = [base_channels * 2 ** i * block.expansion for i in self.out_indices]
        self.out_strides = [4 * 2 ** i for i in self.out_indices]
        self._init_weights(zero_init_residual)
        if weights is not None:
            load_backbone_weights(self, weights)
        self._freeze()

    def _init_weights(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                kaiming_init(module)
            elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_(getattr(module, module.last_norm).weight)

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.conv1, self.bn1] + [getattr(self, f"layer{i + 1}") for i in range(self.frozen_stages)]

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> "ResNet":
        """Sets training mode, except for frozen modules and, with `norm_eval`, for the batch norms."""
        super().train(mode)
        keep_in_eval(self, self._frozen_modules(), self.norm_eval)
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of the stages in `out_indices`.

        Args:
            x: images (N, 3, H, W).
        """
        x = self.maxpool(conv_norm(self.conv1, self.bn1, x, self.relu))
        outs = []
        for i in range(self.num_stages):
            x = getattr(self, f"layer{i + 1}")(x)
            if i in self.out_indices:
                outs.append(x)
        return outs
