"""COCO figures of a detector on a data set."""
import contextlib
import io
import json
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import CocoDataset, build_dataset, build_loader, read_data_config
from models import ConfigError, Detector, build_detector, without_pretraining
from models.weights import load_weights

from . import distributed
from .settings import EvalConfig

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
CURVE_IOUS = (0.5, 0.75)  # of the precision-recall curves


@torch.no_grad()
def detect(model: Detector, loader: DataLoader, device: torch.device, amp: str = "none") -> list[dict]:
    """Detections on every image of a loader, in original pixels, gathered from all processes.

    Returns:
        COCO results: dicts of image_id, label, bbox (x, y, width, height), score.
    """
    was_training = model.training
    model.eval()
    results = []
    for images, targets in tqdm(loader, "eval", leave=False, disable=None if distributed.rank() == 0 else True):
        images = model.preprocess(images.to(device, non_blocking=True), targets)
        with autocast(device, amp):
            found = model.predict(images, targets)
        for target, detections in zip(targets, found):
            boxes = detections["boxes"].double().cpu()
            boxes[:, 2:] -= boxes[:, :2]
            results += [{"image_id": target["image_id"], "label": label, "bbox": box, "score": score}
                        for box, score, label in zip(boxes.tolist(), detections["scores"].tolist(),
                                                     detections["labels"].tolist())]
    model.train(was_training)
    return distributed.gather(results)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision as the `train.amp` setting says: none, fp16 or bf16."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp != "none")


def coco_figures(results: list[dict], dataset: CocoDataset) -> dict:
    """The twelve COCO figures and AP per class, as fractions; None where the data set has no such object.

    Args:
        results: what `detect` returned.
        dataset: whose annotation file the figures are computed against.
    """
    return read_figures(coco_evaluation(results, dataset), dataset)


def coco_evaluation(results: list[dict], dataset: CocoDataset) -> COCOeval:
    """pycocotools' evaluation of `detect`'s results, with its matches, precisions and figures; its ids are numbers."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO()
        truth.dataset, number = read_truth(dataset)
        truth.createIndex()
        detections = np.array([[number[r["image_id"]], *r["bbox"], r["score"], dataset.category_ids[r["label"]]]
                               for r in results]).reshape(-1, 7)
        found = truth.loadRes(detections) if len(detections) else COCO()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.imgIds = [number[image_id] for image_id in dataset.image_ids]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def read_figures(evaluation: COCOeval, dataset: CocoDataset) -> dict:
    """What `coco_figures` returns, out of an evaluation."""
    figures = {name: known(value) for name, value in zip(FIGURES, evaluation.stats)}
    # precision: IoU threshold, recall, class, area range (first is all), most detections (last is 100)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return figures | {"per_class": {name: mean_precision(precision[:, :, k]) for k, name in enumerate(dataset.classes)}}


def mean_precision(precision: np.ndarray) -> float | None:
    """AP of a part of pycocotools' precisions, whose -1 mean that there is nothing to measure them on."""
    return float(precision[precision > -1].mean()) if (precision > -1).any() else None


def precision_recall(evaluation: COCOeval, dataset: CocoDataset) -> dict:
    """Precision over recall of every class: lists of 101 by class and IoU threshold, None without objects."""
    params = evaluation.params
    rows = {f"{iou:.2f}": int(np.abs(params.iouThrs - iou).argmin()) for iou in CURVE_IOUS}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return {"recall": params.recThrs.round(2).tolist(), "precision": {
        name: {iou: precision[t, :, k].round(4).tolist() if (precision[t, :, k] > -1).any() else None
               for iou, t in rows.items()} for k, name in enumerate(dataset.classes)}}


def save_curves(path: Path, evaluation: COCOeval, dataset: CocoDataset) -> None:
    """Write `precision_recall` as JSON; the first process does."""
    if distributed.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(precision_recall(evaluation, dataset)), encoding="utf-8")


def known(value: float) -> float | None:
    """A figure, or None for pycocotools' -1: nothing to measure it on."""
    return None if value < 0 else float(value)


