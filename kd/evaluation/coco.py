"""COCO figures of detections, computed by pycocotools or faster-coco-eval."""
import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from data import CocoDataset
from data.coco.stream import no_garbage_collection
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


@dataclass
class Evaluation:
    """What pycocotools' evaluation found. Images are numbered in the order of their ids, classes from 0.

    Annotations and detections stand image by image, in the data set's order.
    """

    params: Params
    stats: np.ndarray        # (12,) the figures; -1 for no objects
    precision: np.ndarray    # IoU threshold, recall, class, area range (first is all), most detections (last is 100)
    truth: np.ndarray        # (G, 7) see `CocoDataset.truth`
    truth_images: np.ndarray  # (G,) number of its image
    rows: np.ndarray         # (D, 6) see `ImageResult`
    row_images: np.ndarray   # (D,)
    # for detections of any size; None unless they were asked for
    hits: np.ndarray | None = None      # (IoU thresholds, D) 1: finds an object; 0: none; -1: not counted, see `counts`
    counts: np.ndarray | None = None    # (D,) bool, at IoU 0.5: among the best 100 of its class, and not inside a crowd
    partners: np.ndarray | None = None  # (D,) the annotation that it finds at IoU 0.5, or -1


def coco_evaluation(results: list[ImageResult], dataset: CocoDataset, fast: bool = True, matches: bool = False
                    ) -> Evaluation:
    """Evaluate `detect`'s results.

    The evaluators make many objects for each detection and for each pair of an image and a class, so they get one class
    at a time, and only the images that have it. No figure depends on the other classes and images.

    Args:
        fast: see `coco_api`.
        matches: also return what each detection finds; not with `fast`.
    """
    api = coco_api(fast)
    places = {image_id: place for place, image_id in enumerate(dataset.image_ids)}
    order = ordered_ids(dataset)
    numbers = np.empty(len(order), np.int64)
    numbers[[places[image_id] for image_id in order]] = np.arange(len(order))
    truth, lengths = read_truth(dataset)
    truth_images = np.repeat(numbers, lengths)
    rows = np.concatenate([np.zeros((0, 6)), *(part for _, part in results)])
    shown = np.array([[places[image_id], len(part)] for image_id, part in results], np.int64).reshape(-1, 2)
    row_images = np.repeat(numbers[shown[:, 0]], shown[:, 1])

    whole = COCOeval(iouType="bbox")
    params, counts = whole.params, np.array([len(whole.params.iouThrs), len(whole.params.recThrs), dataset.num_classes,
                                             len(whole.params.areaRng), len(whole.params.maxDets)])
    whole.eval = {"precision": -np.ones(counts), "scores": -np.ones(counts), "recall": -np.ones(counts[[0, 2, 3, 4]])}
    found = Evaluation(params, np.zeros(0), whole.eval["precision"], truth, truth_images, rows, row_images)
    if matches:
        found.hits = np.full((len(params.iouThrs), len(rows)), -1, np.int8)
        found.counts, found.partners = np.zeros(len(rows), bool), np.full(len(rows), -1)
    with contextlib.redirect_stdout(io.StringIO()), no_garbage_collection():  # pycocotools prints its progress
        for label, objects, detections in by_class(truth[:, 5], rows[:, 5], dataset.num_classes):
            if not len(objects) + len(detections):
                continue  # such a class keeps -1
            evaluation = evaluate_class(api, found, objects, detections)
            for name, axis in (("precision", 2), ("scores", 2), ("recall", 1)):
                np.moveaxis(whole.eval[name], axis, 0)[label] = np.moveaxis(evaluation.eval[name], axis, 0)[0]
            if matches:
                note_matches(found, evaluation, objects, detections)
        params.imgIds, params.catIds = np.arange(len(order)), np.arange(dataset.num_classes)
        whole.summarize()
    found.stats = np.asarray(whole.stats[:len(FIGURES)])
    return found


def ordered_ids(dataset: CocoDataset) -> list[int | str]:
    """The ids of the images as an `Evaluation` numbers them, from 0.

    Of detections with equal scores, those of the first image come first, so the numbers follow the order of the ids.
    """
    return sorted(dataset.image_ids, key=lambda image_id: (isinstance(image_id, str), image_id))


