"""Equal errors: densities at which all blocks have the same measured error."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recon.calibration.activations import Activations
from recon.models.matrices import Matrix, parameters_of
from recon.pruning.allocation.base import Allocation, count, spread
from recon.pruning.criteria import Criterion
from recon.pruning.patterns import Unstructured

SMALLEST_ERROR = 1e-30
"""Substitute for an error of zero, which has no logarithm."""

BISECTIONS = 64


@dataclass(frozen=True)
class EqualErrors(Allocation):
    """Densities at which the outputs of all blocks have the same relative error.

    The error of a block is ||Y' - Y||^2 / ||Y||^2 over calibration tokens, with the outputs Y of the dense block and Y'
    of the pruned block for the same dense inputs. It is measured at `num_densities` densities, evenly spaced around the
    pattern's. Between them its logarithm is interpolated linearly; an error that rises with the density is replaced by
    the lowest error before it. Bisection then finds the error at which the blocks together have the pattern's density.

    No density is further from the pattern's than `max_shift`, half of it, or half of the sparsity. A block that needs
    more stays at that bound, and its error differs from the others'.

    The survivors follow the criterion's scores. Criteria that choose weights together or move them (sparsegpt,
    sparsefw, admm, alps) have lower errors than those measured: their own pruning at every density would cost
    `num_densities` times as much.

    It takes one more forward pass over the calibration sequences, through the dense model, and one over `num_sequences`
    for every density.

    Args:
        num_sequences: Number of calibration sequences for the errors, the first ones; all if there are fewer.
        num_densities: Number of measured densities, 2 or more.
        max_shift: Largest distance of a block's density from the pattern's.
    """

    num_sequences: int = 8
    num_densities: int = 5
    max_shift: float = 0.2

    def __post_init__(self) -> None:
        if not (self.num_sequences >= 1 and self.num_densities >= 2 and 0 < self.max_shift < 1):
            raise ValueError(
                f"EqualErrors needs num_sequences >= 1, num_densities >= 2 and 0 < max_shift < 1, got "
                f"{self.num_sequences}, {self.num_densities} and {self.max_shift}; leave them at 8, 5 and 0.2"
            )

    def __str__(self) -> str:
        return "equal errors"

    def densities(
        self,
        walk: Activations,
        matrices: Sequence[Mapping[str, Matrix]],
        criterion: Criterion,
        pattern: Unstructured,
    ) -> dict[int, float]:
        """See `Allocation.densities`.

        Raises:
            FloatingPointError: If an error is not finite, with the block's index.
        """
        shift = min(self.max_shift, pattern.density / 2, pattern.sparsity / 2)
        grid = np.linspace(pattern.density - shift, pattern.density + shift, self.num_densities)
        errors, sizes = {}, {}
        for block, members in enumerate(matrices):
            if not members:
                continue
            statistics = walk.enter([block], members, criterion.needs)
            weights = {name: matrix.weight for name, matrix in members.items()}
            scores = {name: criterion.scores(weight, statistics[name], name) for name, weight in weights.items()}
            errors[block] = [self._error(walk, block, members, scores, density, pattern) for density in grid.tolist()]
            sizes[block] = sum(weight.numel() for weight in weights.values())
        return equalized(grid, errors, sizes, pattern.density)

    def _error(
        self,
        walk: Activations,
        block: int,
        matrices: Mapping[str, Matrix],
        scores: dict[str, Tensor],
        density: float,
        pattern: Unstructured,
    ) -> float:
        """Measure the relative squared error of the current block's output at a density."""
        shapes = {name: (matrix.shape[0], matrix.shape[1]) for name, matrix in scores.items()}
        (counted,) = spread([density], [shapes], round((1 - density) * count(shapes)), pattern)
        assert walk.output is not None
        num = min(self.num_sequences, len(walk.hidden))
        difference = energy = 0.0
        with _pruned(matrices, counted.select_all(scores)), torch.no_grad():
            for start in range(0, num, walk.batch_size):
                rows = slice(start, min(start + walk.batch_size, num))
                dense = walk.load(walk.output, rows).float()
                pruned = walk.replay.run(block, walk.load(walk.hidden, rows)).float()
                difference += (pruned - dense).square().sum(dtype=torch.float64).item()
                energy += dense.square().sum(dtype=torch.float64).item()
        error = difference / energy if energy else math.nan
        if not math.isfinite(error):
            raise FloatingPointError(
                f"the error of a pruned block must be a number, got {difference} / {energy} for block {block} at a "
                f"density of {density:.3f}; check the weights, or load the model in a wider dtype"
            )
        return error


def equalized(
    grid: np.ndarray, errors: Mapping[int, Sequence[float]], sizes: Mapping[int, int], density: float
) -> dict[int, float]:
    """Find densities within `grid` at which blocks have the same error and keep `density` of all weights.

    Args:
        grid: Ascending densities; `density` lies between the first and the last.
        errors: Block -> its error at each of them.
        sizes: Block -> its number of weights.
        density: Density of all blocks together.

    Returns:
        Block -> its density. A block with higher errors everywhere is at the end of the grid, one with lower errors
        everywhere at its beginning.
    """
    curves = {
        block: np.minimum.accumulate(np.log(np.maximum(of_block, SMALLEST_ERROR))) for block, of_block in errors.items()
    }

    def at(level: float) -> dict[int, float]:
        return {block: float(np.interp(level, curve[::-1], grid[::-1])) for block, curve in curves.items()}

    def mean(densities: Mapping[int, float]) -> float:
        return sum(densities[block] * size for block, size in sizes.items()) / sum(sizes.values())

    # Beyond both ends: the highest level is met at the lowest density, the lowest at the highest.
    low, high = min(curve[-1] for curve in curves.values()) - 1.0, max(curve[0] for curve in curves.values()) + 1.0
    for _ in range(BISECTIONS):
        level = (low + high) / 2
        low, high = (level, high) if mean(at(level)) >= density else (low, level)
    more, fewer = at(low), at(high)
    # Where an error does not change with the density, the two differ however near the levels are.
    gap = mean(more) - mean(fewer)
    share = (density - mean(fewer)) / gap if gap > 0 else 0.0
    return {block: fewer[block] + share * (more[block] - fewer[block]) for block in curves}


@contextmanager
def _pruned(matrices: Mapping[str, Matrix], keep: Mapping[str, Tensor]) -> Iterator[None]:
    """Zero the weights of `matrices` outside the masks, each out x in, and restore them at the end."""
    parameters = parameters_of(matrices.values())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for name, matrix in matrices.items():
                matrix.weight.masked_fill_(~keep[name], 0)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
