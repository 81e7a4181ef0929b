"""The built-in data set: rendered scenes of coloured shapes in COCO format.

It serves the demo and the tests where nothing can be downloaded. The scenes are made such that a small detector learns
them within minutes: a few opaque shapes lie on a pale background, in all of COCO's sizes, some a little cut off by the
border or covered by others, among thin lines of no class. The shape alone says the class: any may have any colour.
"""
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray

from data.images import write_picture
from data.output import write_text
from data.sources.shapes import SHAPES

CLASSES = list(SHAPES)
# Colours (red, green, blue), of which each object has about one.
COLOURS = np.array(
    [(0.9, 0.2, 0.2), (0.2, 0.8, 0.2), (0.2, 0.3, 0.9), (0.9, 0.8, 0.2), (0.8, 0.2, 0.8), (0.2, 0.8, 0.8)]
)
# Ranges of an object's diameter in pixels, and their probabilities. COCO calls a box small below 32 x 32 and large from
# 96 x 96 on.
DIAMETERS = ((24, 32), (32, 80), (80, 130))
DIAMETER_SHARES = (0.35, 0.55, 0.1)
MIN_VISIBLE = 0.8  # of an object's full shape; a scene is composed such that no object shows less
NOISE = 0.01  # its standard deviation
JPEG_QUALITY = 92


def generate_scenes(root: str | Path, train: int = 400, val: int = 100, size: tuple[int, int] = (160, 160),
                    seed: int = 0, classes: Sequence[str] = CLASSES) -> Path:
    """Write a data set of rendered scenes: `root/{train,val}/*.jpg` and `root/annotations/{train,val}.json`.

    The same arguments give the same bytes, and an image depends only on the seed, its split, its number and the size.
    Boxes are tight around what is visible of a shape; their `area` is the box's.

    Args:
        root: folder to write to; made where needed, files of the same names are overwritten.
        train, val: number of images per split.
        size: (h, w) of the images in pixels.
        seed: of everything drawn.
        classes: shapes that have boxes; the others are drawn, too, but are background.
    Returns: `root`.
    """
    root = Path(root)
    for split_number, (split, count) in enumerate((("train", train), ("val", val))):
        images, annotations = [], []
        for number in range(count):
            image, boxes, labels = render_scene(np.random.default_rng([seed, split_number, number]), size)
            name = f"{number:06d}.jpg"
            write_picture(root / split / name, torch.from_numpy(image), JPEG_QUALITY)
            images.append({"id": number + 1, "file_name": name, "width": size[1], "height": size[0]})
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels, strict=True):
                if CLASSES[label] not in classes:
                    continue
                w, h = x2 - x1, y2 - y1
                annotations.append({"id": len(annotations) + 1, "image_id": number + 1, "category_id": label + 1,
                                    "bbox": [x1, y1, w, h], "area": w * h, "iscrowd": 0})
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES) if name in classes]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write_text(root / "annotations" / f"{split}.json", json.dumps(content))
    return root


def render_scene(rng: np.random.Generator, size: tuple[int, int]) -> tuple[ndarray, ndarray, list[int]]:
    """Render one scene.

    Returns: the image, uint8 (3, h, w); boxes (n, 4) int64, xyxy, tight around the visible pixels; their n labels.
    """
    canvas = _background(rng, size)
    _add_clutter(rng, canvas, count=rng.integers(1, 4))
    owner, labels = _add_objects(rng, canvas, count=rng.integers(4, 9))
    canvas += NOISE * rng.standard_normal(canvas.shape, dtype=np.float32)
    boxes = np.array([_tight_box(owner == number) for number in range(len(labels))], dtype=np.int64).reshape(-1, 4)
    return (canvas.clip(0, 1) * 255).astype(np.uint8), boxes, labels


def _background(rng: np.random.Generator, size: tuple[int, int]) -> ndarray:
    """A pale, smooth gradient with a slightly cloudy brightness, (3, h, w) float32 in [0, 1]."""
    canvas = 0.7 + 0.2 * _smooth_noise(rng, (3, 2, 2), size) + 0.1 * _smooth_noise(rng, (1, 5, 5), size)
    return canvas.astype(np.float32)


def _smooth_noise(rng: np.random.Generator, grid: tuple[int, int, int], size: tuple[int, int]) -> ndarray:
    """Random values in [0, 1] on a grid (c, rows, columns), interpolated linearly to (c, h, w)."""
    values = rng.random(grid)
    for axis, length in ((1, size[0]), (2, size[1])):
        cells = values.shape[axis]
        position = np.linspace(0, cells - 1, length)
        lower = np.minimum(position.astype(int), cells - 2)
        shape = (-1, 1) if axis == 1 else (-1,)
        share = (position - lower).reshape(shape)
        values = values.take(lower, axis) * (1 - share) + values.take(lower + 1, axis) * share
    return values


