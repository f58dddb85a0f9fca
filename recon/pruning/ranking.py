"""Ranking of scores: exact counts, ties by index.

Thresholds are never used within a matrix: `score <= sorted[k]` prunes k+1 weights and every tie with them.
"""

import struct

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def keep_highest(scores: Float[Tensor, "group n"], num_kept: int) -> Bool[Tensor, "group n"]:
    """Mark the `num_kept` highest scores of each group; among equal ones those with the lower index."""
    return mark_first(descending(scores), num_kept)


def descending(scores: Float[Tensor, "group n"], ties: Int[Tensor, "group n"] | None = None) -> Int[Tensor, "group n"]:
    """Order each group from its highest to its lowest score.

    Args:
        scores: Without NaN.
        ties: Order of equal scores, as indices; ascending indices by default.

    Returns:
        Indices into each group.
    """
    # The sort must be stable: `topk` breaks ties differently from device to device.
    if ties is None:
        return scores.argsort(dim=1, descending=True, stable=True)
    return ties.gather(1, scores.gather(1, ties).argsort(dim=1, descending=True, stable=True))


def mark_first(order: Int[Tensor, "group n"], num: int) -> Bool[Tensor, "group n"]:
    """Mark the first `num` indices of each group's order."""
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :num], True)


def kth_highest(scores: list[Tensor], k: int) -> float:
    """Find the k-th highest of all fp32 scores; infinity for k = 0.

    Bisection over the bits of a float: 32 counts, no copy. Sorting the concatenated scores would take
    28 + 56 GB for a model of 7 billion weights.
    """
    if k == 0:
        return float("inf")
    low, high = _ordinal(float("-inf")), _ordinal(float("inf"))
    while high - low > 1:  # at least k scores are >= low, fewer are >= high
        middle = (low + high) // 2
        value = _from_ordinal(middle)
        enough = sum(int((matrix.float() >= value).sum()) for matrix in scores) >= k
        low, high = (middle, high) if enough else (low, middle)
    return _from_ordinal(low)


def _ordinal(value: float) -> int:
    """Number the fp32 values in ascending order: 0.0 is 0, the smallest subnormal is 1, its negative -1."""
    magnitude = struct.unpack("<I", struct.pack("<f", abs(value)))[0]
    return magnitude if value >= 0 else -magnitude


def _from_ordinal(ordinal: int) -> float:
    magnitude = struct.unpack("<f", struct.pack("<I", abs(ordinal)))[0]
    return magnitude if ordinal >= 0 else -magnitude
