"""Masks that prune some slices of a stack whole and keep all others whole: they remove experts."""

import math

from recon.pruning.bits import bits_between, count_bits
from recon.pruning.masks import Masks


def kept_slices(masks: Masks, name: str) -> list[int] | None:
    """List the slices of a stack that survive.

    Args:
        masks: The masks.
        name: Of a masked parameter.

    Returns:
        Their numbers, in order; None if no slice is pruned whole, or another one only in part.
    """
    shape, kept = masks.shapes[name], list[int]()
    if len(shape) != 3:
        return None
    size = math.prod(shape[1:])
    for index in range(shape[0]):
        count = count_bits(bits_between(masks.packed(name), size, index))
        if count not in (0, size):
            return None
        if count:
            kept.append(index)
    return kept if len(kept) < shape[0] else None


def removes_slices(masks: Masks) -> bool:
    """Tell whether a stack loses whole slices, all others of it kept whole."""
    return any(kept_slices(masks, name) is not None for name in masks)


def without_removed(masks: Masks) -> Masks:
    """Return the masks of the written model, whose stacks have lost the slices that are pruned whole."""
    kept = {name: kept_slices(masks, name) for name in masks}
    if all(some is None for some in kept.values()):
        return masks
    return Masks({name: masks[name] if some is None else masks[name][some] for name, some in kept.items()})