def read_truth(dataset: CocoDataset) -> tuple[dict, dict]:
    """The annotation file with what pycocotools needs and COCO-like files may leave out, and each image id's number.

    Images and annotations are numbered from 1, in place of their ids: pycocotools counts an object of id 0 as missed
    even where it is found, and its arrays hold neither texts nor very large numbers.
    """
    truth = json.loads(dataset.annotation_file.read_bytes())
    # in the order of the ids, in which pycocotools takes the images, and so decides between equal scores
    ids = sorted((image["id"] for image in truth["images"]), key=lambda image_id: (isinstance(image_id, str), image_id))
    number = {image_id: position for position, image_id in enumerate(ids, start=1)}
    for image in truth["images"]:
        image["id"] = number[image["id"]]
    for position, annotation in enumerate(truth["annotations"], start=1):
        annotation["id"], annotation["image_id"] = position, number[annotation["image_id"]]
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    return truth, number


def load_detector(cfg: dict, checkpoint: str | Path, device: torch.device,
                  part: str | None = None) -> tuple[Detector, CocoDataset]:
    """The configuration's detector with a checkpoint's weights, in evaluation mode, and its data.val.

    Raises:
        ConfigError, DataError, CheckpointError: bad input.
    """
    if cfg.get("data") is None:
        raise ConfigError("data", "missing: what is to be evaluated on?")
    dataset = build_dataset(cfg["data"], "val", training=False)
    class_map = EvalConfig(**cfg.get("eval", {})).class_map
    if class_map is None:
        cfg = with_classes(cfg, dataset)
    elif len(class_map) != dataset.num_classes or cfg["model"]["head"].get("num_classes") is None:
        raise ConfigError("eval.class_map", f"has {len(class_map)} entries: it needs one for each of the data's "
                                            f"{dataset.num_classes} classes, and model.head.num_classes to be said")
    detector = build_detector(without_pretraining(cfg["model"]))
    load_weights(detector, checkpoint, part)
    if class_map is not None:
        detector.bbox_head.select_classes(class_map)
    return detector.to(device).eval(), dataset


def evaluate_checkpoint(cfg: dict, checkpoint: str, device: torch.device, part: str | None = None,
                        curves: Path | None = None) -> dict:
    """The figures on data.val of the configuration's model with a checkpoint's weights; raises as `load_detector`.

    Args:
        curves: a file for the curves of `precision_recall`, as JSON.
    """
    device = distributed.start_processes(device)
    detector, dataset = load_detector(cfg, checkpoint, device, part)
    evaluation = coco_evaluation(detect(detector, eval_loader(cfg, dataset), device), dataset)
    if curves is not None:
        save_curves(curves, evaluation, dataset)
    return read_figures(evaluation, dataset)


def eval_loader(cfg: dict, dataset: CocoDataset) -> DataLoader:
    """The loader that an evaluation goes through, this process's share."""
    data = read_data_config(cfg["data"])
    size = EvalConfig(**cfg.get("eval", {})).batch_size or data.batch_size
    return build_loader(dataset, size, False, data.workers, rank=distributed.rank(), world=distributed.world_size())


def with_classes(cfg: dict, dataset: CocoDataset) -> dict:
    """The configuration with the head's class count taken from the annotations, unless it says one itself."""
    model = cfg["model"]
    given = model["head"].get("num_classes")
    if given not in (None, dataset.num_classes):
        raise ConfigError("model.head.num_classes", f"is {given}, and {dataset.annotation_file} has "
                                                    f"{dataset.num_classes} classes")
    return cfg | {"model": model | {"head": model["head"] | {"num_classes": dataset.num_classes}}}


def format_figures(figures: dict) -> str:
    """The figures in points, as a table for people."""

    def points(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    lines = ["  ".join(f"{name:>5}" for name in FIGURES), "  ".join(f"{points(figures[n]):>5}" for n in FIGURES), ""]
    width = max(map(len, figures["per_class"]))
    return "\n".join(lines + [f"{name:<{width}}  {points(ap):>5}" for name, ap in figures["per_class"].items()])
