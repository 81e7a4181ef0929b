"""What property tests share: the number of examples, the same examples in every run, and strategies for boxes."""
import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays


def examples(count: int) -> settings:
    """This number of examples, the same in every run and on every machine, without a time limit."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers that float32 can represent, with the ends and zero, but without subnormal numbers."""
    return st.floats(float(np.float32(low)), float(np.float32(high)), width=32, allow_subnormal=False)


def tensors(shape: tuple[int, ...], low: float, high: float) -> st.SearchStrategy[torch.Tensor]:
    """Float64 tensors of `floats`."""
    return arrays(np.float32, shape, elements=floats(low, high)).map(
        lambda values: torch.from_numpy(values.astype(np.float64)))


@st.composite
def boxes(draw, count: int, reach: float = 2000, least: float = 1, most: float = 1000) -> torch.Tensor:
    """(count, 4) float64 xyxy, with corners up to `reach` and sides from `least` to `most` pixels."""
    corner = draw(tensors((count, 2), -reach, reach))
    return torch.cat([corner, corner + draw(tensors((count, 2), least, most))], dim=1)


def random_boxes(seed: int, count: int, width: float, height: float, least: float = 6) -> torch.Tensor:
    """(count, 4) float64 xyxy within an image; no two distances, overlaps or areas are the same."""
    g = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height], dtype=torch.float64)
    low, high = torch.rand(2, count, 2, generator=g, dtype=torch.float64).sort(dim=0).values * (size - least)
    return torch.cat([low, high + least], dim=1)
