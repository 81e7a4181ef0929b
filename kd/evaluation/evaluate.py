"""The figures of a detector on a data set."""
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import CocoDataset, build_loader
from data.inputs.files import make_sample
from data.loader import leave_terminal, start_method
from data.output import write_text
from losses import widest_float
from models import Detector

from ..config import Config
from ..deploy.exported import ExportedDetector, open_with_data
from ..inference.detectors import load_with_data
from ..inference.precision import autocast
from ..inference.tta import Views, merge_results, views
from ..processes import distributed
from ..processes.signals import StopAsked, StopSignals
from .coco import ImageResult, coco_evaluation, precision_recall, read_figures


def evaluate(model: Detector, loader: DataLoader, device: torch.device, amp: str = "none",
             curves: Path | None = None, shared: bool = True, signals: StopSignals | None = None) -> dict:
    """A detector's `coco_figures` on a loader's data set.

    Args:
        curves: a file for the curves of `precision_recall`, as JSON.
        shared: whether each process's loader has a share of the images; otherwise each has all of them.
        signals: one to any process raises StopAsked in all of them.
    """
    results = detect(model, loader, device, amp, shared, signals)
    return figures_on_first(results, loader.dataset, curves, signals)


def figures_on_first(results: list[ImageResult], dataset: CocoDataset, curves: Path | None = None,
                     signals: StopSignals | None = None) -> dict:
    """`coco_figures` in all processes; the first process computes them, and writes the curves.

    Args:
        signals: see `evaluate`; here those to the first process count.
    """
    figures, asked = None, 0
    if distributed.rank() == 0:
        try:
            with signals.at_once() if signals else nullcontext():
                evaluation = coco_evaluation(results, dataset)
                if curves is not None:
                    write_text(curves, json.dumps(precision_recall(evaluation, dataset)))
                figures = read_figures(evaluation, dataset)
        except StopAsked as stop:
            asked, = stop.args
    figures, asked = distributed.from_first((figures, asked))
    if asked:
        raise StopAsked(asked)
    return figures


@torch.no_grad()
def detect(model: Detector | ExportedDetector, loader: DataLoader, device: torch.device, amp: str = "none",
           shared: bool = True, signals: StopSignals | None = None) -> list[ImageResult]:
    """Detections on every image of a loader's data set, in its order.

    Args:
        shared: whether each process has a share of the images; the first process then gets all detections, the others
            none. Otherwise each process has all images and detections.
        signals: see `evaluate`.
    """
    was_training = model.training
    model.eval()
    places = {image_id: place for place, image_id in enumerate(loader.dataset.image_ids)}
    exact = widest_float(device)
    found = [torch.zeros(0, 7, dtype=exact, device=device)]  # place, x1, y1, x2, y2, score, label
    for images, targets in tqdm(loader, "eval", leave=False, disable=None if distributed.rank() == 0 else True):
        images = model.preprocess(images.to(device, non_blocking=device.type == "cuda"), targets)
        with autocast(device, amp):
            batch = model.predict(images, targets)
        for target, d in zip(targets, batch):
            place = d["scores"].new_full(d["scores"].shape, places[target["image_id"]], dtype=exact)
            found.append(torch.column_stack([place, d["boxes"], d["scores"], d["labels"]]))
        if signals:
            signals.raise_agreed()
    for _ in range(loader.batch_sampler.most - len(loader) if signals else 0):
        signals.raise_agreed()  # all processes have to call it equally often
    model.train(was_training)
    return by_image(found, places, shared)


def by_image(found: list[torch.Tensor], places: dict, shared: bool) -> list[ImageResult]:
    """Rows of place, x1, y1, x2, y2, score and label, from all processes if `shared`, as a result for each image.

    Args:
        places: the place of each image id, in order.
    """
    rows = distributed.gather_rows(torch.cat(found)) if shared else torch.cat(found)
    if rows is None:
        return []
    rows = rows[rows[:, 0].argsort(stable=True)].cpu().double()
    rows[:, 3:5] -= rows[:, 1:3]
    counts = rows[:, 0].long().bincount(minlength=len(places)).tolist()
    return [(image_id, part.numpy()) for image_id, part in zip(places, rows[:, 1:].split(counts))]


