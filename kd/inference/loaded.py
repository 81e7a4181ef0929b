"""A detector to call on photographs: `load_detector("runs/x/best.pth")("photo.jpg")`."""
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.images import read_image
from data.inputs.files import make_sample
from models import Detector

from ..config import Config, load_config, parse_config
from ..exceptions import UsageError
from .detectors import Classes, find_config, load_named
from .predict import Predictor, class_thresholds
from .thresholds import load_thresholds

Photo = str | Path | Image.Image | np.ndarray | Tensor


class LoadedDetector:
    """Detects on photographs.

    Attributes: `detector`, the `nn.Module`; `classes`, the names; `cfg`, the configuration.
    """

    def __init__(self, detector: Detector, classes: Classes, cfg: Config, device: torch.device, thresholds: Tensor):
        """`thresholds` (classes,): the lowest score of each class."""
        self.detector, self.classes, self.cfg = detector, classes.names, cfg
        self.predictor = Predictor(detector, cfg, thresholds, device)

    def __call__(self, photos: Photo | Sequence[Photo]) -> dict | list[dict]:
        """Detections on a photograph, or a list of them on a list.

        Args:
            photos: paths, PIL images, arrays (H, W, 3) or tensors (3, H, W), uint8 and RGB.
        Returns:
            A dict for each: boxes (n, 4) xyxy in the photograph's pixels, scores (n,), labels (n,) and names (n), best
            first.
        Raises:
            UnreadableImage, ValueError: a file that is no image, or an array of another kind.
        """
        several = isinstance(photos, (list, tuple))
        samples = [make_sample(pixels(photo), number, self.predictor.scales, self.predictor.antialias)
                   for number, photo in enumerate(photos if several else [photos])]
        # One at a time: what is detected then does not depend on the sizes of the others.
        found = [self.predictor([sample])[0] for sample in samples]
        found = [one | {"names": [self.classes[label] for label in one["labels"].tolist()]} for one in found]
        return found if several else found[0]


def load_detector(checkpoint: str | Path, cfg: str | Path | Mapping | None = None, device: str | None = None,
                  score_thr: float = 0.3, thresholds: str | Path | None = None) -> LoadedDetector:
    """A detector from a checkpoint, ready for photographs.

    Args:
        checkpoint: path, URL or `zoo:NAME`; one of our runs holds its configuration and the names of its classes.
        cfg: the configuration, its tree, or its file, for a checkpoint that holds none.
        device: "cpu", "cuda" or "mps"; by default cuda if there is one, otherwise cpu.
        score_thr: detections with a lower score are left out.
        thresholds: a file from analyze.py with a lowest score for each class, in place of `score_thr`.
    Raises:
        ConfigError, CheckpointError, DataError, UsageError, ValueError: bad input.
    """
    if not 0 <= score_thr <= 1:
        raise ValueError(f"score_thr must be from 0 to 1, not {score_thr}")
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:  # what PyTorch raises for other names, and without a driver
        raise UsageError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if cfg is None:
        cfg = find_config(checkpoint)
    elif not isinstance(cfg, Config):
        cfg = parse_config(cfg) if isinstance(cfg, Mapping) else load_config(cfg)
    detector, classes = load_named(cfg, checkpoint, place)
    chosen = None if thresholds is None else load_thresholds(thresholds, classes.names)
    return LoadedDetector(detector, classes, cfg, place, class_thresholds(classes, score_thr, chosen=chosen))


def pixels(photo: Photo) -> Tensor:
    """A photograph as uint8 (3, H, W), RGB."""
    if isinstance(photo, (str, Path)):
        return read_image(Path(photo))
    if isinstance(photo, Image.Image):
        photo = np.array(ImageOps.exif_transpose(photo).convert("RGB"))
    if isinstance(photo, np.ndarray):
        photo = torch.from_numpy(np.ascontiguousarray(photo.transpose(2, 0, 1) if photo.ndim == 3 else photo))
    if not isinstance(photo, Tensor):
        raise ValueError("a photograph must be a path, a PIL image, an array or a tensor, not "
                         f"{type(photo).__name__}")
    if photo.dtype != torch.uint8 or photo.ndim != 3 or photo.shape[0] != 3 or not photo.numel():
        raise ValueError(f"a photograph must be uint8, as an array (H, W, 3) or a tensor (3, H, W), not "
                         f"{photo.dtype} {tuple(photo.shape)}")
    return photo
