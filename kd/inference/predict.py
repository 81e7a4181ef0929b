"""Detections on images and videos: as pictures, and as COCO results."""
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import DataError, collate
from data.images import write_picture
from data.inputs.files import ImageFiles, Sample, batches_of_one_size, make_sample
from data.inputs.find import Source
from data.inputs.video import Video, VideoWriter, load_av
from data.output import write_text, writing
from models import Detector
from models.build import nearest

from ..config import Config
from ..exceptions import UsageError
from .detectors import Classes
from .draw import draw_boxes
from .tta import merge, views

PIXELS_PER_THICKNESS = 900  # of the longer edge, so that lines are visible when a screen shrinks the picture
ROUNDING = 1e-5  # a chosen score is that of a box, whose last digits depend on the batch and on the machine
IMAGES_PER_WORKER = 8  # fewer are read faster than a worker process starts


class Predictor:
    """Detects on batches of samples as evaluation does, on every view that `eval.tta` asks for.

    Args:
        detector: in evaluation mode, on `device`.
        cfg: gives `data.scale`, `data.antialias` and `eval.tta`.
        thresholds: (classes,), lowest score of each class.
        batch_size: images per step; by default data.batch_size. The detections do not depend on it.
        within: the largest height and width of a resized image, where an exported file has a fixed size.
    """

    def __init__(self, detector: Detector, cfg: Config, thresholds: Tensor, device: torch.device,
                 batch_size: int | None = None, within: tuple[int | None, int | None] = (None, None)):
        data, self.within = cfg.input, within
        self.detector, self.thresholds, self.device = detector, thresholds, device
        self.detectors, self.scales = views(detector, cfg.eval.tta, data.scale)
        self.antialias, self.batch_size, self.workers = data.antialias, batch_size or data.batch_size, data.workers

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[dict]:
        """Detections of each sample, on the CPU: boxes (n, 4) xyxy in original pixels, scores (n,), labels (n,)."""
        found = []
        for view in range(len(self.scales)):
            images, targets = collate([(sample.views[view], sample.targets[view]) for sample in samples])
            for detector in self.detectors:
                batch = detector.preprocess(images.to(self.device), targets)
                found.append(detector.predict(batch, targets))
        merged = [{key: value.cpu() for key, value in merge(per_sample, self.detector.test).items()}
                  for per_sample in zip(*found)]
        kept = [one["scores"] >= self.thresholds[one["labels"]] for one in merged]
        return [{key: value[keep] for key, value in one.items()} for one, keep in zip(merged, kept)]

    def image_samples(self, sources: Sequence[Source], image_ids: Sequence[int], problems: list[str]
                      ) -> Iterator[Sample]:
        """The images in files, read by worker processes; problems are printed, and added to `problems`."""
        dataset = ImageFiles([source.path for source in sources], image_ids, self.scales, self.antialias,
                             self.within)
        workers = min(self.workers, len(sources) // IMAGES_PER_WORKER)
        for sample in DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=as_it_is):
            if isinstance(sample, Sample):
                yield sample
            else:
                leave_out(sample, problems)


def leave_out(problem: str, problems: list[str]) -> None:
    """Print a problem with a file at once, and add it to `problems`."""
    problems.append(problem)
    tqdm.write(f"left out: {problem}", file=sys.stderr)


def as_it_is(sample: Sample | str) -> Sample | str:
    """Replaces the loader's own conversion, which turns tuples into lists."""
    return sample


class Results:
    """Detections in COCO format. `add` extends `images` and `results`, and `sort` and `write` sort them by image id."""

    def __init__(self, classes: Classes):
        self.classes, self.images, self.results = classes, [], []

    def add(self, sample: Sample, found: dict, file_name: str, **more: int) -> None:
        h, w = sample.targets[0]["original_size"]
        image_id = sample.targets[0]["image_id"]
        self.images.append({"id": image_id, "file_name": file_name, "width": w, "height": h, **more})
        boxes = found["boxes"].double()
        boxes[:, 2:] -= boxes[:, :2]
        self.results += [{"image_id": image_id, "category_id": self.classes.ids[label], "bbox": box, "score": score}
                         for box, score, label in zip(boxes.tolist(), found["scores"].tolist(),
                                                      found["labels"].tolist())]

    def sort(self) -> None:
        self.images.sort(key=lambda image: image["id"])
        self.results.sort(key=lambda result: result["image_id"])  # stable: the best of each image stay first

    def write(self, folder: Path) -> None:
        """Write `predictions.json`, a list of results, and `images.json`, the images and categories of its ids."""
        self.sort()
        listed = {"images": self.images, "annotations": [], "categories": self.classes.categories}
        for name, content in (("predictions.json", self.results), ("images.json", listed)):
            write_text(folder / name, json.dumps(content))


