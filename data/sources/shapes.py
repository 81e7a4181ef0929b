"""Shapes of the built-in data set, as functions of coordinates.

A shape maps coordinates u, v (h, w), in which it spans about [-1, 1], to a signed distance (h, w): negative inside.
"""
import numpy as np
from numpy import ndarray


def disc(u: ndarray, v: ndarray) -> ndarray:
    return np.hypot(u, v) - 1


def ring(u: ndarray, v: ndarray) -> ndarray:
    return np.abs(np.hypot(u, v) - 0.76) - 0.24


def square(u: ndarray, v: ndarray) -> ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - 0.85


def triangle(u: ndarray, v: ndarray) -> ndarray:
    """Equilateral, with its corners at radius 1.1."""
    return np.maximum(np.abs(u) * np.sqrt(3) / 2 - v / 2, v) - 0.55


def cross(u: ndarray, v: ndarray) -> ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 1, v - 0.33), np.maximum(u - 0.33, v - 1))


def star(u: ndarray, v: ndarray) -> ndarray:
    """Five points at radius 1.1, the corners between them at 0.5."""
    angle = np.arctan2(v, u) % (2 * np.pi / 5)
    angle = np.abs(angle - np.pi / 5)  # by symmetry, half a point is enough: from its side (0) to its tip (pi / 5)
    radius = np.hypot(u, v)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    tip_x, tip_y = 1.1 * np.cos(np.pi / 5), 1.1 * np.sin(np.pi / 5)
    edge_x, edge_y = tip_x - 0.5, tip_y
    return ((x - 0.5) * edge_y - y * edge_x) / np.hypot(edge_x, edge_y)


SHAPES = {"disc": disc, "ring": ring, "square": square, "triangle": triangle, "cross": cross, "star": star}
