"""Pictures of detections."""
import io
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, make_grid

PALETTE = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324", "#808000", "#000075")


def draw_boxes(image: Tensor, boxes: Tensor, labels: Tensor, classes: Sequence[str], scores: Tensor | None = None,
               score_thr: float = 0.3, zoom: int = 1, thickness: int = 1) -> Tensor:
    """A picture with boxes, class names and scores.

    Args:
        image: uint8 (3, H, W).
        boxes: (n, 4) xyxy in its pixels; labels: (n,); scores: (n,), those below `score_thr` are left out.
        zoom: enlarge the picture so many times.
        thickness: enlarge lines and text so many times.
    Returns:
        uint8 (3, H * zoom, W * zoom).
    """
    if scores is not None:
        keep = scores >= score_thr
        boxes, labels, scores = boxes[keep], labels[keep], scores[keep]
    image = F.interpolate(image[None].float(), scale_factor=zoom, mode="nearest")[0].to(torch.uint8)
    if len(boxes) == 0:
        return image
    names = [classes[label] for label in labels.tolist()]
    if scores is not None:
        names = [f"{name} {score:.2f}" for name, score in zip(names, scores.tolist())]
    colors = [PALETTE[label % len(PALETTE)] for label in labels.tolist()]
    return draw_bounding_boxes(image, boxes * zoom, names, colors, width=2 * thickness, label_colors="white",
                               fill_labels=True, **larger_text(thickness))


def larger_text(factor: int) -> dict:
    """Arguments with which torchvision writes larger than it does by itself, in the font that Pillow brings."""
    if factor == 1:
        return {}
    size = 10 * factor
    return {"font": io.BytesIO(ImageFont.load_default(size).font_bytes), "font_size": size}


def grid(rows: list[list[Tensor]], titles: Sequence[str], title_height: int = 16) -> Tensor:
    """Pictures of one size in rows, with a title over each column; uint8 (3, H, W)."""
    heads = [title_strip(title, title_height, picture.shape[-1]) for title, picture in zip(titles, rows[0])]
    pictures = make_grid([picture for row in rows for picture in row], nrow=len(titles), padding=4, pad_value=255)
    head = make_grid(heads, nrow=len(titles), padding=4, pad_value=255)
    return torch.cat([head[:, :title_height + 4], pictures], dim=1)


def title_strip(text: str, height: int, width: int) -> Tensor:
    """Text on white: uint8 (3, height, width)."""
    white = torch.full((3, height, width), 255, dtype=torch.uint8)
    # The text is the label of a box whose outline lies beyond the strip.
    return draw_bounding_boxes(white, torch.tensor([[0.0, 0.0, width, height]]), [text], "white", label_colors="black")
