"""Pictures of what is distilled: detections, score maps, and the charts of the methods."""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data import CocoDataset, build_dataset, collate
from data.errors import counted
from data.images import read_image, write_picture
from data.inputs.files import make_sample
from models import ConfigError, DenseHead, HeadOutputs
from models.postprocess import TestConfig, postprocess
from models.weights import CheckpointError, load_weights

from ..build import build_distiller
from ..config import Config
from ..distiller import Distiller, Passes
from ..inference.detectors import knowledge, with_classes
from ..inference.draw import WIDTH, captioned, draw_boxes, mosaic
from ..methods.base import BarChart, HeatMap
from ..work_dir.checkpoint import read_checkpoint
from .heatmaps import bars, overlay

SMALL = 320  # width of a picture where there is one per level
BARS = 90    # height of a bar chart


@dataclass
class View:
    """Predictions on one image, of the teacher, the student, or the teacher's head on the student's features."""

    title: str
    head: DenseHead
    outputs: HeadOutputs
    test: TestConfig

    def detections(self, target: dict) -> dict:
        return postprocess(self.head, self.outputs, [target], self.test, rescale=False)[0]

    def score_maps(self) -> list[Tensor]:
        """For every level (H, W), the best score of a cell over anchors and classes, as detection ranks them."""
        centerness = None if self.outputs.centerness is None else self.outputs.centerness[0]
        scores = self.head.candidate_scores(self.outputs.cls[0], centerness).amax(-1)
        scores = self.head.final_scores(scores, centerness)
        anchors = len(scores) // sum(h * w for h, w in self.outputs.sizes)
        levels = scores.split([h * w * anchors for h, w in self.outputs.sizes])
        return [level.view(h, w, anchors).amax(-1).cpu() for level, (h, w) in zip(levels, self.outputs.sizes)]


@torch.no_grad()
def visualize(cfg: Config, checkpoint: str, out: Path, device: torch.device, images: Sequence[Path] = (),
              count: int = 4, part: str | None = None, score_thr: float = 0.3) -> tuple[list[Path], list[str]]:
    """Write the pictures of each image as PNG: detections, score maps and the charts of the methods.

    Args:
        cfg: a configuration with a `distill` section.
        checkpoint: the student's; one from a run of this configuration also has the methods' own weights.
        images: files; by default the first `count` of data.val. Images of data.val have their ground truth.
        score_thr: detections with lower scores are not drawn.
    Returns:
        The files, and a line for everything that had to be left out.
    Raises:
        ConfigError, DataError, CheckpointError: bad input.
    """
    if cfg.distill is None or cfg.data is None:
        raise ConfigError("distill" if cfg.data else "data", "missing: give a configuration that distils, with its "
                          "data; for a detector alone, use predict.py")
    dataset = build_dataset(cfg.data, "val", training=False)
    model = build_distiller(with_classes(cfg, dataset), pretrained=False).to(device).eval()
    load_weights(model.student, checkpoint, part)
    trained = load_methods(model, checkpoint)
    samples = [find_sample(path, dataset) for path in images] or [
        (Path(dataset.file_names[i]).stem, *dataset[i]) for i in range(min(count, len(dataset)))]
    files = []
    for name, image, target in samples:
        passes = run_all(model, image, target, device)
        views = views_of(passes, trained)
        pictures = {"detections": detections_picture(image, target, views, dataset.classes, score_thr),
                    "scores": scores_picture(image, target, views, dataset.classes)}
        pictures |= {kind: charts_picture(image, columns, target["pad_size"])
                     for kind, columns in charts_of(passes, trained).items()}
        for kind, picture in pictures.items():
            files.append(out / f"{name}_{kind}.png")
            write_picture(files[-1], picture)
    notes = notes_on_teachers(model, dataset.classes)
    if not trained and any(m.crosses_heads and has_weights(m) for of_teacher in model.methods for m in of_teacher):
        notes.append(f"no cross-head predictions: {checkpoint} does not hold the trained convolutions that bring the "
                     "student's towers to the teacher's width; a checkpoint of the distilling run does")
    return files, notes


def load_methods(model: Distiller, checkpoint: str) -> bool:
    """Load the methods' own weights from a checkpoint of a run; returns whether it has them."""
    try:
        model.methods.load_state_dict(read_checkpoint(Path(checkpoint))["methods"])
    except (CheckpointError, RuntimeError, KeyError):  # another format, or a run with other methods
        return False
    return True


def has_weights(module: torch.nn.Module) -> bool:
    return any(True for _ in module.parameters())


def find_sample(path: Path, dataset: CocoDataset) -> tuple[str, Tensor, dict]:
    """Name, image and target of a file, with ground truth if the file is in data.val."""
    places = {(dataset.image_folder / name).resolve(): i for i, name in enumerate(dataset.file_names)}
    if path.resolve() in places:
        return path.stem, *dataset[places[path.resolve()]]
    sample = make_sample(read_image(path), 0, [dataset.scale], dataset.antialias)
    return path.stem, sample.views[0], sample.targets[0]


