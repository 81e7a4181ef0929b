"""Annotations made of detections, to train on: from a detector, or from a file of COCO results."""
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data import DataError
from data.coco.annotations import load_coco_json
from data.coco.problems import Problem, drop_reason, find_problems
from data.errors import counted, listed, shown
from data.inputs.files import batches_of_one_size
from data.inputs.find import Source
from data.output import reason_of, write_text

from ..config import Config
from .detectors import Classes, load_named
from .predict import Predictor, Results, class_thresholds

Exceptions = Sequence[tuple[str, float]]
OPTION = "--score-thr"


@dataclass
class Labels:
    """Annotations in COCO format, with the score of each."""

    images: list[dict]
    annotations: list[dict]
    categories: list[dict]
    dropped: Counter[str]  # detections that training would leave out, by reason

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        content = {"images": self.images, "annotations": self.annotations, "categories": self.categories}
        write_text(path, json.dumps(content))

    def describe(self) -> str:
        """How many boxes there are, of each class, on how many images."""
        boxes = Counter(annotation["category_id"] for annotation in self.annotations)
        names = {category["id"]: category["name"] for category in self.categories}
        found = len({annotation["image_id"] for annotation in self.annotations})
        lines = [f"{counted(len(self.annotations), 'box')} on {found} of {counted(len(self.images), 'image')}"]
        if self.annotations:
            lines.append(listed([f"{names[key]} {number}" for key, number in boxes.most_common()], ", "))
        lines += [f"{counted(number, 'detection')} left out: {reason}" for reason, number in self.dropped.items()]
        return "; ".join(lines)


def label_images(cfg: Config, checkpoint: str, sources: Sequence[Source], device: torch.device, score_thr: float,
                 exceptions: Exceptions = (), part: str | None = None, names: Sequence[str] | None = None,
                 batch_size: int | None = None) -> tuple[Labels, list[str]]:
    """Detect on images with a checkpoint's detector.

    Args:
        sources: the images; the names in the annotations are theirs.
        score_thr, exceptions: see `class_thresholds`.
        part, names: see `load_named`.
        batch_size: see `Predictor`.
    Returns:
        The annotations, and a line for each image that could not be read: it was left out.
    Raises:
        ConfigError, DataError, CheckpointError, UsageError: bad input.
    """
    detector, classes = load_named(cfg, checkpoint, device, part, names)
    predictor = Predictor(detector, cfg, class_thresholds(classes, score_thr, exceptions, OPTION), device, batch_size)
    results, problems = Results(classes), []
    with tqdm(total=len(sources), desc="label", disable=None) as bar:
        samples = predictor.image_samples(sources, range(1, len(sources) + 1), problems)
        for batch in batches_of_one_size(samples, predictor.batch_size):
            for sample, found in zip(batch, predictor(batch)):
                results.add(sample, found, sources[sample.targets[0]["image_id"] - 1].name)
            bar.update(len(batch))
    results.sort()
    return make_labels(results.images, enumerate(results.results), classes.categories, "the detections"), problems


def label_results(file: Path, annotations: Path, score_thr: float, exceptions: Exceptions = ()) -> Labels:
    """Take the detections in a file of COCO results, of any detector.

    Args:
        annotations: a COCO file with the images and categories that the results name.
        score_thr, exceptions: see `class_thresholds`.
    Raises:
        DataError, UsageError: bad input.
    """
    known = load_coco_json(annotations)
    raise_problems(annotations, find_problems(known | {"annotations": []}))
    categories = sorted(known["categories"], key=lambda category: category["id"])
    classes = Classes([str(each["name"]) for each in categories], [each["id"] for each in categories])
    lowest = dict(zip(classes.ids, class_thresholds(classes, score_thr, exceptions, OPTION).tolist()))
    results = read_results(file)
    kept = [(place, each) for place, each in enumerate(results)
            if each["score"] >= lowest.get(key_of(each["category_id"]), 0)]
    return make_labels(list(known["images"]), kept, known["categories"], f"results file {file}")


def key_of(value: object) -> object:
    """A value as a key of a dict; None for a list or an object, which can be none."""
    return value if isinstance(value, (int, str)) else None


def read_results(file: Path) -> list[dict]:
    """The list in a file of COCO results; DataError if an entry lacks a key, or has a score that is no number."""
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        text = f"results file {file} cannot be read ({reason_of(error)}): give a file of COCO results"
        raise DataError(text) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"results file {file} is not valid JSON ({error}): write it again") from None
    keys = ("image_id", "category_id", "bbox", "score")
    if not isinstance(content, list):
        raise DataError(f"results file {file} is not in COCO's format of results: a list of objects with "
                        f"{', '.join(keys)}")
    for position, each in enumerate(content):
        missing = [key for key in keys if key not in each] if isinstance(each, dict) else keys
        if missing:
            raise DataError(f"results file {file}: entry {position} has no {', '.join(missing)}: correct the file")
        score = each["score"]
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise DataError(f"results file {file}: entry {position} has the score {shown(score)}, not a number")
    return content


def make_labels(images: list[dict], results: Iterable[tuple[int, dict]], categories: list[dict], where: str) -> Labels:
    """Annotations of results, numbered from 1, clipped to their images; without those that training would leave out.

    Args:
        results: with their places in the list that they are from.
        where: the results are from, for errors.
    Raises:
        DataError: results of unknown images or categories, or with wrong boxes; names that no file may have.
    """
    annotations = [{"id": place, "image_id": each["image_id"], "category_id": each["category_id"],
                    "bbox": each["bbox"], "iscrowd": 0, "score": each["score"]} for place, each in results]
    found = find_problems({"images": images, "annotations": annotations, "categories": categories})
    raise_problems(where, [each._replace(text=re.sub("^annotation ", "entry ", each.text)) for each in found])
    of_id, kept, dropped = {image["id"]: image for image in images}, [], Counter()
    for annotation in annotations:
        image = of_id[annotation["image_id"]]
        if reason := drop_reason(annotation, image):
            dropped[reason] += 1
            continue
        box = clipped(annotation["bbox"], image)
        kept.append(annotation | {"id": len(kept) + 1, "bbox": box, "area": box[2] * box[3]})
    return Labels(images, kept, categories, dropped)


def clipped(box: Sequence[float], image: dict) -> list[float]:
    """A box (x, y, w, h) within its image; coordinates that lie inside stay as they are."""
    x, y, w, h = box
    left, top = max(x, 0), max(y, 0)
    inside = left == x and top == y and x + w <= image["width"] and y + h <= image["height"]
    return list(box) if inside else [left, top, min(x + w, image["width"]) - left, min(y + h, image["height"]) - top]


def raise_problems(where: object, problems: list[Problem]) -> None:
    """Raise DataError with the first problems, if there are any."""
    if problems:
        raise DataError(f"{where}: {counted(len(problems), 'problem')}: {listed([each.text for each in problems])}; "
                        "correct the file")
