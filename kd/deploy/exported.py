"""An exported file in the place of a detector: evaluation and prediction use both in the same way."""
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import CocoDataset, DataConfig, build_dataset
from data.errors import counted
from models import ConfigError
from models.coders import clip_boxes
from models.postprocess import TestConfig, class_nms

from ..config import Config
from ..exceptions import ExportedFileError
from ..inference.detectors import Classes, annotated_classes, match_names, said, with_ids
from .recipe import Recipe
from .runtimes import ExportedFile, first_sentence, open_exported

log = logging.getLogger("densekd")


class ExportedDetector(nn.Module):
    """Takes and gives what a `Detector` does in evaluation; the work is done by an exported file, on the CPU.

    Args:
        class_map: for each class that is wanted, its number in the file; by default all, as they are.
    """

    def __init__(self, file: ExportedFile, class_map: Sequence[int] | None = None):
        super().__init__()
        self.file, self.test, self.training = file, file.about.test, False
        self.device = torch.device("cpu")  # of what it takes and gives
        self.label_of: Tensor | None = None
        if class_map is not None:
            self.label_of = torch.full((len(file.about.classes),), -1)
            self.label_of[list(class_map)] = torch.arange(len(class_map))

    def preprocess(self, images: Tensor, targets: list[dict]) -> Tensor:
        """The uint8 batch as it is: the file normalises it."""
        return images

    def predict(self, images: Tensor, targets: list[dict]) -> list[dict]:
        """Detections of every image of a batch, in original pixels, see `Detector.predict`.

        Raises:
            ExportedFileError: the file cannot run on this batch, or gives what no detector gives.
        """
        sizes = torch.tensor([target["image_size"] for target in targets], dtype=torch.int64)
        boxes, scores, labels = run_padded(self.file, images.cpu(), sizes)
        found = []
        for i, target in enumerate(targets):
            one = finish(boxes[i], scores[i], labels[i], self.test, self.file.about.nms, target["image_size"])
            (h, w), (full_h, full_w) = target["image_size"], target["original_size"]
            one["boxes"] = one["boxes"] * one["boxes"].new_tensor([full_w / w, full_h / h, full_w / w, full_h / h])
            if self.label_of is not None:
                one["labels"] = self.label_of[one["labels"]]
                one = {key: value[one["labels"] >= 0] for key, value in one.items()}
            found.append(one)
        return found


def run_padded(file: ExportedFile, images: Tensor, sizes: Tensor) -> list[Tensor]:
    """Run a file on a uint8 batch (N, 3, H, W), with the padding, and as many images at a time, as it needs.

    Returns:
        boxes (N, K, 4), scores (N, K) and labels (N, K) int64, checked: below the number of classes where scores are
        above 0.
    """
    about, found = file.about, []
    height, width = about.padded(*images.shape[2:])
    if images.shape[2] > height or images.shape[3] > width:
        raise ExportedFileError(f"{file.path} takes images of {width} x {height} pixels, not of {images.shape[3]} x "
                                f"{images.shape[2]}: leave eval.tta.scales out")
    images = F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))
    step = about.batch or len(images)
    for start in range(0, len(images), step):
        part, part_sizes = images[start:start + step].contiguous(), sizes[start:start + step]
        if rest := step - len(part):  # the file takes a fixed number of images
            part, part_sizes = (torch.cat([one, one[-1:].expand(rest, *one.shape[1:])]) for one in (part, part_sizes))
        try:
            found.append([one[:step - rest] for one in file.run(part, part_sizes)])
        except Exception as error:  # runtimes raise errors of all types
            raise ExportedFileError(f"{file.path} fails on {counted(step, 'image')} of {width} x {height} pixels: "
                                    f"{first_sentence(error)}") from None
    boxes, scores, labels = (torch.cat(parts) for parts in zip(*found))
    n, k = len(images), scores.shape[-1]
    real = scores > 0
    if (boxes.shape != (n, k, 4) or scores.shape != (n, k) or labels.shape != (n, k)
            or not boxes[real].isfinite().all() or not scores.isfinite().all()
            or not ((labels[real] >= 0) & (labels[real] < len(about.classes))).all()):
        raise ExportedFileError(f"{file.path} gives no detections of its {counted(len(about.classes), 'class')}: write "
                                "it again with scripts/export.py")
    return [boxes, scores, labels.long()]


