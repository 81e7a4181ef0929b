"""Detections on images and videos: as pictures, and as results in common formats."""
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import DataError
from data.images import write_picture
from data.inputs.files import ImageFiles, Sample, batches_of_one_size, make_sample, portions
from data.inputs.find import Source
from data.inputs.video import Video, VideoWriter, load_av
from data.loader import leave_terminal, start_method
from data.output import writing
from data.results import WRITERS, ImageDetections, Writer
from models import Detector
from models.build import nearest

from ..config import Config
from ..exceptions import UsageError
from .detectors import Classes
from .draw import draw_boxes
from .tta import Views

PIXELS_PER_THICKNESS = 900  # of the longer edge, so that lines are visible when a screen shrinks the picture
ROUNDING = 1e-5  # a chosen score is that of a box, whose last digits depend on the batch and on the machine
IMAGES_PER_WORKER = 8  # fewer are read faster than a worker process starts
BATCHES = 4  # so many batches of images, at most, are read before the results of the first of them are written
WAITING = 4  # pictures and results that wait to be written, at most


class Predictor:
    """Detects on batches of samples as evaluation does, on every view that `eval.tta` asks for.

    Args:
        detector: in evaluation mode, on `device`.
        cfg: gives `data.scale`, `data.antialias` and `eval.tta`.
        thresholds: (classes,), lowest score of each class.
        batch_size: images, or tiles of an image, per step; by default eval.batch_size or data.batch_size. The
            detections do not depend on it.
        within: the largest height and width of a resized image, where an exported file has a fixed size.
    Attributes: `batch_size`, the number of images to call it with.
    """

    def __init__(self, detector: Detector, cfg: Config, thresholds: Tensor, device: torch.device,
                 batch_size: int | None = None, within: tuple[int | None, int | None] = (None, None)):
        data = cfg.input
        batch_size = batch_size or cfg.eval.batch_size or data.batch_size
        self.thresholds, self.within = thresholds, within
        self.views = Views(detector, cfg.eval.tta, data.scale, data.antialias, device, batch_size, within)
        self.scales, self.antialias, self.workers = self.views.scales, data.antialias, data.workers
        self.batch_size = 1 if self.views.tiles else batch_size
        self.worker_start = data.worker_start

    def __call__(self, samples: Sequence[Sample]) -> list[dict]:
        """Detections of each sample, on the CPU: boxes (n, 4) xyxy in original pixels, scores (n,), labels (n,)."""
        merged = self.views(samples)
        kept = [one["scores"] >= self.thresholds[one["labels"]] for one in merged]
        return [{key: value[keep] for key, value in one.items()} for one, keep in zip(merged, kept)]

    def image_samples(self, sources: Sequence[Source], image_ids: Sequence[int], problems: list[str],
                      originals: bool = True) -> Iterator[Sample]:
        """The images in files, read and resized ahead by worker processes; problems are printed, and added to
        `problems`.

        Args:
            originals: whether the samples need the images as in the files, too, to draw on them.
        """
        dataset = ImageFiles([source.path for source in sources], image_ids, self.scales, self.antialias,
                             originals or self.views.tiles is not None, self.within)
        workers = min(self.workers, len(sources) // IMAGES_PER_WORKER)
        for sample in DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=as_it_is,
                                 worker_init_fn=leave_terminal,
                                 multiprocessing_context=start_method(self.worker_start) if workers else None):
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
    """Detections in COCO format. `add` extends `images` and `results`, and `sort` sorts them by image id."""

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


@dataclass
class Counts:
    """What `predict_files` has done."""

    images: int = 0  # and frames of videos
    detections: int = 0
    problems: list[str] = field(default_factory=list)  # a line for each file that could not be read: it was left out


class Output:
    """Writes results and pictures of images and frames as they come, in their order.

    A thread writes while the detector works. Ctrl-C does not reach it, so it never stops in the middle of a file. Its
    errors are raised by a later call.

    Args:
        pictures: whether to write pictures.
    """

    def __init__(self, writer: Writer, classes: Classes, counts: Counts, pictures: bool):
        self.writer, self.classes, self.counts, self.pictures = writer, classes, counts, pictures
        self.thread, self.waiting = ThreadPoolExecutor(1), deque[Future]()

    def add(self, images: Sequence[ImageDetections]) -> None:
        """Write results."""
        self.counts.images += len(images)
        self.counts.detections += sum(len(image.scores) for image in images)
        self._later(lambda: [self.writer.add(image) for image in images])

    def draw(self, path: Path, sample: Sample, found: dict) -> None:
        """Draw and write a picture."""
        self._later(lambda: write_picture(path, draw(sample, found, self.classes)))

    def _later(self, work: Callable[[], object]) -> None:
        self.waiting.append(self.thread.submit(work))
        self.wait(WAITING)

    def wait(self, most: int = 0) -> None:
        """Wait until at most so many things are left to write."""
        while len(self.waiting) > most:
            self.waiting.popleft().result()

    def close(self) -> None:
        """Write what is left, also after an error."""
        self.thread.shutdown()
        self.writer.close()


