"""ADMM: let copies of the weight with and without zeros converge to each other (arXiv 2401.02938)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from recon.calibration.statistics import InputStatistics, Need
from recon.pruning.criteria.base import Criterion
from recon.pruning.criteria.reconstruction import require_finite_result, require_problem, without_dead_columns
from recon.pruning.criteria.wanda import Wanda
from recon.pruning.patterns import Pattern, Unstructured
from recon.solvers import LeastSquares
from recon.solvers.admm import alternate, require_penalties


@dataclass(frozen=True)
class ADMM(Criterion):
    """Move the weights by ADMM while the mask grows to its sparsity (arXiv 2401.02938, Alg. 1 and Section 3.3).

    An n:m mask has all its zeros from the first iteration on and is only re-chosen. The published code grows it too:
    a fraction of the matrix is pruned, sparing the best n of each group. That is worse on both golden layers (2:4
    .01125 against .01079 and .01004 against .00964), and a group with fewer zeros is no n:m mask yet.

    Args:
        iterations: Number of iterations.
        rho: The penalty on the distance of the two copies, relative to inputs of norm 1.
        damping: Added to the diagonal of G, relative to its mean.
        mask_steps: The first iterations choose the mask anew, the others keep it. 1 takes the mask of Wanda.
    """

    needs: ClassVar[Need] = "gram"
    moves_weights: ClassVar[bool] = True

    iterations: int = 20
    rho: float = 1.0
    damping: float = 0.1
    mask_steps: int = 15

    def __post_init__(self) -> None:
        if not 1 <= self.mask_steps <= self.iterations:
            raise ValueError(
                f"the mask reaches its sparsity in step `mask_steps` of `iterations` and needs 1 <= mask_steps <= "
                f"iterations, got {self.mask_steps} and {self.iterations}; the paper's are 15 and 20"
            )
        require_penalties(self.rho, self.damping)

    def scores(
        self, weight: Float[Tensor, "out in_"], statistics: InputStatistics | None, name: str
    ) -> Float[Tensor, "out in_"]:
        """Rate each weight by |W_ij| * ||X_j||_2, as the first iteration does.

        `prune` chooses by the scores of the moved weights, which differ.
        """
        return Wanda().scores(weight, statistics, name)

    def prune(
        self,
        weight: Float[Tensor, "out in_"],
        statistics: InputStatistics | None,
        pattern: Pattern,
        name: str,
    ) -> tuple[Float[Tensor, "out in_"], Bool[Tensor, "out in_"]]:
        """Choose the survivors of one matrix and move them.

        Iteration t = 0 .. mask_steps - 1 prunes the fraction s_t = s (1 - (1 - (t + 1) / mask_steps)^3) with the
        lowest |W + U| of each row or of the matrix. Counts are rounded down, as in the published code, but the last
        is the pattern's. Weights of inputs that never occurred (G_jj = 0) become zero and are pruned first; those
        that are left over count as kept.

        Args:
            weight: W0, out x in, in any floating-point type; left as it is.
            statistics: With the Gram matrix.
            pattern: Unstructured per row or per matrix, or n:m.
            name: Name of the matrix, for error messages.

        Returns:
            The moved weight, out x in, fp32 and exactly zero where pruned, and the mask, True = kept.

        Raises:
            ValueError: If the pattern does not fit, the weight is not finite, or G + rho I has no Cholesky factor.
            FloatingPointError: If the Gram matrix or the result is not finite.
        """
        G = require_problem(self, weight, statistics, pattern, name)
        W0 = without_dead_columns(weight, G)

        def choose(t: int, W: Tensor) -> Tensor:
            left = (1 - (t + 1) / self.mask_steps) ** 3
            return grown_mask(W.abs(), pattern, 1 - left, name)

        limits = self.mask_steps, self.iterations, self.rho, self.damping
        moved, keep = alternate(LeastSquares(G, W0), choose, *limits, name)
        require_finite_result(name, **{"the moved weight": moved})
        return moved, keep


def grown_mask(
    scores: Float[Tensor, "out in_"], pattern: Pattern, progress: float, name: str
) -> Bool[Tensor, "out in_"]:
    """Choose a mask at `progress` times the sparsity of an unstructured pattern, at the whole sparsity of another one.

    The count of zeros per row or matrix is rounded down, unless progress is 1: then it is the pattern's.
    """
    if progress >= 1 or not isinstance(pattern, Unstructured):
        return pattern.select(scores, name)
    num_competing = pattern.num_competing(*scores.shape)
    return pattern.select_count(scores, num_competing - math.floor(num_competing * pattern.sparsity * progress))