def finish(boxes: Tensor, scores: Tensor, labels: Tensor, test: TestConfig, nms: str, size: tuple[int, int]) -> dict:
    """The work on one image's outputs that is left to the caller; `size` is its height and width before padding."""
    real = scores > 0
    boxes, scores, labels = boxes[real], scores[real], labels[real]
    if nms == "outside":
        keep = class_nms(boxes, scores, labels, test.nms_iou_threshold)[:test.max_per_img]
        boxes, scores, labels = clip_boxes(boxes[keep], size), scores[keep], labels[keep]
        if test.clip == "after" and test.min_bbox_size >= 0:
            large = ((boxes[:, 2:] - boxes[:, :2]) > test.min_bbox_size).all(1)
            boxes, scores, labels = boxes[large], scores[large], labels[large]
    return {"boxes": boxes, "scores": scores, "labels": labels}


def open_with_data(cfg: Config, path: Path, device: str = "cpu", openvino: bool = False
                   ) -> tuple[ExportedDetector, CocoDataset]:
    """An exported file as a detector of the classes of data.val, and data.val as the file needs it.

    The file's classes must be those of the data, as those of a checkpoint, see `load_with_data`; sizes of images come
    from the file.
    Raises:
        ConfigError, DataError, ExportedFileError: bad input.
    """
    if cfg.data is None:
        raise ConfigError("data", "missing: give data.val, which is evaluated on")
    file = open_exported(path, device, openvino)
    dataset, about = build_dataset(cfg.data, "val", training=False), file.about
    class_map = file_classes(cfg, path, about, dataset)
    say_differences(cfg, path, about)
    dataset = dataset.at_scale(about.scale, about.within)
    dataset.antialias = about.antialias
    return ExportedDetector(file, class_map), dataset


def open_named(path: Path, cfg: Config | None = None, device: str = "cpu"
               ) -> tuple[ExportedDetector, Classes, Config]:
    """An exported file as a detector of all its classes, and a configuration that prepares images as the file needs it.

    Args:
        cfg: gives what else there is to set, as `eval.tta`; and the category ids, see `load_named`.
    """
    file = open_exported(path, device)
    about = file.about
    if cfg is None:
        cfg = Config(model=None, data=DataConfig(train=None, scale=about.scale, antialias=about.antialias))
    else:
        say_differences(cfg, path, about)
    classes = with_ids(about.classes, annotated_classes(cfg))
    data = replace(cfg.input, scale=about.scale, antialias=about.antialias)
    return ExportedDetector(file), classes, replace(cfg, data=data)


def file_classes(cfg: Config, path: Path, about: Recipe, dataset: CocoDataset) -> list[int] | None:
    """The number in the file of each of the data's classes; None if they are the same. `eval.class_map` says it, too,
    unless export.py has already applied it."""
    class_map = cfg.eval.class_map
    if class_map is None or about.classes == dataset.classes:
        names, found = match_names(about.classes, path, dataset.classes)
        if found is not None:
            log.info(f"{path} has {said(names)}: those of the data are found by their names")
        return found
    if len(class_map) != dataset.num_classes:
        raise ConfigError("eval.class_map", f"has {counted(len(class_map), 'entry', 'entries')}: it needs one for each "
                                            f"of the data's {counted(dataset.num_classes, 'class')}")
    if not all(0 <= k < len(about.classes) for k in class_map) or len(set(class_map)) < len(class_map):
        raise ConfigError("eval.class_map", f"must name different classes among the {len(about.classes)} of {path}, "
                                            f"not {class_map}")
    return class_map


def say_differences(cfg: Config, path: Path, about: Recipe) -> None:
    """Say what the configuration sets in another way than the file, whose way is used."""
    own = {"data.scale": (cfg.input.scale, about.scale), "data.antialias": (cfg.input.antialias, about.antialias)}
    set_here = cfg.get("model", {}).get("test", {})
    own |= {f"model.test.{name}": (set_here[name], getattr(about, name)) for name in
            ("score_thr", "nms_iou_threshold", "max_per_img", "clip", "min_bbox_size") if name in set_here}
    differ = [f"{name} is {theirs} there, not {mine}" for name, (mine, theirs) in own.items()
              if list(mine if isinstance(mine, (list, tuple)) else [mine])
              != list(theirs if isinstance(theirs, (list, tuple)) else [theirs])]
    if differ:
        log.info(f"{path} keeps its own settings: " + ", ".join(differ))
