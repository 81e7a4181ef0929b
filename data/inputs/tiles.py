"""Overlapping tiles that cover a large image."""
import math

Window = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels of the image


def tile_windows(image_size: tuple[int, int], size: tuple[int, int], overlap: float) -> list[Window]:
    """The tiles of an image, row by row, at equal distances; a single one, the image itself, if it fits into a tile.

    Args:
        image_size: (h, w).
        size: (w, h) of a tile. All tiles have it; along an edge where the image is smaller, the tile is as long as it.
        overlap: the least part of a tile's width or height that it shares with the next one.
    """
    (height, width), (tile_w, tile_h) = image_size, size
    return [(x, y, min(x + tile_w, width), min(y + tile_h, height))
            for y in starts(height, tile_h, overlap) for x in starts(width, tile_w, overlap)]


def starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where the fewest tiles with enough overlap start along an edge."""
    if length <= tile:
        return [0]
    step = max(1, tile - math.ceil(tile * overlap))
    count = math.ceil((length - tile) / step) + 1
    return [i * (length - tile) // (count - 1) for i in range(count)]
