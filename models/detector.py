"""A dense detector: backbone, neck, head."""
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from .backbones.resnet import ResNet
from .backbones.timm import TimmBackbone
from .backbones.torchvision import TorchvisionBackbone
from .build import ConfigError, OneOf, build, parameters, read_section
from .fpn import FPN
from .heads import HEADS, DenseHead, HeadOutputs
from .postprocess import TestConfig, postprocess
from .preprocess import Preprocess
from .targets import Assignment, count_labelled
from .weights import log

BACKBONES = {"ResNet": ResNet, "ResNeXt": ResNet,  # a ResNeXt is a ResNet with groups
             "TorchvisionBackbone": TorchvisionBackbone, "TimmBackbone": TimmBackbone}
NECKS = {"FPN": FPN}
Precision = Literal["fp32", "fp16", "bf16"]


@dataclass
class ModelConfig:
    """The `model` section. `backbone`, `neck` and `head` stay mappings until they are built."""

    backbone: Annotated[dict, OneOf(BACKBONES)]
    head: Annotated[dict, OneOf(HEADS, "num_classes", "in_channels")]
    neck: Annotated[dict, OneOf(NECKS, "in_channels")] | None = None
    preprocess: Preprocess = field(default_factory=dict)  # a mapping until it is built, too
    test: TestConfig = field(default_factory=TestConfig)

    def with_num_classes(self, count: int) -> "ModelConfig":
        """The section with the head's class count filled in, unless it has one."""
        given = self.head.get("num_classes")
        return replace(self, head=self.head | {"num_classes": count if given is None else given})


@dataclass
class DetectorPass:
    """The results of one run over a batch, which the detector's own losses and all distillation methods share.

    The batch may end with unlabelled images, whose targets have `unlabelled: True`.
    """

    detector: "Detector"
    images: Tensor                # (N, 3, H, W), normalised for this detector
    targets: list[dict]
    # Neck outputs (N, C, H_l, W_l), finest first; None for a level that no method needs, if answers are stored.
    features: list[Tensor | None]
    outputs: HeadOutputs | None   # None if no method needs this detector's head, or if it has none
    assignment: Assignment | None  # what every anchor learns; None if targets are not assigned
    modules: dict[str, Tensor] = field(default_factory=dict)  # outputs of the requested modules, by name

    @property
    def head(self) -> DenseHead:
        return self.detector.bbox_head

    @property
    def labelled(self) -> "DetectorPass":
        """The same pass for the labelled images alone; ValueError: see `count_labelled`."""
        count = count_labelled(self.targets)
        if count == len(self.targets):
            return self
        modules = {name: x[:count] if torch.is_tensor(x) and x.dim() else x for name, x in self.modules.items()}
        return replace(self, images=self.images[:count], targets=self.targets[:count], modules=modules,
                       features=[None if x is None else x[:count] for x in self.features],
                       outputs=None if self.outputs is None else self.outputs.of_labelled(count),
                       assignment=None if self.assignment is None else self.assignment.of_labelled(count))

    @property
    def positives(self) -> Tensor:
        """The number of anchors per labelled image that learn a box, a scalar."""
        return self.labelled.assignment.positive.sum(1).mean()

    def run_head(self, layer: int, cls_feats: Sequence[Tensor], reg_feats: Sequence[Tensor]) -> HeadOutputs:
        """Predictions of this detector's head from other features, see `DenseHead.run_from`.

        Gradients may flow back through it. This detector's own fp16 would lose small gradients, because only training
        in fp16 scales the loss; it is not used here, and the precision of the surrounding code holds.
        """
        with nullcontext() if self.detector.precision == "fp16" else self.detector.autocast():
            return self.head.run_from(layer, cls_feats, reg_feats)


