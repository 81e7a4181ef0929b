"""A detector to call on photographs: `load_detector("runs/x/best.pth")("photo.jpg")`."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.inputs.files import make_sample
from data.inputs.images import read_image
from models import Detector
from models.weights import CheckpointError, open_checkpoint

from ..config import Config, load_config, parse_config
from .detectors import Classes, load_named
from .predict import Predictor

Photo = str | Path | Image.Image | np.ndarray | Tensor


class LoadedDetector:
    """Detects on photographs.

    Attributes: `detector`, the `nn.Module`; `classes`, the names; `cfg`, the configuration.
    """

    def __init__(self, detector: Detector, classes: Classes, cfg: Config, device: torch.device, score_thr: float):
        self.detector, self.classes, self.cfg = detector, classes.names, cfg
        self.predictor = Predictor(detector, cfg, torch.full((len(classes.names),), score_thr), device)

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


def load_detector(checkpoint: str | Path, cfg: str | Path | Config | None = None, device: str | None = None,
                  score_thr: float = 0.3) -> LoadedDetector:
    """A detector from a checkpoint, ready for photographs.

    Args:
        checkpoint: path or URL; one of our runs holds its configuration and the names of its classes.
        cfg: the configuration, or its file, for a checkpoint that holds none.
        device: "cpu" or "cuda"; by default cuda if there is one.
        score_thr: detections with a lower score are left out.
    Raises:
        ConfigError, CheckpointError: bad input.
    """
    if cfg is None:
        cfg = open_checkpoint(checkpoint)[1].meta.get("config")
        if not isinstance(cfg, dict):
            raise CheckpointError(f"checkpoint {checkpoint} holds no configuration: give cfg, a configuration file")
        cfg = parse_config(cfg)
    elif not isinstance(cfg, Config):
        cfg = load_config(cfg)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return LoadedDetector(*load_named(cfg, checkpoint, place), cfg, place, score_thr)


def pixels(photo: Photo) -> Tensor:
    """A photograph as uint8 (3, H, W), RGB."""
    if isinstance(photo, (str, Path)):
        return read_image(Path(photo))
    if isinstance(photo, Image.Image):
        photo = np.array(ImageOps.exif_transpose(photo).convert("RGB"))
    if isinstance(photo, np.ndarray):
        photo = torch.from_numpy(np.ascontiguousarray(photo.transpose(2, 0, 1) if photo.ndim == 3 else photo))
    if photo.dtype != torch.uint8 or photo.ndim != 3 or photo.shape[0] != 3:
        raise ValueError(f"a photograph must be uint8, as an array (H, W, 3) or a tensor (3, H, W), not "
                         f"{photo.dtype} {tuple(photo.shape)}")
    return photo
