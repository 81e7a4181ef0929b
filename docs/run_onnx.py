"""Run a detector that scripts/export.py wrote, with onnxruntime, numpy and Pillow. densekd itself is not needed.

    pip install onnxruntime numpy pillow
    python run_onnx.py student.onnx photo.jpg ... --score-thr 0.3 --out found

The file takes `images`, uint8 (N, 3, H, W), RGB, padded at right and bottom to multiples of 32, and `image_sizes`,
int64 (N, 2), their heights and widths before padding. It gives `boxes` (N, K, 4), x1 y1 x2 y2 in pixels of the resized
image, `scores` (N, K), 0 where there is no detection, and `labels` (N, K). The model normalises the images.
The metadata `densekd`, JSON, says the rest: classes, sizes, thresholds, and the form, `nms`. inside: overlaps are
suppressed; end2end: they are, too, and `num_dets` (N, 1) counts the detections, which come first; outside: they are not
yet. N, H and W vary, unless the metadata say `batch`, `height` or `width`.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps


def read(path):
    """An image, uint8 (h, w, 3), RGB, turned upright."""
    return np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))


def resize(image, about):
    """The image at the largest size that fits the scale; bilinear, smoothed only if the training images were."""
    (h, w), scale = image.shape[:2], about["scale"]
    fixed = [(about.get("height"), h), (about.get("width"), w)]
    factor = min(max(scale) / max(h, w), min(scale) / min(h, w), *(most / edge for most, edge in fixed if most))
    height, width = max(1, int(h * factor + 0.5)), max(1, int(w * factor + 0.5))
    if about["antialias"]:
        return np.asarray(Image.fromarray(image).resize((width, height), Image.BILINEAR))
    for axis, (old, new) in ((1, (w, width)), (0, (h, height))):  # like torchvision: rounded after each axis
        place = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
        low = place.astype(int)
        share = (place - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1)).astype(np.float32)
        mixed = image.take(low, axis) * (1 - share) + image.take(np.minimum(low + 1, old - 1), axis) * share
        image = (mixed + 0.5).astype(np.uint8)
    return image


def pad(image, about):
    """The image as (N, 3, H, W), padded with zeros at right and bottom; N times if the file takes N images."""
    height, width = (max(-(-n // about["divisor"]) * about["divisor"], about["least_size"]) for n in image.shape[:2])
    size = about.get("height") or height, about.get("width") or width
    out = np.zeros((about.get("batch") or 1, 3, *size), np.uint8)
    out[:, :, :image.shape[0], :image.shape[1]] = image.transpose(2, 0, 1)
    return out


def suppress(boxes, scores, labels, iou_threshold):
    """Indices of the boxes that non-maximum suppression within each class keeps, best first."""
    left, keep = np.argsort(-scores, kind="stable"), []
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    while len(left):
        best, left = left[0], left[1:]
        keep.append(best)
        low, high = np.maximum(boxes[best, :2], boxes[left, :2]), np.minimum(boxes[best, 2:], boxes[left, 2:])
        common = (high - low).clip(0).prod(1)
        iou = common / np.maximum(area[best] + area[left] - common, 1e-9)
        left = left[(iou <= iou_threshold) | (labels[left] != labels[best])]
    return np.array(keep, int)


def detect(session, about, image):
    """Boxes (n, 4) x1 y1 x2 y2 in pixels of the image (h, w, 3), scores (n,) and labels (n,), best first."""
    small = resize(image, about)
    (h, w), (full_h, full_w) = small.shape[:2], image.shape[:2]
    images = pad(small, about)
    inputs = {"images": images, "image_sizes": np.array([[h, w]] * len(images), np.int64)}
    boxes, scores, labels = (output[0] for output in session.run(["boxes", "scores", "labels"], inputs))
    boxes, scores, labels = boxes[scores > 0], scores[scores > 0], labels[scores > 0]
    if about["nms"] == "outside":
        keep = suppress(boxes, scores, labels, about["nms_iou_threshold"])[:about["max_per_img"]]
        boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
        boxes = boxes.clip(0, [w, h, w, h])
        least = about.get("min_bbox_size", 0) if about.get("clip") == "after" else -1
        large = (boxes[:, 2:] - boxes[:, :2] > least).all(1) | (least < 0)
        boxes, scores, labels = boxes[large], scores[large], labels[large]
    return boxes * np.array([full_w / w, full_h / h, full_w / w, full_h / h]), scores, labels


def draw(image, boxes, texts):
    picture = Image.fromarray(image)
    pen = ImageDraw.Draw(picture)
    for box, text in zip(boxes.tolist(), texts):
        pen.rectangle(box, outline="red", width=2)
        pen.text((box[0] + 3, box[1] + 2), text, fill="red")
    return picture


def share(text):
    if 0 <= float(text) <= 1:
        return float(text)
    raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--score-thr", type=share, help="default: the file's own for each class, or 0.3")
    parser.add_argument("--out", type=Path, help="folder for pictures with boxes")
    args = parser.parse_args()
    try:
        session = onnxruntime.InferenceSession(args.model, providers=onnxruntime.get_available_providers())
        about = json.loads(session.get_modelmeta().custom_metadata_map["densekd"])
    except KeyError:
        parser.exit(2, f"error: {args.model} was not written by densekd's export.py: it lacks its metadata\n")
    except Exception as error:  # onnxruntime has no common type
        beside = Path(f"{args.model}.data")
        hint = "" if beside.exists() else f" (if its weights were written beside it: {beside} is missing)"
        parser.exit(2, f"error: {args.model} cannot be read{hint}: {' '.join(str(error).split())[:200]}\n")
    lowest = np.full(len(about["classes"]), 0.3 if args.score_thr is None else args.score_thr)
    if args.score_thr is None and about.get("thresholds"):  # null: no box of this class; rounding differs a little
        lowest = np.array([np.inf if score is None else score - 1e-5 for score in about["thresholds"]])
    for path in args.images:
        image = read(path)
        boxes, scores, labels = detect(session, about, image)
        shown = scores >= lowest[labels]
        boxes, texts = boxes[shown], [f"{about['classes'][k]} {s:.2f}" for s, k in zip(scores[shown], labels[shown])]
        print(f"{path}: {len(boxes)} detections")
        for box, text in zip(boxes, texts):
            print(f"  {text} at " + " ".join(f"{x:.1f}" for x in box))
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            draw(image, boxes, texts).save(args.out / f"{Path(path).stem}.png")


if __name__ == "__main__":
    main()
