"""COCO figures of a detector on a data set."""
import contextlib
import gc
import io
import json
from collections.abc import Iterator
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

from ..config.sections import EvalConfig, TrainConfig
from ..inference.named import check_class_order
from ..inference.tta import merge_results, views
from ..processes import distributed

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
CURVE_IOUS = (0.5, 0.75)  # of the precision-recall curves

# An image's id and its detections, float64 (n, 6): x, y, width, height in original pixels, score, label.
ImageResult = tuple[int | str, np.ndarray]


def evaluate(model: Detector, loader: DataLoader, device: torch.device, amp: str = "none",
             curves: Path | None = None, shared: bool = True) -> dict:
    """A detector's `coco_figures` on a loader's data set.

    Args:
        curves: a file for the curves of `precision_recall`, as JSON.
        shared: whether each process's loader has a share of the images; otherwise each has all of them.
    """
    return figures_on_first(detect(model, loader, device, amp, shared), loader.dataset, curves)


def figures_on_first(results: list[ImageResult], dataset: CocoDataset, curves: Path | None = None) -> dict:
    """`coco_figures`, which the first process computes and tells the others; it writes the curves, too."""
    figures = None
    if distributed.rank() == 0:
        evaluation = coco_evaluation(results, dataset)
        if curves is not None:
            curves.parent.mkdir(parents=True, exist_ok=True)
            curves.write_text(json.dumps(precision_recall(evaluation, dataset)), encoding="utf-8")
        figures = read_figures(evaluation, dataset)
    return distributed.from_first(figures)


@torch.no_grad()
def detect(model: Detector, loader: DataLoader, device: torch.device, amp: str = "none",
           shared: bool = True) -> list[ImageResult]:
    """Detections on every image of a loader's data set, in its order.

    Args:
        shared: whether the processes have shares of the images, whose detections the first one gets, and the others
            nothing; otherwise each has detections on all of them.
    """
    was_training = model.training
    model.eval()
    places = {image_id: place for place, image_id in enumerate(loader.dataset.image_ids)}
    found = [torch.zeros(0, 7, dtype=torch.float64, device=device)]  # place, x1, y1, x2, y2, score, label
    for images, targets in tqdm(loader, "eval", leave=False, disable=None if distributed.rank() == 0 else True):
        images = model.preprocess(images.to(device, non_blocking=True), targets)
        with autocast(device, amp):
            batch = model.predict(images, targets)
        for target, d in zip(targets, batch):
            place = d["scores"].new_full(d["scores"].shape, places[target["image_id"]], dtype=torch.float64)
            found.append(torch.column_stack([place, d["boxes"], d["scores"], d["labels"]]))
    model.train(was_training)
    rows = distributed.gather_rows(torch.cat(found)) if shared else torch.cat(found)
    if rows is None:
        return []
    rows = rows[rows[:, 0].argsort(stable=True)].cpu()
    rows[:, 3:5] -= rows[:, 1:3]
    counts = rows[:, 0].long().bincount(minlength=len(places)).tolist()
    return [(image_id, part.numpy()) for image_id, part in zip(places, rows[:, 1:].split(counts))]


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision as the `train.amp` setting says: none, fp16 or bf16."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp != "none")


def coco_figures(results: list[ImageResult], dataset: CocoDataset, fast: bool = True) -> dict:
    """The twelve COCO figures and AP per class, as fractions; None where the data set has no such object.

    Args:
        results: what `detect` returned.
        dataset: whose annotation file the figures are computed against.
        fast: see `coco_api`.
    """
    return read_figures(coco_evaluation(results, dataset, fast), dataset)


def coco_evaluation(results: list[ImageResult], dataset: CocoDataset, fast: bool = True) -> COCOeval:
    """The evaluator after its work on `detect`'s results: matches, precisions and figures; its ids are numbers."""
    coco, coco_eval = coco_api(fast)
    # Images are numbered in the order of their ids, in which pycocotools puts detections of equal score: its arrays
    # hold neither texts nor very large numbers.
    ids = sorted(dataset.image_ids, key=lambda image_id: (isinstance(image_id, str), image_id))
    numbers = {image_id: number for number, image_id in enumerate(ids, start=1)}
    with contextlib.redirect_stdout(io.StringIO()), no_garbage_collection():  # pycocotools prints its progress
        truth = coco_index(coco, dataset, numbers, read_truth(dataset, numbers))
        found = coco_index(coco, dataset, numbers, list_detections(results, dataset, numbers))
        evaluation = coco_eval(truth, found, "bbox")
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


