"""ADMM: copies of the weight with and without zeros converge to each other (arXiv 2401.02938, Alg. 1).

The criterion `admm` chooses the mask on the way; here is the iteration, and the solver whose mask is fixed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from recon.solvers.base import Solver
from recon.solvers.cholesky import cholesky
from recon.solvers.least_squares import LeastSquares, exactly
from recon.solvers.normalized import normalize

Choose = Callable[[int, Tensor], Tensor]
"""Iteration t and the weight W + U to be projected -> mask."""


@dataclass(frozen=True)
class ADMMSolver(Solver):
    """A given number of iterations of ADMM (arXiv 2401.02938, Alg. 1): one factorization, and a product in each.

    The result is close to the optimum, not at it: damping pulls towards the dense weight. Kept weights begin at their
    start and pruned ones at their dense values, as in the paper if nothing has moved yet.

    Args:
        iterations: The paper uses 20; 0 only zeroes what is pruned.
        rho: The penalty on the distance of the two copies, relative to inputs of norm 1; the paper's is 1.
        damping: Added to the diagonal of G, relative to its mean; the paper's is 0.1.
    """

    iterations: int = 20
    rho: float = 1.0
    damping: float = 0.1

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"ADMM needs iterations >= 0, got {self.iterations}; the paper uses 20")
        require_penalties(self.rho, self.damping)

    def __str__(self) -> str:
        return "admm"

    def iterate(
        self,
        problem: LeastSquares,
        keep: Bool[Tensor, "out in_"],
        start: Float[Tensor, "out in_"],
        residual: Float[Tensor, "out in_"],
        name: str,
    ) -> tuple[Float[Tensor, "out in_"], int]:
        """Run all iterations with one mask.

        Raises:
            ValueError: If G + rho I has no Cholesky factor.
        """
        first = torch.where(keep, start, problem.dense)
        moved, _ = alternate(problem, lambda t, W: keep, 1, self.iterations, self.rho, self.damping, name, first)
        return moved, self.iterations


def alternate(
    problem: LeastSquares,
    choose: Choose,
    mask_steps: int,
    iterations: int,
    rho: float,
    damping: float,
    name: str,
    first: Float[Tensor, "out in_"] | None = None,
) -> tuple[Float[Tensor, "out in_"], Bool[Tensor, "out in_"]]:
    """Run ADMM: W is dense, Z has the zeros, U sums up their differences.

    Args:
        problem: The problem of the matrix.
        choose: Chooses the mask, for the iterations t < mask_steps.
        mask_steps: The first iterations choose the mask anew, the others keep it.
        iterations: Number of iterations.
        rho: The penalty, relative to inputs of norm 1.
        damping: Added to the diagonal of G, relative to its mean.
        name: Name of the matrix, for messages.
        first: W to begin with, W0 by default.

    Returns:
        The moved weight, fp32 and exactly zero where pruned, and its mask. Numbers may have overflowed: the caller
        checks.

    Raises:
        ValueError: If G + rho I has no Cholesky factor.
    """
    with exactly(problem.dense.device):
        normalized = normalize(problem.gram, problem.dense)
        n, G, W0 = normalized.norms, normalized.gram, normalized.weight
        damped = damping * G.diagonal().mean()
        G.diagonal().add_(damped)
        Y = W0 @ G if problem.cross is None else problem.target / n + damped * W0
        G.diagonal().add_(rho)
        P = torch.cholesky_inverse(cholesky(G, 0.0, name).lower)
        W = W0 if first is None else first * n
        U, M = torch.zeros_like(W), choose(0, W)
        for t in range(iterations):
            if 0 < t < mask_steps:
                M = choose(t, W + U)
            Z = (W + U) * M
            U += W - Z
            W = (Y + rho * (Z - U)) @ P
        return ((W + U) / n).masked_fill(~M, 0), M  # times M would leave negative zeros


def require_penalties(rho: float, damping: float) -> None:
    """Refuse a penalty or a damping for which the iteration is undefined.

    Raises:
        ValueError: Unless 0 < rho < infinity and 0 <= damping < infinity.
    """
    if not (0 < rho < math.inf and 0 <= damping < math.inf):
        raise ValueError(
            f"ADMM needs rho > 0 and damping >= 0, both finite, got {rho} and {damping}; the paper's are 1 and 0.1, "
            "relative to inputs of norm 1"
        )