def predict_files(predictor: Predictor, classes: Classes, sources: Sequence[Source], out: Path, kind: str = "coco",
                  pictures: bool = True) -> Counts:
    """Detect on images and videos, and write results, pictures and videos into a folder, as they come.

    Images are numbered from 1 in the given order, also those that cannot be read; the frames of videos follow. If the
    program is stopped, what is done stays in the files, which are complete.

    Args:
        kind: a format of `WRITERS`.
        pictures: whether to write pictures and videos with the boxes.
    Raises:
        DataError: PyAV is missing for a video, or a file would be overwritten. Nothing is written then.
    """
    images = [source for source in sources if not source.is_video]
    videos = [source for source in sources if source.is_video]
    paths = {source: out / picture_name(source.name) for source in sources} if pictures else {}
    check_paths(sources, images, out, kind, paths)
    if videos:
        load_av()
    counts = Counts()
    with closing(Output(WRITERS[kind](out, classes.names, classes.ids), classes, counts, pictures)) as output:
        predict_images(predictor, images, paths, output)
        image_ids = count(len(images) + 1)
        for source in videos:
            try:
                predict_video(predictor, source, paths.get(source), image_ids, output)
            except DataError as error:
                leave_out(str(error), counts.problems)
        output.wait()
    return counts


def check_paths(sources: Sequence[Source], images: Sequence[Source], out: Path, kind: str, pictures: dict[Source, Path]
                ) -> None:
    """Raise DataError if an input would be overwritten, or if two images would have the same file."""
    inputs = {os.path.realpath(source.path) for source in sources}
    for path in pictures.values():
        if os.path.realpath(path) in inputs:
            raise DataError(f"{path} is an input and would be overwritten: give another --out")
    names: dict[str, str] = {}
    for source in images:
        name = WRITERS[kind].file_of(source.name)
        if name is not None and names.setdefault(name, source.name) != source.name:
            raise DataError(f"{names[name]} and {source.name} would both have the file {out / name}: give them in "
                            "separate runs, or choose --format coco or csv")


def predict_images(predictor: Predictor, images: Sequence[Source], pictures: dict[Source, Path], output: Output
                   ) -> None:
    """Detect on images. Results are written in the order of the images."""
    problems = output.counts.problems
    with tqdm(total=len(images) or None, desc="predict", disable=None) as bar:
        samples = predictor.image_samples(images, range(1, len(images) + 1), problems, output.pictures)
        for portion in portions(samples, BATCHES * predictor.batch_size):
            done = []  # they come in the order of their sizes
            try:
                for batch in batches_of_one_size(portion, predictor.batch_size):
                    for sample, found in zip(batch, predictor(batch)):
                        source = images[sample.targets[0]["image_id"] - 1]
                        done.append(detections(sample, found, source.name))
                        if output.pictures:
                            output.draw(pictures[source], sample, found)
                    bar.update(len(batch))
            finally:
                output.add(sorted(done, key=lambda image: image.image_id))


def predict_video(predictor: Predictor, source: Source, path: Path | None, image_ids: Iterator[int], output: Output
                  ) -> None:
    """Detect on every frame of a video, and write the video with boxes to `path`, if it is given.

    Raises:
        DataError: it cannot be read to its end; the results and frames before that are kept.
    """
    video, damage = Video(source.path), None
    with ExitStack() as stack:
        write = None
        if path is not None:
            write = stack.enter_context(VideoWriter(stack.enter_context(writing(path)), video.rate)).write
        bar = stack.enter_context(tqdm(total=video.num_frames, desc=source.name, disable=None))
        samples = (make_sample(frame, next(image_ids), predictor.scales, predictor.antialias, predictor.within)
                   for frame in video)
        try:
            predict_frames(predictor, samples, source.name, write, output, bar)
        except DataError as error:
            damage = error
    if damage is not None:
        raise damage


def predict_frames(predictor: Predictor, samples: Iterator[Sample], name: str, write: Callable[[Tensor], None] | None,
                   output: Output, bar: tqdm) -> None:
    """Detect on the frames of a video, which is called `name`; `write` gets each with its boxes."""
    frames = count()
    for batch in batches_of_one_size(samples, predictor.batch_size):  # of one video, so they stay in order
        for sample, found in zip(batch, predictor(batch)):
            output.add([detections(sample, found, name, next(frames))])
            if write:
                write(draw(sample, found, output.classes))
            bar.update()


def detections(sample: Sample, found: dict, name: str, frame: int | None = None) -> ImageDetections:
    """The detections of a sample for a `Writer`."""
    target = sample.targets[0]
    return ImageDetections(name, target["original_size"], target["image_id"], found["boxes"].double().tolist(),
                           found["scores"].tolist(), found["labels"].tolist(), frame)


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
        UsageError: an exception names a class that does not exist, or a class twice.
    """
    thresholds = torch.full((len(classes.names),), score_thr)
    if chosen is not None:
        thresholds = torch.tensor([float("inf") if score is None else score - ROUNDING for score in chosen])
    for name, score in per_class:
        if name not in classes.names:
            raise UsageError(f'{option} {name}={score}: there is no class "{name}"; {nearest(name, classes.names)}')
        if [other for other, _ in per_class].count(name) > 1:
            raise UsageError(f"{option}: {name} has more than one score: give one")
        thresholds[classes.names.index(name)] = score
    return thresholds


def left_out_classes(classes: Classes, thresholds: Tensor) -> list[str]:
    """The names of the classes whose detections are all left out."""
    return [name for name, score in zip(classes.names, thresholds.tolist()) if score > 1]