def evaluate_checkpoint(cfg: Config, checkpoint: str, device: torch.device, part: str | None = None,
                        curves: Path | None = None) -> dict:
    """The figures on data.val of the configuration's model with a checkpoint's weights; raises as `load_with_data`.

    Args:
        curves: a file for the curves of `precision_recall`, as JSON.
    """
    device = distributed.start_processes(device)
    detector, dataset = load_with_data(cfg, checkpoint, device, part)
    return figures_on_first(detect_views(detector, cfg, dataset, device), dataset, curves)


def evaluate_exported(cfg: Config, path: Path, device: torch.device, curves: Path | None = None,
                      openvino: bool = False) -> dict:
    """The figures on data.val of an exported file, which runs on `device`; raises as `open_with_data`.

    Args:
        openvino: see `open_exported`.
    """
    on = distributed.start_processes(torch.device("cpu"))
    detector, dataset = open_with_data(cfg, path, device.type, openvino)
    return figures_on_first(detect_views(detector, cfg, dataset, on), dataset, curves)


def detect_views(detector: Detector | ExportedDetector, cfg: Config, dataset: CocoDataset,
                 device: torch.device) -> list[ImageResult]:
    """`detect` on every view of the data set that `eval.tta` asks for, merged."""
    if cfg.eval.tta.tiles is not None:
        return detect_tiles(detector, cfg, dataset, device)
    detectors, scales = views(detector, cfg.eval.tta, dataset.scale)
    return merge_results([detect(one, eval_loader(cfg, dataset.at_scale(scale)), device)
                          for scale in scales for one in detectors], detector.test)


def detect_tiles(detector: Detector, cfg: Config, dataset: CocoDataset, device: torch.device) -> list[ImageResult]:
    """Detections on every view of the data set that `eval.tta` asks for, image by image; each image is read once.

    Each process has a share of the images; the first process gets all detections, the others none.
    """
    detect_all = Views(detector, cfg.eval.tta, dataset.scale, dataset.antialias, device,
                       cfg.eval.batch_size or cfg.data.batch_size, dataset.within)
    places = {image_id: place for place, image_id in enumerate(dataset.image_ids)}
    rank, exact = distributed.rank(), widest_float(device)
    found = [torch.zeros(0, 7, dtype=exact, device=device)]  # place, x1, y1, x2, y2, score, label
    own = range(rank, len(dataset), distributed.world_size())
    loader = original_loader(cfg, dataset, own)
    for index, image in tqdm(loader, "eval", leave=False, disable=None if rank == 0 else True):
        one, = detect_all([make_sample(image, dataset.image_ids[index], detect_all.scales, dataset.antialias,
                                       dataset.within)])
        place = one["scores"].new_full(one["scores"].shape, index, dtype=exact)
        found.append(torch.column_stack([place, one["boxes"], one["scores"], one["labels"]]).to(device))
    return by_image(found, places, True)


def original_loader(cfg: Config, dataset: CocoDataset, indices: Sequence[int]) -> DataLoader:
    """Yields the index and the image, as in its file, of each of the images."""
    workers = cfg.data.workers
    return DataLoader(Originals(dataset, indices), batch_size=None, num_workers=workers, collate_fn=as_it_is,
                      worker_init_fn=leave_terminal,
                      multiprocessing_context=start_method(cfg.data.worker_start) if workers else None)


class Originals(Dataset):
    """For each of the indices, itself and the image uint8 (3, h, w) of a data set; raises as the data set does."""

    def __init__(self, dataset: CocoDataset, indices: Sequence[int]):
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, torch.Tensor]:
        index = self.indices[position]
        return index, self.dataset.original(index)


def as_it_is(item: tuple[int, torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Replaces the loader's own conversion, which turns numbers into tensors."""
    return item


def eval_loader(cfg: Config, dataset: CocoDataset, shared: bool = True) -> DataLoader:
    """The loader of an evaluation: this process's share of the images, or all of them if not `shared`."""
    rank, world = (distributed.rank(), distributed.world_size()) if shared else (0, 1)
    size = cfg.eval.batch_size or cfg.data.batch_size
    return build_loader(dataset, size, False, cfg.data.workers, rank=rank, world=world,
                        worker_start=cfg.data.worker_start)


