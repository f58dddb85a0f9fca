"""ALPS: ADMM whose penalty rises until the mask is stable, then the best weights for it (arXiv 2406.07831)."""

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from recon.calibration.statistics import InputStatistics, Need, full_fp32
from recon.pruning.criteria.base import Criterion
from recon.pruning.criteria.reconstruction import require_finite_result, require_problem, without_dead_columns
from recon.pruning.criteria.wanda import Wanda
from recon.pruning.patterns import Pattern
from recon.solvers import ConjugateGradients, LeastSquares
from recon.solvers.normalized import normalize

CHECK_EVERY = 3
"""Iterations between two checks of the support; each check changes rho."""

RHO_FACTORS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Factor of rho (second) if the changed fraction of the support is above the first number."""

RHO_CUT = 1 / 5
"""Factor of rho if its first value proves too large (published code)."""

MIN_RHO = 1e-6
"""Lower limit of rho: a first support that is kept with next to no penalty, as with nothing to prune, is final."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ALPS(Criterion):
    """Find the support by ADMM with a rising penalty, then solve for its weights (arXiv 2406.07831, Alg. 1 and 2).

    Args:
        max_iterations: Limit of ADMM's iterations if the support does not become stable; the published code's.
        rho: The first penalty, relative to inputs of norm 1.
        damping: Added to the diagonal of G while the support is sought, relative to its mean. The weights are those
            of least squares without it.
    """

    needs: ClassVar[Need] = "gram"
    moves_weights: ClassVar[bool] = True

    max_iterations: int = 300
    rho: float = 0.1
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not (self.max_iterations >= 1 and self.rho > 0 and self.damping >= 0):
            raise ValueError(
                f"ALPS needs max_iterations >= 1, rho > 0 and damping >= 0, got {self.max_iterations}, {self.rho} and "
                f"{self.damping}; the published code's are 300, 0.1 and 0.01"
            )

    def scores(
        self, weight: Float[Tensor, "out in_"], statistics: InputStatistics | None, name: str
    ) -> Float[Tensor, "out in_"]:
        """Rate each weight by |W_ij| * ||X_j||_2, the scores of the first support.

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

        "Per matrix" is the paper's choice. Weights of inputs that never occurred (G_jj = 0) become zero and are
        pruned first; those that are left over count as kept.

        Args:
            weight: W0, out x in, in any floating-point type; left as it is.
            statistics: With the Gram matrix.
            pattern: Unstructured per row or per matrix, or n:m.
            name: Name of the matrix, for error messages.

        Returns:
            The moved weight, out x in, fp32 and exactly zero where pruned, and the mask, True = kept.

        Raises:
            ValueError: If the pattern does not fit or the weight is not finite.
            FloatingPointError: If the Gram matrix or the result is not finite.
        """
        G = require_problem(self, weight, statistics, pattern, name)
        W0 = without_dead_columns(weight, G)
        with torch.no_grad(), full_fp32(W0.device):
            W, keep, iterations = _seek_support(self, G, W0, pattern, name)
            solution = ConjugateGradients().solve(LeastSquares(G, W0), keep, start=W, name=name)
        _log.info(
            "ALPS on `%s`: support after %d iterations, relative error %.3e", name, iterations, solution.relative_error
        )
        return solution.weight, keep


def _seek_support(alps: ALPS, gram: Tensor, dense: Tensor, pattern: Pattern, name: str) -> tuple[Tensor, Tensor, int]:
    """Find the weight with zeros, its support and the number of iterations.

    W is dense, D has the zeros (Section 3.1). U = V / rho is the dual in the units of W, rescaled when rho changes.
    """
    problem = normalize(gram, dense)
    n, G, W0 = problem.norms, problem.gram, problem.weight
    G.diagonal().add_(alps.damping * G.diagonal().mean())
    L, Q = torch.linalg.eigh(G.double())
    L.clamp_(min=0)  # G has no negative eigenvalues but for rounding
    Y = W0 @ G
    first = pattern.select(W0.abs(), name)
    D, U, keep, previous = W0 * first, torch.zeros_like(W0), first, first
    rho, left_first, iteration = alps.rho, False, 0
    inverse = _inverse(L, Q, rho)
    while iteration < alps.max_iterations:
        iteration += 1
        W = (Y + rho * (D - U)) @ inverse
        keep = pattern.select((W + U).abs(), name)
        D = (W + U) * keep
        U += W - D
        if iteration % CHECK_EVERY:
            continue
        change = int((keep != previous).sum()) / max(1, int(keep.sum()))
        left_first = left_first or change > RHO_FACTORS[1][0]
        if left_first and change == 0:
            break
        if left_first:
            factor = next(factor for above, factor in RHO_FACTORS if change > above)
        else:
            # A penalty that holds on to the first support from the start is too large.
            factor, D, U, keep = RHO_CUT, W0 * first, torch.zeros_like(W0), first
            if rho * factor < MIN_RHO:
                break
        rho, U, previous = rho * factor, U / factor, keep
        inverse = _inverse(L, Q, rho)
    moved = D / n
    require_finite_result(name, **{"the moved weight": moved})
    return moved, keep, iteration


def _inverse(L: Tensor, Q: Tensor, rho: float) -> Tensor:
    """Compute (G + rho I)^-1 in fp32 from the eigenvalues L and eigenvectors Q of G in fp64."""
    return ((Q / (L + rho)) @ Q.T).float()
