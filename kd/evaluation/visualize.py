"""Pictures of what is distilled: who detects what, where scores are high, and where FGD looks."""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import write_png

from data import CocoDataset, build_dataset, collate
from data.transforms import padded_size, read_image, resize_image, resized_size
from models import ConfigError, DenseHead, DetectorPass, HeadOutputs
from models.postprocess import TestConfig, postprocess
from models.weights import CheckpointError, load_weights

from ..build import build_distiller
from ..distiller import Distiller, union
from ..inference.draw import WIDTH, captioned, draw_boxes, mosaic
from ..methods.base.method import Method
from ..methods.crosskd import CrossKD
from ..methods.fgd import FGD, attention, box_masks
from ..work_dir.checkpoint import read_checkpoint
from .evaluate import with_classes
from .heatmaps import bars, overlay

SMALL = 320  # width of a picture where there is one per level
BARS = 90    # height of a bar chart


@dataclass
class View:
    """Predictions on one image, by the teacher, the student, or across their heads."""

    title: str
    head: DenseHead
    outputs: HeadOutputs
    test: TestConfig

    def detections(self, target: dict) -> dict:
        return postprocess(self.head, self.outputs, [target], self.test, rescale=False)[0]

    def score_maps(self) -> list[Tensor]:
        """(H, W) of every level: the best score of a cell's anchors and classes, as detection ranks them."""
        scores = self.outputs.cls[0].sigmoid().amax(-1)
        if self.outputs.centerness is not None:
            scores = scores * self.outputs.centerness[0].sigmoid()
        anchors = len(scores) // sum(h * w for h, w in self.outputs.sizes)
        levels = scores.split([h * w * anchors for h, w in self.outputs.sizes])
        return [level.view(h, w, anchors).amax(-1).cpu() for level, (h, w) in zip(levels, self.outputs.sizes)]


@torch.no_grad()
def visualize(cfg: dict, checkpoint: str, out: Path, device: torch.device, images: Sequence[Path] = (), count: int = 4,
              part: str | None = None, score_thr: float = 0.3) -> tuple[list[Path], list[str]]:
    """Write the pictures of each image as PNG: detections, score maps and, where FGD is among the methods, attention.

    Args:
        cfg: a configuration with a `distill` section.
        checkpoint: the student's; one of a run of this configuration has its methods' own weights, too.
        images: files; by default the first `count` of data.val. Those of data.val have their ground truth.
        score_thr: detections below are not drawn.
    Returns:
        The files, and what had to be left out, a line each.
    Raises:
        ConfigError, DataError, CheckpointError: bad input.
    """
    if not cfg.get("distill") or not cfg.get("data"):
        raise ConfigError("distill" if cfg.get("data") else "data", "missing: give a configuration that distils, with "
                          "its data; predict.py draws what a lone detector finds")
    dataset = build_dataset(cfg["data"], "val", training=False)
    model = build_distiller(with_classes(cfg, dataset)).to(device).eval()
    load_weights(model.student, checkpoint, part)
    trained = load_methods(model, checkpoint)
    samples = [find_sample(path, dataset) for path in images] or [
        (Path(dataset.file_names[i]).stem, *dataset[i]) for i in range(min(count, len(dataset)))]
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, image, target in samples:
        student, teachers = run_all(model, image, target, device)
        views = views_of(model, student, teachers, trained)
        pictures = {"detections": detections_picture(image, target, views, dataset.classes, score_thr),
                    "scores": scores_picture(image, target, views, dataset.classes)}
        for i, (teacher, methods) in enumerate(zip(teachers, model.methods)):
            for method, option in zip(methods, model.options[i]):
                if isinstance(method, FGD):
                    lone = sum(isinstance(m, FGD) for m in all_methods(model)) == 1
                    key = "attention" if lone else f"attention_{option.name.replace('/', '_')}"
                    pictures[key] = attention_picture(image, target, method, student, teacher, trained)
        for kind, picture in pictures.items():
            files.append(out / f"{name}_{kind}.png")
            write_png(picture, str(files[-1]))
    if not trained and any(isinstance(m, CrossKD) and needs_weights(m.adapters) for m in all_methods(model)):
        return files, [f"no cross-head predictions: {checkpoint} does not hold the trained convolutions that bring the "
                       "student's towers to the teacher's width; a checkpoint of the distilling run does"]
    return files, []


def all_methods(model: Distiller) -> list[Method]:
    return [method for of_teacher in model.methods for method in of_teacher]