def predict_files(predictor: Predictor, classes: Classes, sources: Sequence[Source], out: Path) -> tuple[Results, list]:
    """Detect on images and videos, and write pictures, videos and results into a folder.

    Images are numbered from 1 in the given order, also those that cannot be read; the frames of videos follow.
    Returns:
        The results, and a line for each file that could not be read: it was left out.
    Raises:
        DataError: PyAV is missing for a video, or a picture would overwrite an input. Nothing is written then.
    """
    images = [source for source in sources if not source.is_video]
    videos = [source for source in sources if source.is_video]
    pictures = {source: out / picture_name(source.name) for source in sources}
    inputs = {os.path.realpath(source.path) for source in sources}
    for path in pictures.values():
        if os.path.realpath(path) in inputs:
            raise DataError(f"{path} is an input and would be overwritten: give another --out")
    if videos:
        load_av()
    results, problems = Results(classes), []
    with tqdm(total=len(images) or None, desc="predict", disable=None) as bar:
        samples = predictor.image_samples(images, range(1, len(images) + 1), problems)
        for batch in batches_of_one_size(samples, predictor.batch_size):
            for sample, found in zip(batch, predictor(batch)):
                source = images[sample.targets[0]["image_id"] - 1]
                results.add(sample, found, source.name)
                write_picture(pictures[source], draw(sample, found, classes))
            bar.update(len(batch))
    image_ids = count(len(images) + 1)
    for source in videos:
        try:
            predict_video(predictor, classes, source, pictures[source], image_ids, results)
        except DataError as error:
            leave_out(str(error), problems)
    results.write(out)
    return results, problems


def predict_video(predictor: Predictor, classes: Classes, source: Source, path: Path, image_ids: Iterator[int],
                  results: Results) -> None:
    """Detect on every frame of a video and write it with boxes; images of the results also say their `frame`, from 0.

    Raises:
        DataError: it cannot be read to its end; the results and frames before that are kept.
    """
    video, damage = Video(source.path), None
    with writing(path) as partial, ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=video.num_frames, desc=source.name, disable=None))
        writer = stack.enter_context(VideoWriter(partial, video.rate))
        frames = count()
        samples = (make_sample(frame, next(image_ids), predictor.scales, predictor.antialias, predictor.within)
                   for frame in video)
        try:
            for batch in batches_of_one_size(samples, predictor.batch_size):  # of one video, so they stay in order
                for sample, found in zip(batch, predictor(batch)):
                    results.add(sample, found, source.name, frame=next(frames))
                    writer.write(draw(sample, found, classes))
                    bar.update()
        except DataError as error:
            damage = error
    if damage is not None:
        raise damage


def draw(sample: Sample, found: dict, classes: Classes) -> Tensor:
    """The original picture with the boxes that were found."""
    thickness = max(1, max(sample.image.shape[1:]) // PIXELS_PER_THICKNESS)
    return draw_boxes(sample.image, found["boxes"], found["labels"], classes.names, found["scores"], score_thr=0.0,
                      thickness=thickness)


def picture_name(name: str) -> str:
    """A file's name below the output folder: its own, with .png or .mp4 appended if it has another format."""
    path = Path(name)
    if Source(path, name).is_video:
        return name if path.suffix.lower() == ".mp4" else f"{name}.mp4"
    return name if path.suffix.lower() in (".jpg", ".jpeg", ".png") else f"{name}.png"


def class_thresholds(classes: Classes, score_thr: float, per_class: Sequence[tuple[str, float]] = (),
                     option: str = "--class-thr", chosen: Sequence[float | None] | None = None) -> Tensor:
    """The lowest score of each class, from one for all classes and exceptions, each a class and its score.

    Args:
        option: where the exceptions are from, for the error.
        chosen: a score for each class in place of `score_thr`, see `load_thresholds`; None leaves out all detections
            of the class.
    Raises:
        UsageError: an exception names a class that does not exist.
    """
    thresholds = torch.full((len(classes.names),), score_thr)
    if chosen is not None:
        thresholds = torch.tensor([float("inf") if score is None else score - ROUNDING for score in chosen])
    for name, score in per_class:
        if name not in classes.names:
            raise UsageError(f'{option} {name}={score}: there is no class "{name}"; {nearest(name, classes.names)}')
        thresholds[classes.names.index(name)] = score
    return thresholds


def left_out_classes(classes: Classes, thresholds: Tensor) -> list[str]:
    """The names of the classes whose detections are all left out."""
    return [name for name, score in zip(classes.names, thresholds.tolist()) if score > 1]
