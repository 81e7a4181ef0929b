"""COCO figures of detections, computed by pycocotools or faster-coco-eval."""
import contextlib
import gc
import io
import json
from collections.abc import Iterator

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data import CocoDataset
from data.tables import points, text_table

AP_FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
FIGURES = (*AP_FIGURES, "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
CURVE_IOUS = (0.5, 0.75)  # of the precision-recall curves

# An image's id and its detections, float64 (n, 6): x, y, width, height in original pixels, score, label.
ImageResult = tuple[int | str, np.ndarray]


def coco_figures(results: list[ImageResult], dataset: CocoDataset, fast: bool = True) -> dict:
    """The twelve COCO figures and AP per class, as fractions; None if the data set has no such object.

    Args:
        results: what `detect` returned.
        dataset: its annotation file is the ground truth.
        fast: see `coco_api`.
    """
    return read_figures(coco_evaluation(results, dataset, fast), dataset)


def coco_evaluation(results: list[ImageResult], dataset: CocoDataset, fast: bool = True) -> COCOeval:
    """Evaluate `detect`'s results; the evaluator holds matches, precisions and figures, with numbers as image ids."""
    coco, coco_eval = coco_api(fast)
    numbers = number_images(dataset)
    with contextlib.redirect_stdout(io.StringIO()), no_garbage_collection():  # pycocotools prints its progress
        truth = coco_index(coco, dataset, numbers, read_truth(dataset, numbers))
        found = coco_index(coco, dataset, numbers, list_detections(results, dataset, numbers))
        evaluation = coco_eval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def number_images(dataset: CocoDataset) -> dict[int | str, int]:
    """A number for each image id: pycocotools' arrays hold neither texts nor very large numbers.

    Of detections with equal scores, those of the first image come first, so the numbers follow the order of the ids.
    """
    ids = sorted(dataset.image_ids, key=lambda image_id: (isinstance(image_id, str), image_id))
    return {image_id: number for number, image_id in enumerate(ids, start=1)}


def read_figures(evaluation: COCOeval, dataset: CocoDataset) -> dict:
    """The result of `coco_figures`, from an evaluation. pycocotools' -1, for no objects, becomes None."""
    figures = {name: None if value < 0 else float(value) for name, value in zip(FIGURES, evaluation.stats)}
    # precision: IoU threshold, recall, class, area range (first is all), most detections (last is 100)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return figures | {"per_class": {name: mean_precision(precision[:, :, k]) for k, name in enumerate(dataset.classes)}}


def mean_precision(precision: np.ndarray) -> float | None:
    """AP of a part of pycocotools' precisions; None if all are -1, which stands for a class without objects."""
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
    """The classes COCO and COCOeval of pycocotools or, if `fast` and if it is installed, of faster-coco-eval.

    Their figures are equal; the extra `eval` installs the latter.
    """
    if fast:
        with contextlib.suppress(ImportError):
            import faster_coco_eval
            return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster
    return COCO, COCOeval


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pause garbage collection, which would search the evaluators' millions of small objects again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def coco_index(coco: type, dataset: CocoDataset, numbers: dict, annotations: list[dict]) -> object:
    """Annotations or detections in the form that the evaluators take.

    Category ids are the labels, from 1 on: the evaluators sort them, and the file's ids may be in another order.
    """
    index = coco()
    index.dataset = {"images": [{"id": number} for number in numbers.values()], "annotations": annotations,
                     "categories": [{"id": label + 1} for label in range(dataset.num_classes)]}
    index.createIndex()
    return index


def read_truth(dataset: CocoDataset, numbers: dict) -> list[dict]:
    """The annotations of the data set's images, completed with the fields that COCO-like files may leave out.

    Their ids are new, from 1 on, because pycocotools counts an object with id 0 as missed even if it is found.
    """
    content = json.loads(dataset.annotation_file.read_bytes())
    label_of = {category_id: label for label, category_id in enumerate(dataset.category_ids)}
    return [{"id": number, "image_id": numbers[a["image_id"]], "category_id": label_of[a["category_id"]] + 1,
             "bbox": a["bbox"], "area": a.get("area", a["bbox"][2] * a["bbox"][3]), "iscrowd": a.get("iscrowd", 0)}
            for number, a in enumerate(content["annotations"], start=1) if a["image_id"] in numbers]


def list_detections(results: list[ImageResult], dataset: CocoDataset, numbers: dict) -> list[dict]:
    """Detections in COCO's result format."""
    if not results:
        return []
    rows = np.concatenate([part for _, part in results])
    images = np.repeat([numbers[image_id] for image_id, _ in results], [len(part) for _, part in results])
    categories = rows[:, 5].astype(int) + 1
    columns = (images, categories, rows[:, :4], rows[:, 4], rows[:, 2] * rows[:, 3])
    return [{"id": i, "image_id": image, "category_id": category, "bbox": box, "score": score, "area": area,
             "iscrowd": 0} for i, (image, category, box, score, area) in
            enumerate(zip(*(column.tolist() for column in columns)), start=1)]


def format_figures(figures: dict) -> str:
    """The figures in points, as tables for people; those of classes only if there are several."""
    tables = [text_table(FIGURES, [[points(figures[name]) for name in FIGURES]])]
    if len(figures["per_class"]) > 1:
        tables.append(text_table(["class", "AP"], [[name, points(ap)] for name, ap in figures["per_class"].items()]))
    return "\n\n".join(tables)
