"""Networks of other projects that give feature maps: torchvision's detectors, and what a function of the user returns.

A detector without a head is built around them, which can teach by its feature maps.
"""
import hashlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from data.errors import counted, one_line

from ..build import ConfigError, describe, nearest
from ..checkpoints.sources import torchvision_url
from ..weights import log

# The image that measures strides. Maps of stride 128 still have two cells a side. The quotient of the sides is not a
# power of two, so height, width and channels of a map cannot be confused.
PROBE = (256, 384)
# torchvision itself sets the eps of batch norms to 0 when it loads the weights COCO_V1 of these.
WITHOUT_EPS = [f"{kind}_resnet50_fpn" for kind in ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet")]


class FeatureMaps(nn.Module):
    """A network whose forward gives feature maps, as a backbone: its maps are sorted, finest first.

    Of several maps with one stride, the first is used.

    Args:
        model: takes images (N, 3, H, W), whose sides are multiples of 32. It returns a list or dict of maps
            (N, C, H / stride, W / stride), rounded up.
        key: where it stands in a configuration, for messages.

    `out_channels` and `out_strides` have one entry per map; one forward of zeros measures them.
    """

    def __init__(self, model: nn.Module, key: str):
        super().__init__()
        self.model = model.float().eval()
        measured = self._measure(key)
        first: dict[int, int] = {}
        for place, (_, stride) in enumerate(measured):
            first.setdefault(stride, place)
        self.places = [first[stride] for stride in sorted(first)]
        self.out_channels, self.out_strides = (list(values) for values in zip(*(measured[p] for p in self.places)))
        if len(measured) > len(first):
            log.info("%s: of %s, those of another stride than all before them are used: strides %s", key,
                     counted(len(measured), "map"), self.out_strides)

    @torch.no_grad()
    def _measure(self, key: str) -> list[tuple[int, int]]:
        """Channels and stride of each output."""
        size = f"{PROBE[0]} x {PROBE[1]}"
        images = torch.zeros(1, 3, *PROBE, device=next(iter(self.model.parameters()), torch.zeros(0)).device)
        try:
            outs = self.model(images)
        except Exception as error:
            raise ConfigError(key, f"its network cannot run on an image of {size}: {brief(error)}") from error
        if not isinstance(outs, (Mapping, list, tuple)) or not len(outs):
            raise ConfigError(key, f"its network must give a list or dict of feature maps, not {describe(outs)}")
        measured = []
        for name, out in outs.items() if isinstance(outs, Mapping) else enumerate(outs):
            height, width = out.shape[2:] if isinstance(out, Tensor) and out.dim() == 4 else (0, 0)
            stride = PROBE[0] // max(height, 1)
            if (height * stride, width * stride) != PROBE:
                what = list(out.shape) if isinstance(out, Tensor) else describe(out)
                raise ConfigError(key, f"output {one_line(name)} of its network is {what} for an image of {size}, not "
                                       "a map (N, C, H, W) whose stride is a whole number")
            measured.append((out.shape[1], stride))
        return measured

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (N, C, H / stride, W / stride), finest first."""
        outs = self.model(images)
        outs = list(outs.values() if isinstance(outs, Mapping) else outs)
        return [outs[place] for place in self.places]


# --- torchvision's detectors ---


def check_torchvision(name: str, key: str) -> None:
    """Raise ConfigError if torchvision has no detector of this name that has a feature pyramid."""
    known = torchvision.models.list_models(module=torchvision.models.detection)
    with_pyramid = [each for each in known if "fpn" in each]
    if name not in with_pyramid:
        what = "has no feature pyramid" if name in known else "is no detector of torchvision"
        raise ConfigError(key, f'"{one_line(name)}" {what}; {nearest(name, with_pyramid)}')


def torchvision_features(name: str, checkpoint: str | None, key: str) -> tuple[FeatureMaps, dict[str, Any]]:
    """Backbone and pyramid of one of torchvision's detectors, untrained, and their pixel statistics.

    Args:
        checkpoint: what will be loaded into it: some of the published weights need a batch norm without eps.
    """
    check_torchvision(name, key)
    detector = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    scheme, _, rest = (checkpoint or "").partition("://")
    address = torchvision_url(rest, detector=True) if scheme == "torchvision-detector" else checkpoint or ""
    published = torchvision_url(f"{name}/COCO_V1", detector=True)
    if name in WITHOUT_EPS and os.path.basename(address) == os.path.basename(published):
        for module in detector.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
    mean, std = ([round(255 * value, 9) for value in values]
                 for values in (detector.transform.image_mean, detector.transform.image_std))
    return FeatureMaps(detector.backbone, key), {"mean": mean, "std": std, "channel_order": "rgb"}


def torchvision_name(name: str) -> str:
    """The name, in a detector's `backbone`, of a weight in a checkpoint of torchvision.

    Files of earlier versions number the convolutions of the pyramid in another way.
    """
    return re.sub(r"^(fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2", name.removeprefix("backbone."))


# --- what a function of the user returns ---


def check_factory(factory: str, key: str) -> None:
    """Raise ConfigError if there is no module for `module:function`. Nothing is imported."""
    package = factory.partition(":")[0].partition(".")[0]
    search_current_folder()
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        raise ConfigError(key, f'there is no module "{package}", neither in the current folder ({Path.cwd()}) nor '
                               "among the installed packages")


def search_current_folder() -> None:
    """Let modules be found in the current folder, too, after all other places."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def factory_features(factory: str, arguments: Mapping[str, Any], key: str) -> FeatureMaps:
    """What `module:function` returns for these arguments. This runs the code of that module.

    Raises:
        ConfigError: the module or function is not there or fails, or what it returns gives no feature maps.
    """
    check_factory(factory, key)
    module_name, _, name = factory.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(key, f'module "{module_name}" cannot be imported: {brief(error)}') from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [each for each in vars(module) if callable(getattr(module, each)) and not each.startswith("_")]
        raise ConfigError(key, f'module "{module_name}" has no function "{name}"; {nearest(name, functions)}')
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ConfigError(key.replace("factory", "arguments"), f"do not fit {factory}: {one_line(error)}") from None
    try:
        model = function(**arguments)
    except Exception as error:
        raise ConfigError(key, f"{factory} fails: {brief(error)}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(key, f"{factory} must return a torch.nn.Module, not {describe(model)}")
    return FeatureMaps(model, key)


def factory_code(factory: str) -> str:
    """A hash of the file that holds the function of `module:function`, which has been imported."""
    file = sys.modules[factory.partition(":")[0]].__file__
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:32]


def brief(error: Exception) -> str:
    """An error from code of the user in one line, with the last line of code that is not an installed package's."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):  # it names its place itself
        return one_line(said, 400)
    places = [place for place in traceback.extract_tb(error.__traceback__)
              if Path(place.filename).is_file() and "site-packages" not in place.filename and
              Path(place.filename) != Path(__file__)]
    where = [f" ({place.filename}, line {place.lineno})" for place in places[-1:]]
    return one_line(said + "".join(where), 400)
