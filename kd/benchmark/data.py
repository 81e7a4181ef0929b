"""The parts of the benchmark besides the models: reading images, and computing AP."""
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from data import CocoDataset, build_loader, collate, generate_scenes
from data.augment import build_augmentations
from data.images import read_image, write_picture
from data.output import write_text
from data.transforms import flip_image, resize_image, resized_size

from ..evaluation.coco import coco_api, coco_figures
from ..processes.timing import Call, interleave, medians_ms

IMAGE_SIZE = (480, 640)  # of most COCO images


def time_input(scale: tuple[int, int], batch: int, rounds: int, images: int, augment: str | list[dict] = "none"
               ) -> dict:
    """Milliseconds per image for the work of a loader worker on generated JPEG files, resized to `scale`.

    `decode`, `resize`, `flip` and `collate` are each timed alone, on one thread as in a worker. `one worker` is the
    training loader with one worker process, which flips every other image and augments as `augment` says (see
    data.train_augment), from its start to the last batch.
    """
    threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        root = generate_scenes(Path(folder), images, 1, IMAGE_SIZE)
        files = sorted((root / "train").glob("*.jpg"))
        for file in files:
            write_picture(file, read_image(file), quality=99)  # about as large as photographs
        dataset = CocoDataset(root / "train", root / "annotations" / "train.json", training=True, scale=scale,
                              augment=build_augmentations(augment))
        loader = build_loader(dataset, batch, training=True, workers=1)
        decoded = [read_image(file) for file in files]
        resized = [resize_image(image, resized_size(IMAGE_SIZE, scale)) for image in decoded]
        groups = [[(image, {}) for image in resized[i:i + batch]] for i in range(0, images, batch)]
        torch.set_num_threads(1)
        try:
            seconds = interleave({
                "decode": over(files, read_image),
                "resize": over(decoded, lambda image: resize_image(image, resized_size(IMAGE_SIZE, scale))),
                "flip": over(resized, flip_image),
                "collate": over(groups, collate),
                "one worker": over(loader, lambda batch: None)}, rounds)
        finally:
            torch.set_num_threads(threads)
        kilobytes = sum(file.stat().st_size for file in files) / images / 1e3
    ms = {name: value / images for name, value in medians_ms(seconds).items()}
    every = {name: [1e3 * value / images for value in values] for name, values in seconds.items()}
    return {"ms": ms, "rounds_ms": every, "images_per_second": 1e3 / ms["one worker"], "scale": list(scale),
            "images": images, "kilobytes": kilobytes}


def over(items: Iterable, work: Callable[[Any], Any]) -> Call:
    """A call that works on each item, and frees its result before the next one, as a worker does."""
    def run() -> None:
        for item in items:
            work(item)
    return run


def time_evaluation(images: int, rounds: int = 1) -> dict:
    """Milliseconds for COCO figures of 100 generated detections per image, by pycocotools and as in evaluation."""
    with TemporaryDirectory() as folder:
        dataset, results = generate_results(Path(folder), images)
        seconds = interleave({
            "pycocotools": lambda: coco_figures(results, dataset, fast=False),
            coco_api()[0].__module__.partition(".")[0]: lambda: coco_figures(results, dataset)}, rounds, warmup=0)
    return {"ms": medians_ms(seconds), "images": images,
            "rounds_ms": {name: [1e3 * value for value in values] for name, values in seconds.items()}}


def generate_results(folder: Path, images: int, boxes: int = 7, detections: int = 100, classes: int = 80
                     ) -> tuple[CocoDataset, list]:
    """A data set without image files, three classes per image, and detections on it, most of them near a box."""
    rng = np.random.default_rng(0)
    height, width = IMAGE_SIZE
    annotations, results = [], []
    for number in range(images):
        present = rng.permutation(classes)[:8]
        sides = np.exp(rng.uniform(np.log(8), np.log(height / 2), (boxes, 2)))
        truth = np.column_stack([rng.uniform(0, 1, (boxes, 2)) * ([width, height] - sides), sides])
        labels = present[rng.integers(0, 3, boxes)]
        annotations += [{"id": len(annotations) + i + 1, "image_id": number + 1, "category_id": int(label) + 1,
                         "bbox": box.tolist(), "area": box[2] * box[3], "iscrowd": 0}
                        for i, (box, label) in enumerate(zip(truth, labels))]
        nearest = rng.integers(0, boxes, detections)
        wrong = rng.random(detections) < 0.3
        found = truth[nearest] * rng.normal(1, 0.1, (detections, 4))
        found_labels = np.where(wrong, present[rng.integers(0, 8, detections)], labels[nearest])
        results.append((number + 1, np.column_stack([found, rng.random(detections) ** 2, found_labels])))
    file = folder / "annotations.json"
    write_text(file, json.dumps({
        "images": [{"id": i + 1, "file_name": f"{i}.jpg", "width": width, "height": height} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": k + 1, "name": f"class {k}"} for k in range(classes)]}))
    return CocoDataset(folder, file, training=False), results