def coco_api(fast: bool = True) -> tuple[type, type]:
    """The classes COCO and COCOeval: pycocotools', or if `fast` faster-coco-eval's where it is installed.

    Their figures are equal; the extra `eval` installs the latter.
    """
    if fast:
        with contextlib.suppress(ImportError):
            import faster_coco_eval
            return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster
    return COCO, COCOeval


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Spare the evaluators' millions of small objects, none of them garbage, the collector's repeated visits."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def coco_index(coco: type, dataset: CocoDataset, numbers: dict, annotations: list[dict]) -> object:
    """Annotations or detections as the evaluators take them."""
    index = coco()
    index.dataset = {"images": [{"id": number} for number in numbers.values()], "annotations": annotations,
                     "categories": [{"id": category_id} for category_id in dataset.category_ids]}
    index.createIndex()
    return index


def read_truth(dataset: CocoDataset, numbers: dict) -> list[dict]:
    """The file's annotations of the data set's images, with what COCO-like files may leave out.

    They are numbered from 1, in place of their ids: pycocotools counts an object of id 0 as missed even where it is
    found.
    """
    content = json.loads(dataset.annotation_file.read_bytes())
    return [{"id": number, "image_id": numbers[a["image_id"]], "category_id": a["category_id"], "bbox": a["bbox"],
             "area": a.get("area", a["bbox"][2] * a["bbox"][3]), "iscrowd": a.get("iscrowd", 0)}
            for number, a in enumerate(content["annotations"], start=1) if a["image_id"] in numbers]


def list_detections(results: list[ImageResult], dataset: CocoDataset, numbers: dict) -> list[dict]:
    """Detections in COCO's form."""
    if not results:
        return []
    rows = np.concatenate([part for _, part in results])
    images = np.repeat([numbers[image_id] for image_id, _ in results], [len(part) for _, part in results])
    categories = np.array(dataset.category_ids)[rows[:, 5].astype(int)]
    columns = (images, categories, rows[:, :4], rows[:, 4], rows[:, 2] * rows[:, 3])
    return [{"id": i, "image_id": image, "category_id": category, "bbox": box, "score": score, "area": area,
             "iscrowd": 0} for i, (image, category, box, score, area) in
            enumerate(zip(*(column.tolist() for column in columns)), start=1)]


def known(value: float) -> float | None:
    """A figure, or None for pycocotools' -1: nothing to measure it on."""
    return None if value < 0 else float(value)


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
    if class_map is None:
        check_class_order(checkpoint, part, dataset.classes, "eval.class_map")
    else:
        detector.bbox_head.select_classes(class_map)
    return detector.to(device, memory_format=memory_format(cfg)).eval(), dataset


def evaluate_checkpoint(cfg: dict, checkpoint: str, device: torch.device, part: str | None = None,
                        curves: Path | None = None) -> dict:
    """The figures on data.val of the configuration's model with a checkpoint's weights; raises as `load_detector`.

    Args:
        curves: a file for the curves of `precision_recall`, as JSON.
    """
    device = distributed.start_processes(device)
    detector, dataset = load_detector(cfg, checkpoint, device, part)
    return figures_on_first(detect_views(detector, cfg, dataset, device), dataset, curves)


def detect_views(detector: Detector, cfg: dict, dataset: CocoDataset, device: torch.device) -> list[ImageResult]:
    """`detect` on every view of the data set that `eval.tta` asks for, merged."""
    detectors, scales = views(detector, EvalConfig(**cfg.get("eval", {})).tta, dataset.scale)
    return merge_results([detect(one, eval_loader(cfg, dataset.at_scale(scale)), device)
                          for scale in scales for one in detectors], detector.test)


def memory_format(cfg: dict) -> torch.memory_format:
    """How a configuration's weights lie in memory, see `train.channels_last`; features follow them."""
    return torch.channels_last if TrainConfig(**cfg.get("train", {})).channels_last else torch.contiguous_format


def eval_loader(cfg: dict, dataset: CocoDataset, shared: bool = True) -> DataLoader:
    """The loader that an evaluation goes through: this process's share, or if not `shared` everything."""
    data = read_data_config(cfg["data"])
    size = EvalConfig(**cfg.get("eval", {})).batch_size or data.batch_size
    rank, world = (distributed.rank(), distributed.world_size()) if shared else (0, 1)
    return build_loader(dataset, size, False, data.workers, rank=rank, world=world)


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