def _add_objects(rng: np.random.Generator, canvas: ndarray, count: int) -> tuple[ndarray, list[int]]:
    """Paint up to `count` objects, large ones first, so that small ones are not buried.

    Returns: owner (h, w) int, the number of the object that shows at a pixel or -1, and the objects' labels.
    """
    owner = np.full(canvas.shape[1:], -1)
    full_areas, labels = [], []
    ranges = rng.choice(len(DIAMETERS), size=count, p=DIAMETER_SHARES)
    for diameter in sorted((rng.uniform(*DIAMETERS[choice]) for choice in ranges), reverse=True):
        label = int(rng.integers(len(CLASSES)))
        # Centres stay away from the border, or most large objects would be cut off and given up.
        margins = np.minimum(diameter / 4, 0.45 * np.array(owner.shape))
        center = rng.uniform(margins, owner.shape - margins)
        rotation, stretch = rng.uniform(-0.3, 0.3), rng.uniform(0.9, 1.1)
        u, v, window = _local_coordinates(owner.shape, center, diameter / 2, rotation, stretch)
        distance = SHAPES[CLASSES[label]](u, v) * diameter / 2  # in pixels
        inside = distance < 0
        proposal = owner.copy()
        proposal[window][inside] = len(labels)
        # the whole shape's area, with what lies outside the image
        areas = [*full_areas, _UNIT_AREAS[label] * (diameter / 2) ** 2]
        visible = np.bincount(proposal[proposal >= 0], minlength=len(areas))
        if (visible < MIN_VISIBLE * np.array(areas)).any():
            continue  # it would hide another object or lie mostly outside
        owner, full_areas = proposal, areas
        labels.append(label)
        colour = 0.8 * COLOURS[rng.integers(len(COLOURS))] + 0.2 * rng.random(3)
        _paint(rng, canvas[(slice(None), *window)], distance, u, colour)
    return owner, labels


def _local_coordinates(size: tuple[int, int], center: ndarray, radius: float, rotation: float,
                       stretch: float) -> tuple[ndarray, ndarray, tuple[slice, slice]]:
    """Coordinates u, v of a rotated and stretched shape, in units of its radius, and the window they cover.

    The stretch keeps the area. `center` is (y, x) in pixels.
    """
    reach = 1.6 * radius  # the stretched corners of a square, and a pixel
    starts = np.maximum(np.floor(center - reach), 0).astype(int)
    ends = np.minimum(np.ceil(center + reach) + 1, size).astype(int)
    y = np.arange(starts[0], ends[0])[:, None] + 0.5 - center[0]
    x = np.arange(starts[1], ends[1])[None, :] + 0.5 - center[1]
    cos, sin = np.cos(rotation) / radius, np.sin(rotation) / radius
    u, v = (cos * x + sin * y) * stretch, (cos * y - sin * x) / stretch
    return u, v, (slice(starts[0], ends[0]), slice(starts[1], ends[1]))


def _paint(rng: np.random.Generator, target: ndarray, distance: ndarray, u: ndarray, colour: ndarray) -> None:
    """Paint a shape, given its distance (h, w) in pixels, onto `target` (3, h, w), in a colour (3,) with some shade."""
    shade = rng.uniform(-0.3, 0.3) * np.clip(u, -1, 1)  # darker at one side, lighter at the other
    opacity = np.clip(0.5 - distance, 0, 1)  # half a pixel of soft edge on either side
    target += opacity * (colour[:, None, None] * (1 + shade) - target)


def _add_clutter(rng: np.random.Generator, canvas: ndarray, count: int) -> None:
    """Paint `count` lines, which belong to no class."""
    size = canvas.shape[1:]
    for _ in range(count):
        radius, width = rng.uniform(8, 50), rng.uniform(0.5, 2)  # half of its length and of its width, in pixels
        u, v, window = _local_coordinates(size, rng.uniform((0, 0), size), radius, rng.uniform(0, 2 * np.pi), 1.0)
        distance = np.maximum(np.abs(v) * radius - width, (np.abs(u) - 1) * radius)
        _paint(rng, canvas[(slice(None), *window)], distance, u, rng.random(3))


def _tight_box(mask: ndarray) -> tuple[int, int, int, int]:
    """The box x1, y1, x2, y2 around the pixels of a mask (h, w), x2 and y2 exclusive."""
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _unit_areas() -> list[float]:
    """The area of each shape at radius 1."""
    grid = np.linspace(-1.6, 1.6, 161)
    u, v = np.meshgrid(grid, grid)
    return [float((shape(u, v) < 0).mean()) * 3.2**2 for shape in SHAPES.values()]


_UNIT_AREAS = _unit_areas()
