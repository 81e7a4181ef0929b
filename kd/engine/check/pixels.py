"""Whether a detector's pixel statistics and channel order are those that it was trained with.

A detector whose colours arrive in the wrong order, or on another scale, still detects something: the mistake costs
points of AP and gives no error. So other settings are tried: the best of them on a few images are compared with the
present one on others, image by image.
"""
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from data import CocoDataset
from models import Detector
from models.checkpoints.zoo import published_config
from models.preprocess import Preprocess
from models.weights import open_checkpoint

from ...config import load_config
from .quality import Quality, compared

IMAGES = 50   # images that are looked at
FEW = 10      # of them, the first ones choose the settings that are compared on the rest
FINALISTS = 2
LEAST = 10    # images with objects without which nothing can be said
SURE = 3.0    # a setting is clearly better if its gain is more than so many standard errors,
GAIN = 0.05   # and more than this share of what the present one reaches
# Mean and std of the usual settings in the order red, green, blue.
USUAL = {"ImageNet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
         "caffe": ((123.675, 116.28, 103.53), (1.0, 1.0, 1.0)), "0..1": ((0.0,) * 3, (255.0,) * 3),
         "0..255": ((0.0,) * 3, (1.0,) * 3), "-1..1": ((127.5,) * 3, (127.5,) * 3)}


@dataclass
class Trial:
    """The result of trying other settings."""

    tried: int = 0
    images: int = 0               # images of the last comparison
    better: dict | None = None    # the setting that is clearly better, as a `preprocess` section
    gain: float = 0.0             # by which its APs of single images are better, and the standard error of this
    error: float = 0.0
    untested: str = ""            # why nothing could be tried


def section(preprocess: Preprocess) -> dict:
    """The `preprocess` section of a configuration that gives these statistics."""
    mean, std = preprocess.statistics
    return {"mean": mean, "std": std, "channel_order": preprocess.channel_order}


def said(setting: Mapping) -> str:
    """A `preprocess` section on one line, as YAML."""
    numbers = {key: "[" + ", ".join(f"{value:g}" for value in setting[key]) + "]" for key in ("mean", "std")}
    return f"{{mean: {numbers['mean']}, std: {numbers['std']}, channel_order: {setting['channel_order']}}}"


def others(now: Mapping) -> list[dict]:
    """The settings to be tried in place of `now`: the usual ones in both channel orders, and its own in the other order
    with and without reversed statistics."""
    turned = {"rgb": "bgr", "bgr": "rgb"}[now["channel_order"]]
    found = [{"mean": now["mean"][::-1], "std": now["std"][::-1], "channel_order": turned},
             now | {"channel_order": turned}]
    found += [{"mean": list(mean[::step]), "std": list(std[::step]), "channel_order": order}
              for mean, std in USUAL.values() for order, step in (("rgb", 1), ("bgr", -1))]
    return [setting for i, setting in enumerate(found) if setting != now and setting not in found[:i]]


@contextmanager
def seen_with(detector: Detector, setting: Mapping) -> Iterator[None]:
    """The detector takes its images with other statistics while the context is open."""
    before = detector.preprocess
    detector.preprocess = Preprocess(**setting).to(before.mean.device)
    try:
        yield
    finally:
        detector.preprocess = before


def try_others(detector: Detector, now: Quality, first_images: Callable[[int], CocoDataset],
               measure: Callable[[CocoDataset], Quality]) -> Trial:
    """Compare a detector's present pixel statistics with the other settings.

    The settings that reach more than the present one on the first `FEW` images are compared with it on the rest, which
    did not choose them: so the best of many chances does not count as better.

    Args:
        now: the detector's quality as it is, on the first images of data.val, at least `IMAGES` of them if there are.
        first_images: the data set of so many first images.
        measure: the detector's quality on a data set.
    """
    few, all_images = first_images(FEW), first_images(IMAGES)
    rest = set(all_images.image_ids) - set(few.image_ids)
    own = {image: ap for image, ap in now.own.items() if image in rest}
    if len(own) < LEAST:
        return Trial(untested=f"not tried: it needs {FEW + LEAST} images with objects in data.val, and in "
                              "train.check_images")
    choices = others(section(detector.preprocess))
    gains = []
    for setting in choices:
        with seen_with(detector, setting):
            gains.append(compared(measure(few).own, now.own)[0])
    trial = Trial(len(choices), len(own))
    for gain, setting in sorted(zip(gains, choices), key=lambda pair: -pair[0])[:FINALISTS]:
        if gain <= 0:
            break
        with seen_with(detector, setting):
            mean, error, _ = compared(measure(all_images).own, own)
        if mean > max(SURE * error, GAIN * sum(own.values()) / len(own), trial.gain):
            trial.better, trial.gain, trial.error = setting, mean, error
    return trial


def recorded(source: str, part: str | None, detector: Detector) -> dict | None:
    """The pixel statistics that a checkpoint's own configuration has; None if it holds none, or if it is of another
    version."""
    published = published_config(source)
    try:
        if published is not None:
            model = load_config(published)["model"]
        else:
            model = (open_checkpoint(source, part, preferred="student")[1].config or {})["model"]
        own = getattr(detector.backbone, "preprocess", {})
        return section(Preprocess(**own | dict(model.get("preprocess") or {})))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