class Detector(nn.Module):
    """Backbone, optional neck, dense head and pixel statistics.

    `forward` gives losses in training and detections in evaluation; `loss` and `predict` do the same by name. A teacher
    may have no head (`bbox_head` is None): it gives feature maps only, by `run` and `extract_features`.
    """

    precision: Precision | None = None  # of its convolutions; None: that of the surrounding code
    sharded: bool = False               # whether its weights are spread over processes; they stay where they are

    def __init__(self, backbone: nn.Module, neck: nn.Module | None, head: DenseHead | None,
                 preprocess: Preprocess, test: TestConfig):
        super().__init__()
        self.preprocess, self.backbone, self.neck, self.bbox_head, self.test = preprocess, backbone, neck, head, test

    @property
    def feature_channels(self) -> list[int]:
        """Channels of each of `extract_features`' maps."""
        return (self.backbone if self.neck is None else self.neck).out_channels

    @property
    def strides(self) -> list[int]:
        """Pixels per cell of each of `extract_features`' maps."""
        strides = self.backbone.out_strides
        return strides if self.neck is None else self.neck.out_strides(strides)

    def autocast(self) -> AbstractContextManager:
        """A context in which this detector's own precision holds."""
        if self.precision is None:
            return nullcontext()
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.precision, torch.bfloat16)
        device = next(self.parameters()).device.type
        return torch.autocast(device, dtype, enabled=self.precision != "fp32")

    def extract_features(self, images: Tensor) -> list[Tensor]:
        """Maps (N, C, H_l, W_l) that the head works on, finest first."""
        features = self.backbone(images)
        return features if self.neck is None else self.neck(features)

    def run(self, images: Tensor, targets: list[dict], cuts: Sequence[int] = (), modules: Sequence[str] = (),
            with_head: bool = True, assign: bool = False) -> DetectorPass:
        """Run over a batch.

        Args:
            cuts: tower layers whose features are kept, see `DenseHead.run_from`.
            modules: names of submodules whose outputs are kept.
            with_head: run the head too, if there is one.
            assign: assign the targets to the anchors too, which losses need.
        """
        with self.autocast(), self._watch(modules) as seen:
            features = self.extract_features(images)
            outputs = self.bbox_head(features, cuts) if with_head and self.bbox_head is not None else None
        assignment = self.bbox_head.assign(outputs, targets) if assign else None
        return DetectorPass(self, images, targets, features, outputs, assignment, seen)

    def compile(self, *args: object, **kwargs: object) -> None:
        """Compile backbone, neck and head with `torch.compile`; the code after them is not compiled.

        Outputs of submodules can then no longer be kept, because compiled code does not see new hooks.
        """
        for part in (self.backbone, self.neck, self.bbox_head):
            if part is not None:
                part.compile(*args, **kwargs)

    @contextmanager
    def _watch(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Collect the outputs of submodules, by name, while the context is open."""
        seen, hooks = {}, []
        for name in names:
            def keep(module, args, output, name=name):
                seen[name] = output
                return output.clone() if torch.is_tensor(output) else None  # later layers change the original in place
            hooks.append(self.get_submodule(name).register_forward_hook(keep))
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        """Training losses, scalars; those with "loss" in their name are to be summed.

        Args:
            images: (N, 3, H, W), normalised by `preprocess`, zero-padded to a multiple of 32.
            targets: a dict per image, see docs/python.md. Images that are marked as unlabelled have no effect.
        """
        return self.loss_and_pass(images, targets)[0]

    def loss_and_pass(self, images: Tensor, targets: list[dict]) -> tuple[dict[str, Tensor], DetectorPass]:
        """`loss`, and the pass that it was computed from."""
        run = self.run(images, targets, assign=True)
        return self.losses(run), run

    def losses(self, run: DetectorPass) -> dict[str, Tensor]:
        """The losses of a pass with an assignment: those of its labelled images."""
        run = run.labelled
        return self.bbox_head.losses(run.outputs, run.assignment)

    def predict(self, images: Tensor, targets: list[dict], rescale: bool = True, with_nms: bool = True) -> list[dict]:
        """Detections of every image: dicts of boxes (n, 4) xyxy in original pixels, scores (n,) and labels (n,).

        Args:
            targets: a dict per image with `image_size` and, to rescale, `original_size`.
            rescale, with_nms: see `postprocess`.
        """
        run = self.run(images, targets)
        return postprocess(self.bbox_head, run.outputs, targets, self.test, rescale, with_nms)

    def forward(self, images: Tensor, targets: list[dict], with_pass: bool = False
                ) -> dict[str, Tensor] | list[dict] | tuple[dict[str, Tensor], DetectorPass]:
        """In training `loss`, or `loss_and_pass` if `with_pass`; otherwise `predict`."""
        if not self.training:
            return self.predict(images, targets)
        return self.loss_and_pass(images, targets) if with_pass else self.loss(images, targets)


def build_detector(cfg: ModelConfig | Mapping, pretrained: bool = True) -> Detector:
    """Build a detector from the `model` section; channels that follow from another part are filled in.

    Args:
        cfg: the section, or a mapping with its keys.
        pretrained: load `backbone.weights`; False for a detector whose weights are loaded next.
    Raises:
        ConfigError: an unknown key, a wrong type, or parts that do not fit together.
    """
    cfg = read_section(ModelConfig, cfg, "model")
    without = () if pretrained else ("weights",)
    backbone = build({k: v for k, v in cfg.backbone.items() if k not in without}, BACKBONES, "model.backbone")
    channels, strides, neck = backbone.out_channels, backbone.out_strides, None
    if cfg.neck is not None:
        neck = build(cfg.neck, NECKS, "model.neck", in_channels=channels)
        if neck.in_channels != channels:
            raise ConfigError("model.neck.in_channels", f"is {neck.in_channels} and the backbone gives {channels}")
        channels, strides = neck.out_channels, neck.out_strides(strides)
    if len(set(channels)) != 1:
        raise ConfigError("model.head", f"one head needs features of one width; without a neck they have {channels}")
    head = build(cfg.head, HEADS, "model.head", in_channels=channels[0])
    if head.in_channels != channels[0]:
        raise ConfigError("model.head.in_channels", f"is {head.in_channels} and the features have {channels[0]}")
    if head.prior_generator.strides != strides:
        where = "strides" if "strides" in parameters(type(head)) else "anchor_generator.strides"
        raise ConfigError(f"model.head.{where}", f"are {head.prior_generator.strides}, and the features' are {strides}"
                                                 f", made from the backbone's {backbone.out_strides}")
    own = {name: value for name, value in head.test_defaults.items() if getattr(cfg.test, name) is None}
    return Detector(backbone, neck, head, build_preprocess(cfg, backbone), replace(cfg.test, **own))


def build_preprocess(cfg: ModelConfig, backbone: nn.Module) -> Preprocess:
    """Pixel statistics: what the configuration gives, and for the rest those of the backbone, if it has its own.

    A backbone has its own as an attribute `preprocess`, a dict of arguments of `Preprocess`.
    """
    own = getattr(backbone, "preprocess", {})
    for name, value in own.items():
        given = cfg.preprocess.get(name, value)
        if cfg.backbone.get("weights") and list(given) != list(value):
            log.warning("model.preprocess.%s is %s, but the weights of the backbone were trained with %s", name,
                        list(given), list(value))
    return Preprocess(**own | cfg.preprocess)
