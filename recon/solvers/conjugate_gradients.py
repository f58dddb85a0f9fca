"""Masked least squares by conjugate gradients: the optimum of one matrix for a fixed mask.

All rows run at once, and an iteration has one large product of the rows that are not finished.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import vecdot

from recon.solvers.base import Solver
from recon.solvers.least_squares import LeastSquares

PROGRESS = 0.9
"""A row ends if its true residual is not below this fraction of its best: fp32 is at its limit."""

SHRINK = 0.8
"""Finished rows leave the products once no more than this share of the rows in them is unfinished.

The rows of a 2048 x 2048 layer take 9 to 62 iterations to 1e-4, 33 on average.
"""


@dataclass(frozen=True)
class ConjugateGradients(Solver):
    """Conjugate gradients with Jacobi preconditioning, each row with its own step sizes.

    A row is finished when its own projected gradient, relative to M * (W0 C) of that row, is within the tolerance. The
    solver stops early where fp32 is not precise enough; `Solution.projected_gradient` is the tolerance reached.

    Args:
        tolerance: Relative projected gradient at which a row is finished.
        max_iterations: Limit of the iterations for a matrix.
    """

    tolerance: float = 1e-6
    max_iterations: int = 500

    def __post_init__(self) -> None:
        if not (0 <= self.tolerance < 1 and self.max_iterations >= 0):
            raise ValueError(
                f"conjugate gradients need 0 <= tolerance < 1 and max_iterations >= 0, got {self.tolerance} and "
                f"{self.max_iterations}; 1e-6 is what fp32 reaches, mostly within 500 iterations"
            )

    def __str__(self) -> str:
        return "cg"

    def iterate(
        self,
        problem: LeastSquares,
        keep: Bool[Tensor, "out in_"],
        start: Float[Tensor, "out in_"],
        residual: Float[Tensor, "out in_"],
        name: str,
    ) -> tuple[Float[Tensor, "out in_"], int]:
        """Run until each row's true residual is within its target or no longer falls.

        The updated residual drifts from the true R, so the true one is computed once the updated one is within the
        target, and the rows that it finds unfinished start again from it. Refreshing every 25 iterations takes up to
        twice the iterations to the same residual, for each refresh spoils the conjugacy of the directions.
        """
        W, R, M, iteration = start.clone(), residual, keep.float(), 0
        target = self.tolerance * (problem.target * M).norm(dim=1)
        diagonal = problem.gram.diagonal()
        # An input that never occurred is never updated; 1 / a subnormal would be infinite.
        preconditioner = torch.where(diagonal > torch.finfo(diagonal.dtype).tiny, 1 / diagonal, 0)
        best = torch.full_like(target, float("inf"))
        while True:
            norms = (R * M).norm(dim=1)
            rows = ((norms > target) & (norms < PROGRESS * best)).nonzero().flatten()
            if len(rows) == 0 or iteration == self.max_iterations:
                return W, iteration
            best = torch.minimum(best, norms)
            left = self.max_iterations - iteration
            iteration += _descend(problem.gram, W, M, R, rows, target, preconditioner, left)
            # All rows, for the rounding of a product depends on how many it has.
            R = problem.residual(W)


def _descend(
    G: Tensor,
    weight: Tensor,
    mask: Tensor,
    residual: Tensor,
    rows: Tensor,
    target: Tensor,
    preconditioner: Tensor,
    max_iterations: int,
) -> int:
    """Move some rows of the weight, in place, until their updated residuals are within the target.

    Beside its product an iteration has nine passes over the rows. They are made in place and the mask is multiplied
    with: `masked_fill`, `where` and fresh memory make them cost as much as the product on a CPU.

    Returns:
        The number of iterations.
    """
    W, M, target = weight[rows], mask[rows], target[rows]
    R = residual[rows].mul_(M)
    P, previous = torch.zeros_like(R), torch.full_like(target, float("inf"))
    Z, Q = torch.empty_like(R), torch.empty_like(R)
    for iteration in range(max_iterations):
        active = R.norm(dim=1) > target
        num_active = int(active.sum())
        if num_active <= SHRINK * len(rows):
            weight[rows] = W
            if num_active == 0:
                return iteration
            # Into memory that holds nothing now, so that what a solve takes does not depend on when its rows finish.
            left = active.nonzero().flatten()
            W, Z = _take(W, left, Z), W
            M, Q = _take(M, left, Q), M
            R, Z = _take(R, left, Z), R
            P, Q = _take(P, left, Q), P
            Z, Q = Z[:num_active], Q[:num_active]
            rows, target, previous, active = rows[left], target[left], previous[left], active[left]
        torch.mul(R, preconditioner, out=Z)
        rz = vecdot(R, Z)
        P.mul_(torch.where(active, rz / previous, 0)[:, None]).add_(Z)
        previous = rz
        torch.mm(P, G, out=Q)
        Q.mul_(M)
        curvature = vecdot(P, Q)
        step = torch.where(active & (curvature > 0), rz / curvature, 0)[:, None]
        W.addcmul_(step, P)
        R.addcmul_(step, Q, value=-1)
    weight[rows] = W
    return max_iterations


def _take(matrix: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """Some rows of a matrix, in the memory of `out`."""
    return torch.index_select(matrix, 0, rows, out=out[: len(rows)])
