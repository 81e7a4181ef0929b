"""Data sets of two classes, A and B, and evaluations of detections that are written by hand."""
import json

import numpy as np

from data import CocoDataset
from kd.evaluation.coco import coco_evaluation

A, B = 0, 1  # classes


def make_dataset(folder, objects, images=1):
    """`objects`: (image, class, box) or (image, class, box, iscrowd), in classes A and B."""
    folder.mkdir(exist_ok=True)
    annotations = [{"id": n, "image_id": im, "category_id": 10 * (c + 1), "bbox": list(box), "iscrowd": int(any(crowd)),
                    "area": box[2] * box[3]} for n, (im, c, box, *crowd) in enumerate(objects)]
    (folder / "a.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 200, "height": 200} for i in range(images)],
        "annotations": annotations, "categories": [{"id": 10, "name": "A"}, {"id": 20, "name": "B"}]}))
    return CocoDataset(folder, folder / "a.json", training=False)


def evaluated(dataset, detections):
    """`detections`: (image, class, box, score)."""
    rows = {image_id: [] for image_id in dataset.image_ids}
    for image_id, label, box, score in detections:
        rows[image_id].append([*map(float, box), score, label])
    return coco_evaluation([(image_id, np.array(own).reshape(-1, 6)) for image_id, own in rows.items()], dataset,
                           fast=False, matches=True)