def by_class(labels: np.ndarray, others: np.ndarray, classes: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Each label, and its places among the labels and among the others, in ascending order."""
    orders = [np.argsort(each, kind="stable") for each in (labels, others)]
    ends = [np.searchsorted(each[order], np.arange(classes + 1)) for each, order in zip((labels, others), orders)]
    for label in range(classes):
        yield label, *(order[end[label]:end[label + 1]] for order, end in zip(orders, ends))


def evaluate_class(api: tuple[type, type], found: Evaluation, objects: np.ndarray, detections: np.ndarray) -> COCOeval:
    """The evaluation of one class: of the annotations and the detections in these places."""
    coco, coco_eval = api
    truth = listed(found.truth[objects, :4], found.truth_images[objects], area=found.truth[objects, 4],
                   iscrowd=found.truth[objects, 6].astype(int))
    boxes = found.rows[detections, :4]
    own = listed(boxes, found.row_images[detections], area=boxes[:, 2] * boxes[:, 3], score=found.rows[detections, 4],
                 iscrowd=np.zeros(len(detections), int))
    images = np.union1d(found.truth_images[objects], found.row_images[detections]).tolist()
    evaluation = coco_eval(*(coco_index(coco, images, entries) for entries in (truth, own)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def listed(boxes: np.ndarray, images: np.ndarray, **more: np.ndarray) -> list[dict]:
    """Annotations or detections in COCO's format, numbered from 1 on: pycocotools counts an object with id 0 as missed
    even if it is found."""
    keys = ("id", "category_id", "bbox", "image_id", *more)
    columns = (images + 1, *more.values())
    return [dict(zip(keys, (number, 1, box, *values))) for number, (box, *values) in
            enumerate(zip(boxes.tolist(), *(column.tolist() for column in columns)), start=1)]


def coco_index(coco: type, images: list[int], annotations: list[dict]) -> object:
    """Annotations or detections of one class in the form that the evaluators take."""
    index = coco()
    index.dataset = {"images": [{"id": number + 1} for number in images], "annotations": annotations,
                     "categories": [{"id": 1}]}
    index.createIndex()
    return index


def note_matches(found: Evaluation, evaluation: COCOeval, objects: np.ndarray, detections: np.ndarray) -> None:
    """Note what the detections of a class find, from pycocotools' matches of all sizes."""
    at = int(np.abs(evaluation.params.iouThrs - 0.5).argmin())
    for match in evaluation.evalImgs[:len(evaluation.params.imgIds)]:
        if match is not None and match["dtIds"]:
            own = detections[np.array(match["dtIds"]) - 1]
            found.hits[:, own] = np.where(match["dtIgnore"], -1, match["dtMatches"] > 0)
            found.counts[own] = ~match["dtIgnore"][at].astype(bool)
            found.partners[own] = np.append(objects, -1)[match["dtMatches"][at].astype(int) - 1]


def read_figures(evaluation: Evaluation, dataset: CocoDataset) -> dict:
    """The result of `coco_figures`, from an evaluation. pycocotools' -1, for no objects, becomes None."""
    figures = {name: None if value < 0 else float(value) for name, value in zip(FIGURES, evaluation.stats)}
    precision = evaluation.precision[:, :, :, 0, -1]
    return figures | {"per_class": {name: mean_precision(precision[:, :, k]) for k, name in enumerate(dataset.classes)}}


def mean_precision(precision: np.ndarray) -> float | None:
    """AP of a part of pycocotools' precisions; None if all are -1, which stands for a class without objects."""
    return float(precision[precision > -1].mean()) if (precision > -1).any() else None


def precision_recall(evaluation: Evaluation, dataset: CocoDataset) -> dict:
    """Precision over recall of every class: lists of 101 by class and IoU threshold, None without objects."""
    params = evaluation.params
    rows = {f"{iou:.2f}": int(np.abs(params.iouThrs - iou).argmin()) for iou in CURVE_IOUS}
    precision = evaluation.precision[:, :, :, 0, -1]
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


def read_truth(dataset: CocoDataset) -> tuple[np.ndarray, np.ndarray]:
    """All annotations of a data set, see `CocoDataset.truth`, and how many each image has."""
    parts = list(dataset.truth)
    return np.concatenate(parts), np.array(list(map(len, parts)))


def format_figures(figures: dict) -> str:
    """The figures in points, as tables for people; those of classes only if there are several."""
    tables = [text_table(FIGURES, [[points(figures[name]) for name in FIGURES]])]
    if len(figures["per_class"]) > 1:
        tables.append(text_table(["class", "AP"], [[name, points(ap)] for name, ap in figures["per_class"].items()]))
    return "\n\n".join(tables)
