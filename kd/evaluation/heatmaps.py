"""Maps of numbers as colours, and rows of numbers as bars."""
import torch
import torch.nn.functional as F
from torch import Tensor

from ..inference.draw import enlarge

# Red, green, blue from the least to the most, bright at the top.
COLOURS = ((20, 10, 60), (90, 20, 110), (190, 45, 80), (245, 130, 30), (255, 245, 130))


def colour(values: Tensor) -> Tensor:
    """Float (3, H, W) in 0..255 for values (H, W) in 0..1."""
    table = values.new_tensor(COLOURS)
    place = values.clamp(0, 1) * (len(COLOURS) - 1)
    below = place.floor().long().clamp(max=len(COLOURS) - 2)
    share = (place - below)[..., None]
    return ((1 - share) * table[below] + share * table[below + 1]).permute(2, 0, 1)


def overlay(image: Tensor, values: Tensor, stride: tuple[float, float], top: float, width: int) -> Tensor:
    """A coloured map over a grey image, less transparent where values are higher; uint8 (3, H', width).

    Args:
        image: uint8 (3, H, W), without padding.
        values: (h, w); a cell covers `stride` (vertical, horizontal) pixels of the image.
        top: the value of the brightest colour.
    """
    size = [round(cells * pixels) for cells, pixels in zip(values.shape, stride)]
    _, height, across = image.shape
    share = F.interpolate(values[None, None].float(), size=size, mode="nearest")[0, 0, :height, :across]
    share = F.pad(share, (0, across - share.shape[1], 0, height - share.shape[0]))
    share = (share / max(top, 1e-12)).clamp(0, 1)
    grey = image.float().mean(0, keepdim=True).expand(3, -1, -1)
    opacity = 0.35 + 0.5 * share
    return enlarge(((1 - opacity) * grey + opacity * colour(share)).round().to(torch.uint8), width / across)


def bars(values: Tensor, top: float, width: int, height: int, line: float | None = None) -> Tensor:
    """A bar for each of the values (n,), up to `top`, and a line at the value `line`; uint8 (3, height, width)."""
    picture = torch.full((3, height, width), 255, dtype=torch.uint8)
    column = torch.arange(width) * len(values) // width
    level = (values.float().cpu() / max(top, 1e-12)).clamp(0, 1)[column] * height
    filled = torch.arange(height, 0, -1)[:, None] <= level.round()
    picture[:, filled] = torch.tensor((67, 99, 216), dtype=torch.uint8)[:, None]
    if line is not None and line <= top:
        picture[:, min(height - 1, height - round(line / top * height))] = 0
    return picture