def load_methods(model: Distiller, checkpoint: str) -> bool:
    """Load the methods' own weights from a checkpoint of a run; whether it has them."""
    try:
        model.methods.load_state_dict(read_checkpoint(Path(checkpoint))["methods"])
    except (CheckpointError, RuntimeError, KeyError):  # another format, or a run with other methods
        return False
    return True


def needs_weights(module: torch.nn.Module) -> bool:
    return any(True for _ in module.parameters())


def find_sample(path: Path, dataset: CocoDataset) -> tuple[str, Tensor, dict]:
    """Name, image and target of a file: as data.val has it, or without ground truth."""
    places = {(dataset.image_folder / name).resolve(): i for i, name in enumerate(dataset.file_names)}
    if path.resolve() in places:
        return path.stem, *dataset[places[path.resolve()]]
    image = read_image(path)
    original = tuple(image.shape[1:])
    size = resized_size(original, dataset.scale)
    return path.stem, resize_image(image, size, dataset.antialias), {
        "image_size": size, "pad_size": padded_size(size), "original_size": original}


def run_all(model: Distiller, image: Tensor, target: dict, device: torch.device) -> tuple[DetectorPass,
                                                                                         list[DetectorPass]]:
    """The student's pass over one image, and each teacher's with its head."""
    batch, targets = collate([(image, target)])
    batch, methods = model.student.preprocess(batch.to(device), targets), all_methods(model)
    student = model.student.run(batch, targets, union(methods, "student_cuts"), union(methods, "student_modules"))
    teachers = [teacher.run(teacher.preprocess.convert(batch, targets, model.student.preprocess), targets,
                            union(own, "teacher_cuts"), union(own, "teacher_modules"))
                for teacher, own in zip(model.teachers, model.methods)]
    return student, teachers


def views_of(model: Distiller, student: DetectorPass, teachers: list[DetectorPass], trained: bool) -> list[View]:
    """Teachers, student, and what each CrossKD makes of the two."""
    names = ["teacher"] if len(teachers) == 1 else [f"teacher {i}" for i in range(len(teachers))]
    views = [View(name, seen.head, seen.outputs, seen.detector.test) for name, seen in zip(names, teachers)]
    views.append(View("student", student.head, student.outputs, student.detector.test))
    for name, seen, methods in zip(names, teachers, model.methods):
        for method in methods:
            if isinstance(method, CrossKD) and (trained or not needs_weights(method.adapters)):
                views.append(View(f"student's features, {name}'s head", seen.head, method.cross_head(student, seen),
                                  seen.detector.test))
    return views


def detections_picture(image: Tensor, target: dict, views: list[View], classes: Sequence[str],
                       score_thr: float) -> Tensor:
    """Ground truth, where it is known, and each view's detections, side by side."""
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
    """A row for each view: the image, with its ground truth where that is known, and the scores of every level."""
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


def attention_picture(image: Tensor, target: dict, method: FGD, student: DetectorPass, teacher: DetectorPass,
                      trained: bool) -> Tensor:
    """FGD's spatial attention of both, its foreground weights and its channel attention, a column for each map.

    The student's map is taken as the loss sees it, in the teacher's width, where that convolution's weights are known.
    """
    padded = target["pad_size"]
    columns = []
    for loss, (own, other), (place, _) in zip(method.losses, method.pairs.maps(student, teacher),
                                             method.pairs.places()):
        if loss.align is not None and trained:
            own = loss.align(own)
        (spatial_t, channel_t), (spatial_s, channel_s) = (attention(x.float(), loss.temp) for x in (other, own))
        stride = (padded[0] / own.shape[2], padded[1] / own.shape[3])
        column = []
        for who, spatial in (("teacher", spatial_t), ("student", spatial_s)):
            top = float(spatial.max())
            column.append(captioned(overlay(image, spatial[0].cpu(), stride, top, SMALL),
                                    f"{who}, {place}: attention up to {top:.1f}"))
        if "boxes" in target:
            mask = box_masks([target["boxes"].to(own.device)], [target["image_size"]], spatial_t)[0]
            column.append(captioned(overlay(image, mask[0].cpu(), stride, float(mask.max()), SMALL),
                                    f"foreground weight up to {float(mask.max()):.3f}"))
        for who, channel in (("teacher", channel_t), ("student", channel_s)):
            top = float(channel.max())
            text = f"{who}'s {channel.shape[1]} channels: up to {top:.1f}, line at 1"
            column.append(captioned(bars(channel[0], top, SMALL, BARS, line=1.0), text))
        columns.append(torch.cat(column, dim=1))
    return mosaic([columns])
