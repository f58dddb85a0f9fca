"""Ranking of scores: exact counts, ties by index."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def keep_highest(scores: Float[Tensor, "group n"], num_kept: int) -> Bool[Tensor, "group n"]:
    """Mark the `num_kept` highest scores of each group; among equal ones those with the lower index.

    A threshold alone would keep every tie with it, or none. `topk` finds it in a fifth of the time of a sort, but its
    indices break ties differently from device to device.
    """
    if num_kept == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.topk(num_kept, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    higher, equal = scores > threshold, scores == threshold
    room = num_kept - higher.sum(dim=1, keepdim=True)
    return higher | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))


def descending(scores: Float[Tensor, "group n"], ties: Int[Tensor, "group n"] | None = None) -> Int[Tensor, "group n"]:
    """Order each group from its highest to its lowest score.

    Args:
        scores: Without NaN.
        ties: Order of equal scores, as indices; ascending indices by default.

    Returns:
        Indices into each group.
    """
    if ties is None:
        return scores.argsort(dim=1, descending=True, stable=True)
    return ties.gather(1, scores.gather(1, ties).argsort(dim=1, descending=True, stable=True))


def mark_first(order: Int[Tensor, "group n"], num: int) -> Bool[Tensor, "group n"]:
    """Mark the first `num` indices of each group's order."""
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :num], True)


def require_finite(scores: Float[Tensor, "out in_"], name: str) -> None:
    """Refuse scores without an order.

    Raises:
        ValueError: If a score is NaN or infinite.
    """
    if not bool(scores.isfinite().all()):
        count = int((~scores.isfinite()).sum())
        raise ValueError(
            f"scores need to be finite, got {count} NaN or infinite of {scores.numel()} for `{name}`; "
            "check its weight and the calibration inputs for NaN"
        )
