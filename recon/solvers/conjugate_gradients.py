"""Masked least squares by conjugate gradients: the optimum of one matrix for a fixed mask.

All rows run at once, and an iteration has one large product of the rows that are not finished.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import vecdot

from recon.calibration.statistics import Products, fp32_products
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

    With an improvement, a row is also finished once an iteration lowers its objective by less than this share of what
    is left. The projected gradient alone is no measure of that: a few large inputs decide its norm. Of 44 real
    matrices, a tolerance of 1e-2 leaves an objective up to 18 % above the least one, 1.6 % on average, an improvement
    of 1e-2 up to 1 %, 0.3 % on average. Both take four products of all rows, a tolerance of 1e-6 takes 17.

    Args:
        tolerance: Relative projected gradient at which a row is finished.
        max_iterations: Limit of the iterations for a matrix.
        improvement: Relative improvement of a row's objective in one iteration below which the row is finished; 0 for
            no such limit. A start needs no more than 1e-2.
        products: Precision of the iterations' products, on devices that have it. The first and the last residual are in
            fp32 all the same, hence what is reported, and that no row gets worse than its start.
    """

    tolerance: float = 1e-6
    max_iterations: int = 500
    improvement: float = 0.0
    products: Products = "fp32"

    def __post_init__(self) -> None:
        if not 0 <= self.improvement < 1:
            raise ValueError(
                f"conjugate gradients need 0 <= improvement < 1, got {self.improvement}; 0 iterates to the tolerance, "
                f"1e-2 is enough for a start"
            )
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
        twice the iterations to the same residual, for each refresh spoils the conjugacy of the directions. Rows whose
        improvement ends stay as they are, without a look at their true residual.
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
            goal = _Goal(target[rows], self.improvement, self._objective(problem, W, R, rows))
            with fp32_products(W.device, self.products):
                iteration += _descend(problem.gram, W, M, R, rows, goal, preconditioner, left)
            if self.improvement > 0:
                return W, iteration
            # All rows, for the rounding of a product depends on how many it has.
            R = problem.residual(W)

    def _objective(self, problem: LeastSquares, weight: Tensor, residual: Tensor, rows: Tensor) -> Tensor | None:
        """The objective of some rows; None if no improvement is asked for."""
        if self.improvement == 0:
            return None
        excess = problem.excess(weight, residual)
        return (excess if problem.drift_energy is None else excess + problem.drift_energy)[rows]


class _Goal:
    """Tells which rows are unfinished.

    Args:
        target: Norm of each row's residual at which it is finished.
        improvement: See `ConjugateGradients`.
        objective: Of each row; None without an improvement.
    """

    def __init__(self, target: Tensor, improvement: float, objective: Tensor | None) -> None:
        self._target, self._improvement, self._objective = target, improvement, objective
        self._fall = torch.full_like(target, float("inf"))

    def unfinished(self, residual: Tensor) -> Tensor:
        """Mark the unfinished rows; a finished one stays so as long as it does not move."""
        active = residual.norm(dim=1) > self._target
        if self._objective is not None:
            active &= self._fall > self._improvement * self._objective.clamp(min=0)
        return active

    def note(self, fall: Tensor) -> None:
        """Note by how much the last step has lowered each row's objective."""
        if self._objective is not None:
            self._fall, self._objective = fall, self._objective - fall

    def take(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self._target, self._fall = self._target[rows], self._fall[rows]
        self._objective = None if self._objective is None else self._objective[rows]


def _descend(
    G: Tensor,
    weight: Tensor,
    mask: Tensor,
    residual: Tensor,
    rows: Tensor,
    goal: _Goal,
    preconditioner: Tensor,
    max_iterations: int,
) -> int:
    """Move some rows of the weight, in place, until they are finished by their updated residuals.

    Beside its product an iteration has nine passes over the rows. They are made in place and the mask is multiplied
    with: `masked_fill`, `where` and fresh memory make them cost as much as the product on a CPU.

    Returns:
        The number of iterations.
    """
    W, M = weight[rows], mask[rows]
    R = residual[rows].mul_(M)
    P, previous = torch.zeros_like(R), torch.full_like(R[:, 0], float("inf"))
    Z, Q = torch.empty_like(R), torch.empty_like(R)
    for iteration in range(max_iterations):
        active = goal.unfinished(R)
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
            rows, previous, active = rows[left], previous[left], active[left]
            goal.take(left)
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
        goal.note(step.flatten() * rz)
    weight[rows] = W
    return max_iterations


def _take(matrix: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """Some rows of a matrix, in the memory of `out`."""
    return torch.index_select(matrix, 0, rows, out=out[: len(rows)])
