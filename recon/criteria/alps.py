"""ALPS: ADMM whose penalty rises until the mask is stable, then the best weights for it (arXiv 2406.07831)."""

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from recon.criteria.base import Criterion
from recon.criteria.reconstruction import normalize, require_finite_result, require_problem, without_dead_columns
from recon.criteria.wanda import Wanda
from recon.patterns import Pattern
from recon.solvers import conjugate_gradients
from recon.statistics import InputStatistics, Need, full_fp32

CHECK_EVERY = 3
"""Iterations between two looks at the support, after which rho changes (the paper's schedule)."""

MIN_RHO = 1e-6
"""Below it the penalty is lost in the rounding of G and the support is what it would be without one."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ALPS(Criterion):
    """Find the support by ADMM with a rising penalty, then solve for its weights (arXiv 2406.07831, Alg. 1 and 2).

    Args:
        max_iterations: Of ADMM, if the support does not become stable before; the published code's limit.
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
        """Rate each weight by |W_ij| * ||X_j||_2, by which the first support is chosen.

        `prune` chooses by those of the moved weights, which differ.
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
            name: What error messages call the matrix.

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
            solution = conjugate_gradients(G, W0, keep, start=W, name=name)
        _log.info(
            "ALPS on `%s`: support after %d iterations, relative error %.3e", name, iterations, solution.relative_error
        )
        return solution.weight, keep


def _seek_support(
    alps: ALPS, gram: Tensor, dense: Tensor, pattern: Pattern, name: str
) -> tuple[Tensor, Tensor, int]:
    """The weight with zeros, its support and the iterations made.

    W is dense and D has the zeros (section 3.1). U = V / rho is the scaled dual, which stays representable as rho
    falls and is rescaled when rho changes.
    """
    problem = normalize(gram, dense)
    n, G, W0 = problem.norms, problem.gram, problem.weight
    G.diagonal().add_(alps.damping * G.diagonal().mean())
    L, Q = torch.linalg.eigh(G.double())
    # Rounding of G may leave eigenvalues below zero; with a rho of their size the inverse would not be one.
    L = L.clamp(min=0)
    Y = W0 @ G
    first = pattern.select(W0.abs(), name)
    num_kept = max(1, int(first.sum()))

    rho, raised, previous = alps.rho, False, first
    D, U, inverse = W0 * first, torch.zeros_like(W0), _inverse(L, Q, rho)
    for iteration in range(1, alps.max_iterations + 1):
        W = (Y + rho * (D - U)) @ inverse
        U += W
        keep = pattern.select(U.abs(), name)
        D = U * keep
        U -= D
        if iteration % CHECK_EVERY:
            continue
        change = int((keep != previous).sum())
        factor = _raise_of_rho(change / num_kept)
        # The first support has to be left once: a rho that holds on to it is too large and starts again lower.
        raised = raised or factor > FINE_RAISE
        if change == 0 and raised:
            break
        if not raised:
            factor = 1 / 5
            D, U = W0 * first, torch.zeros_like(W0)
            keep = first
        if rho * factor < MIN_RHO:
            break
        rho, U, previous = rho * factor, U / factor, keep
        inverse = _inverse(L, Q, rho)
    moved = D / n
    require_finite_result(name, **{"the moved weight": moved})
    return moved, keep, iteration
