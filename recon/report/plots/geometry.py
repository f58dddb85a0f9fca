"""Which boxes and straight lines touch each other: all pairs at once, in the plane.

A box is (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1, a segment (x0, y0, x1, y1) from one end to the other.
"""

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray


def boxes_overlap(a: Float[ndarray, "m 4"], b: Float[ndarray, "n 4"]) -> Bool[ndarray, "m n"]:
    """Whether each box of `a` and each of `b` share more than an edge."""
    a, b = a[:, None], b[None]
    meet = (a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:])
    return meet[..., 0] & meet[..., 1]


def segments_enter(segments: Float[ndarray, "m 4"], boxes: Float[ndarray, "n 4"]) -> Bool[ndarray, "m n"]:
    """Whether each segment has a point in each box, edges included (Liang and Barsky, 1984)."""
    start, end = segments[:, None, :2], segments[:, None, 2:]
    low, high = boxes[None, :, :2], boxes[None, :, 2:]
    step = end - start
    still = step == 0  # runs along the other axis: either always or never between the two edges
    safe = np.where(still, 1.0, step)
    first, last = (low - start) / safe, (high - start) / safe
    first, last = np.minimum(first, last), np.maximum(first, last)
    between = (low <= start) & (start <= high)
    first = np.where(still, np.where(between, -np.inf, np.inf), first)
    last = np.where(still, np.where(between, np.inf, -np.inf), last)
    return np.maximum(first.max(-1), 0.0) <= np.minimum(last.min(-1), 1.0)


def segments_cross(a: Float[ndarray, "m 4"], b: Float[ndarray, "n 4"]) -> Bool[ndarray, "m n"]:
    """Whether each segment of `a` crosses each of `b` inside both; parallel ones never do."""
    a, b = a[:, None], b[None]
    apart = _side(a, b[..., :2]) * _side(a, b[..., 2:]) < 0
    return apart & (_side(b, a[..., :2]) * _side(b, a[..., 2:]) < 0)


def _side(segments: Float[ndarray, "*#shape 4"], points: Float[ndarray, "*#shape 2"]) -> Float[ndarray, "..."]:
    """Positive for points to the left of the segment, negative to the right, zero on its line."""
    step = segments[..., 2:] - segments[..., :2]
    offset = points - segments[..., :2]
    return step[..., 0] * offset[..., 1] - step[..., 1] * offset[..., 0]
