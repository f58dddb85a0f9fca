"""The choice among the weights of all matrices together, from two passes over their scores.

The scores of all matrices take four bytes a weight, 280 GB for 70 billion. So they are computed twice and never kept.
The first pass counts them by their upper 16 bits, which tells the range that holds the least score to keep. The second
keeps all weights above that range, and the lower 16 bits of the few within it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from recon.pruning.bits import count_bits, pack, unpack
from recon.pruning.ranking import require_finite

LOWER = 16
"""Bits of a score that do not count in the first pass."""

NUM_LOWER = 2**LOWER
FIRST = -(0x7F800000 >> LOWER)
"""The range of the least finite score."""

NUM_RANGES = 1 - 2 * FIRST


@dataclass(frozen=True)
class _Marked:
    """One matrix after the second pass.

    Args:
        kept: Bit-packed mask of the weights above the range.
        shape: Out x in.
        positions: Of the weights within the range, row-major, ascending.
        lower: Their lower bits.
    """

    kept: Tensor
    shape: tuple[int, ...]
    positions: Tensor
    lower: Tensor


class Competition:
    """Keeps the highest scores of several matrices; of equal ones those of the first matrix, then of the lower index.

    `count` takes all matrices, then `mark` takes them again, in the same order and with the same scores.

    Args:
        num_kept: Number of survivors among a number of weights.
    """

    def __init__(self, num_kept: Callable[[int], int]) -> None:
        self._num_kept = num_kept
        self._counts = torch.zeros(NUM_RANGES, dtype=torch.int64)
        self._marked: dict[str, _Marked] = {}

    @property
    def num_kept(self) -> int:
        """Number of survivors among all weights that were counted."""
        return self._num_kept(int(self._counts.sum()))

    def count(self, name: str, scores: Float[Tensor, "out in_"]) -> None:
        """Take the scores of one matrix for the first time.

        Raises:
            ValueError: If a score is NaN or infinite.
        """
        require_finite(scores, name)
        ranges = (_ordinals(scores) >> LOWER) - FIRST
        self._counts += torch.bincount(ranges, minlength=NUM_RANGES).cpu()

    def mark(self, name: str, scores: Float[Tensor, "out in_"]) -> None:
        """Take the scores of one matrix again."""
        ordinals = _ordinals(scores)
        ranges, border = ordinals >> LOWER, self._border()
        positions = (ranges == border).nonzero().flatten()
        lower = (ordinals[positions] & (NUM_LOWER - 1)).cpu()
        self._marked[name] = _Marked(pack(ranges > border), tuple(scores.shape), positions.cpu(), lower)

    def masks(self) -> Iterator[tuple[str, Bool[Tensor, "out in_"]]]:
        """Yield name and mask of every matrix, True = kept, on the CPU.

        Raises:
            RuntimeError: If both passes had other scores.
        """
        left = self.num_kept - sum(count_bits(one.kept) for one in self._marked.values())
        counts = torch.zeros(NUM_LOWER, dtype=torch.int64)
        for one in self._marked.values():
            counts += torch.bincount(one.lower, minlength=NUM_LOWER)
        if not 0 <= left <= int(counts.sum()):
            raise RuntimeError(
                "a pattern across the model computes all scores twice and needs the same ones, got others the second "
                "time; choose deterministic kernels by torch.use_deterministic_algorithms(True)"
            )
        least, ties = _least(counts, left)
        for name, one in self._marked.items():
            keep = unpack(one.kept, one.shape)
            chosen, equal = one.lower > least, (one.lower == least).nonzero().flatten()[:ties]
            chosen[equal] = True
            keep.view(-1)[one.positions[chosen]] = True
            ties -= len(equal)
            yield name, keep

    def _border(self) -> int:
        """The range of the least score to keep."""
        return FIRST + _least(self._counts, self.num_kept)[0]


def _least(counts: Tensor, num: int) -> tuple[int, int]:
    """Find the least index that is needed to count `num` from the highest index down, and how many of it are needed."""
    if num == 0:
        return len(counts), 0
    from_top = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_top, num))
    return len(counts) - 1 - index, num - int(from_top[index] - counts.flip(0)[index])


def _ordinals(scores: Float[Tensor, "out in_"]) -> Int32[Tensor, "num"]:
    """Number fp32 values in ascending order: both zeros are 0, the smallest subnormal is 1, its negative -1."""
    bits = scores.float().contiguous().view(torch.int32).flatten()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