def run_all(model: Distiller, image: Tensor, target: dict, device: torch.device) -> Passes:
    """The passes of student and teachers over one image, for all methods, with all heads."""
    batch, targets = collate([(image, target)])
    batch = model.student.preprocess(batch.to(device), targets)
    return model.passes(batch, targets, model.whole_plan(), with_heads=True, assign=False)


def teacher_names(count: int) -> list[str]:
    return ["teacher"] if count == 1 else [f"teacher {i}" for i in range(count)]


def share_of_classes(head: DenseHead) -> str:
    """What a title says about a teacher that knows only some classes."""
    return "" if head.known is None else f" ({len(head.known.numbers)} of {counted(head.num_classes, 'class')})"


def notes_on_teachers(model: Distiller, classes: Sequence[str]) -> list[str]:
    """Lines for what the pictures do not show because teachers do not give it."""
    lines = []
    for name, teacher in zip(teacher_names(len(model.teachers)), model.teachers):
        if teacher.bbox_head is None:
            lines.append(f"no detections and scores of {name}: it gives feature maps only")
        elif teacher.bbox_head.known is not None:
            lines.append(f"no other detections of {name}{knowledge(teacher, classes)}")
    return lines


def views_of(passes: Passes, trained: bool) -> list[View]:
    """The views of teachers with a head and of the student, and of the teachers' heads on the student's features."""
    names = teacher_names(len(passes.teachers))
    views = [View(name + share_of_classes(seen.head), seen.head, seen.outputs, seen.detector.test)
             for name, seen in zip(names, passes.teachers) if seen.head is not None]
    student = passes.student
    views.append(View("student", student.head, student.outputs, student.detector.test))
    for name, seen, (_, entries) in zip(names, passes.teachers, passes.plan):
        views += [View(f"student's features, {name}'s head", seen.head, entry.method.cross_head(student, seen),
                       seen.detector.test)
                  for entry in entries if entry.method.crosses_heads and (trained or not has_weights(entry.method))]
    return views


def charts_of(passes: Passes, trained: bool) -> dict[str, list]:
    """The charts of all methods, by name; if two charts have the same name, the method's name is appended."""
    found = [(kind, entry.name, columns) for seen, (_, entries) in zip(passes.teachers, passes.plan)
             for entry in entries for kind, columns in entry.method.charts(passes.student, seen, trained).items()]
    kinds = [kind for kind, _, _ in found]
    return {kind if kinds.count(kind) == 1 else f"{kind}_{name.replace('/', '_')}": columns
            for kind, name, columns in found}


def detections_picture(image: Tensor, target: dict, views: list[View], classes: Sequence[str],
                       score_thr: float) -> Tensor:
    """The ground truth, if it is known, and each view's detections, side by side."""
    zoom, row = WIDTH / image.shape[2], []
    if "boxes" in target:
        row.append(captioned(draw_boxes(image, target["boxes"], target["labels"], classes, zoom=zoom), "ground truth"))
    for view in views:
        found = {key: value.cpu() for key, value in view.detections(target).items()}
        shown = int((found["scores"] >= score_thr).sum())
        picture = draw_boxes(image, found["boxes"], found["labels"], classes, found["scores"], score_thr, zoom)
        row.append(captioned(picture, f"{view.title}: {shown} from score {score_thr:g} on"))
    return mosaic([row])


def scores_picture(image: Tensor, target: dict, views: list[View], classes: Sequence[str]) -> Tensor:
    """A row for each view: the image, with its ground truth if that is known, and the scores of every level."""
    maps = [view.score_maps() for view in views]
    top = max(float(level.max()) for each in maps for level in each)
    plain = draw_boxes(image, target.get("boxes", torch.zeros(0, 4)), target.get("labels", torch.zeros(0).long()),
                       classes, zoom=SMALL / image.shape[2])
    rows = []
    for view, levels in zip(views, maps):
        row = [captioned(plain, f"{view.title}; colours: 0 to {top:.2f}")]
        for level, stride in zip(levels, view.head.prior_generator.strides):
            row.append(captioned(overlay(image, level, (stride, stride), top, SMALL),
                                 f"best score, stride {stride}: up to {float(level.max()):.2f}"))
        rows.append(row)
    return mosaic(rows)


def charts_picture(image: Tensor, columns: Sequence[Sequence[HeatMap | BarChart]], padded: tuple[int, int]) -> Tensor:
    """Charts in columns; heat maps lie over the image, whose padded size is (height, width)."""
    pictures = []
    for charts in columns:
        column = []
        for chart in charts:
            top = float(chart.values.max())
            if isinstance(chart, BarChart):
                drawn = bars(chart.values, top, SMALL, BARS, chart.line)
            else:
                stride = (padded[0] / chart.values.shape[0], padded[1] / chart.values.shape[1])
                drawn = overlay(image, chart.values.cpu(), stride, top, SMALL)
            column.append(captioned(drawn, chart.caption))
        pictures.append(torch.cat(column, dim=1))
    return mosaic([pictures])
