"""Pictures of detections, and of training images."""
import io
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, make_grid

from data import CocoDataset, DataConfig, build_dataset
from data.images import write_picture
from models import Detector

PALETTE = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324", "#808000", "#000075")
VIEWS = 3  # epochs in a picture of a training image
WIDTH = 480  # of a picture in a grid, in pixels


def draw_boxes(image: Tensor, boxes: Tensor, labels: Tensor, classes: Sequence[str], scores: Tensor | None = None,
               score_thr: float = 0.3, zoom: float = 1, thickness: int = 1) -> Tensor:
    """A picture with boxes, class names and scores.

    Args:
        image: uint8 (3, H, W).
        boxes: (n, 4) xyxy in its pixels; labels: (n,); scores: (n,), those below `score_thr` are left out.
        zoom: factor of the picture's size.
        thickness: factor of the size of lines and text.
    Returns:
        uint8 (3, H * zoom, W * zoom), rounded down.
    """
    if scores is not None:  # the best are drawn last, over the others
        keep = scores.argsort(stable=True)[(scores < score_thr).sum():]
        boxes, labels, scores = boxes[keep], labels[keep], scores[keep]
    image = enlarge(image, zoom)
    if len(boxes) == 0:
        return image
    names = [classes[label] for label in labels.tolist()]
    if scores is not None:
        names = [f"{name} {score:.2f}" for name, score in zip(names, scores.tolist())]
    colors = [PALETTE[label % len(PALETTE)] for label in labels.tolist()]
    return draw_bounding_boxes(image, boxes * zoom, names, colors, width=2 * thickness, label_colors="white",
                               fill_labels=True, **text_font(thickness))


def text_font(factor: int = 1) -> dict:
    """Arguments that make torchvision write in Pillow's own font, large enough to separate words."""
    size = 11 * factor
    return {"font": io.BytesIO(ImageFont.load_default(size).font_bytes), "font_size": size}


def enlarge(image: Tensor, zoom: float) -> Tensor:
    """Enlarge to uint8 (3, H * zoom, W * zoom); a whole `zoom` repeats pixels, any other interpolates."""
    if zoom == 1:  # in floats, a photograph would take gigabytes
        return image
    how = {"mode": "nearest"} if zoom == int(zoom) else {"mode": "bilinear", "antialias": True}
    return F.interpolate(image[None].float(), scale_factor=zoom, **how)[0].round().to(torch.uint8)


def mosaic(rows: list[list[Tensor]]) -> Tensor:
    """Pictures in rows of equal length, with white around the smaller ones; uint8 (3, H, W)."""
    height, width = (max(picture.shape[side] for row in rows for picture in row) for side in (1, 2))
    pictures = [F.pad(picture, (0, width - picture.shape[2], 0, height - picture.shape[1]), value=255)
                for row in rows for picture in row]
    return make_grid(pictures, nrow=len(rows[0]), padding=4, pad_value=255)


def grid(rows: list[list[Tensor]], titles: Sequence[str], title_height: int = 16) -> Tensor:
    """`mosaic` with a title over each column."""
    width = max(picture.shape[2] for row in rows for picture in row)
    head = mosaic([[title_strip(title, title_height, width) for title in titles]])
    return torch.cat([head[:, :title_height + 4], mosaic(rows)], dim=1)


def captioned(picture: Tensor, text: str, height: int = 16) -> Tensor:
    """A picture with a line of text over it."""
    return torch.cat([title_strip(text, height, picture.shape[2]), picture], dim=1)


def title_strip(text: str, height: int, width: int) -> Tensor:
    """Text on white: uint8 (3, height, width)."""
    white = torch.full((3, height, width), 255, dtype=torch.uint8)
    # The text is the label of a box whose outline lies beyond the strip.
    return draw_bounding_boxes(white, torch.tensor([[0.0, 0.0, width, height]]), [text], "white", label_colors="black",
                               **text_font())


@torch.no_grad()
def beside_truth(detectors: dict[str, Detector], dataset: CocoDataset, count: int, score_thr: float = 0.4,
                 zoom: float | None = None) -> Tensor:
    """Ground truth and every detector's boxes on a data set's first images, side by side: uint8 (3, H, W).

    Args:
        zoom: factor of the pictures' size; by default, each becomes WIDTH pixels wide.
    """
    rows = []
    for image, target in (dataset[index] for index in range(min(count, len(dataset)))):
        size = zoom or WIDTH / image.shape[2]
        row = [draw_boxes(image, target["boxes"], target["labels"], dataset.classes, zoom=size)]
        for detector in detectors.values():
            was_training = detector.training
            batch = image[None].to(next(detector.parameters()).device)
            try:
                found = detector.eval().predict(detector.preprocess(batch, [target]), [target], rescale=False)[0]
            finally:
                detector.train(was_training)  # also after an error: a run goes on without pictures
            row.append(draw_boxes(image, found["boxes"].cpu(), found["labels"].cpu(), dataset.classes,
                                  found["scores"].cpu(), score_thr, size))
        rows.append(row)
    return grid(rows, ["ground truth", *detectors])


def write_training_pictures(data: DataConfig, folder: Path, count: int, seed: int, epochs: int) -> list[Path]:
    """Draw the first training images with their boxes: as annotated, and as they are fed in the first epochs.

    Args:
        data: the section of the configuration.
        folder: gets a PNG file for each image.
        count: how many images.
        seed, epochs: of the training.
    Returns:
        The files.
    Raises:
        DataError: data that cannot be used.
    """
    fed = build_dataset(data, "train", training=True, seed=seed, epochs=epochs)
    plain, classes, files = fed.as_annotated(), [*fed.classes, "ignored"], []
    zoom = max(1, 2 * WIDTH // max(data.scale))  # so that names do not cover small images
    for index in range(min(count, len(fed))):
        row, samples = [], [fed[epoch, index] for epoch in range(min(VIEWS, epochs))]
        shown = fed.image_ids.index(samples[0][1]["image_id"])  # another one if the image cannot be read
        for image, target in [plain[shown], *samples]:
            ignored = torch.full((len(target["ignored_boxes"]),), len(fed.classes))
            row.append(draw_boxes(image, torch.cat([target["boxes"], target["ignored_boxes"]]),
                                  torch.cat([target["labels"], ignored]), classes, zoom=zoom))
        files.append(folder / f"{index + 1}_{Path(fed.file_names[shown]).stem}.png")
        write_picture(files[-1], grid([row], ["as annotated", *(f"as fed in epoch {n}" for n in range(1, len(row)))]))
    return files
