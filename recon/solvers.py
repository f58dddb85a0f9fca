"""Masked least squares: the best weights of one matrix for a fixed mask, by conjugate gradients.

With W0 the dense weight, G = X^T X and M the mask, minimise tr((W - W0) G (W - W0)^T) over W = M * W. The
rows are independent convex problems of the same G: all run at once, and an iteration has one large product of the
rows that are not finished.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import vecdot

from recon.statistics import full_fp32

PROGRESS = 0.9
"""A row whose true residual is not below this fraction of its best is given up: fp32 is at its limit."""

SHRINK = 0.8
"""Finished rows leave the products once no more than this share of the rows in them is unfinished.

The rows of a 2048 x 2048 layer take 9 to 62 iterations to 1e-4, 33 on average.
"""


@dataclass
class Solution:
    """What the solver found, measured on the fp32 weight that it returns.

    Args:
        weight: W, fp32, zero outside the mask.
        iterations: Until the last row was finished or the solver stopped; each is one product of the rows unfinished
            with G.
        projected_gradient: ||M * ((W - W0) G)||_F / ||M * (W0 G)||_F, zero at the optimum.
        relative_error: tr((W - W0) G (W - W0)^T) / tr(W0 G W0^T).
    """

    weight: Float[Tensor, "out in_"]
    iterations: int
    projected_gradient: float
    relative_error: float


def conjugate_gradients(
    gram: Float[Tensor, "in_ in_"],
    dense: Float[Tensor, "out in_"],
    keep: Bool[Tensor, "out in_"],
    start: Float[Tensor, "out in_"] | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 500,
    name: str = "the matrix",
) -> Solution:
    """Solve masked least squares with Jacobi preconditioning, each row with its own step sizes.

    Everything is computed in fp32, whatever the types received and whichever autocast or TF32 setting holds.
    A row is finished when its own projected gradient, relative to M * (W0 G) of that row, is within the
    tolerance. If fp32 cannot get there the solver stops early; `Solution.projected_gradient` says how far it
    came. No row is returned worse than it started. Inputs that never occurred (G_jj = 0) keep the start's
    weights.

    Args:
        gram: G, the sum over tokens of x x^T.
        dense: W0.
        keep: M, True = kept.
        start: First iterate, pruned entries ignored; `dense` by default.
        tolerance: Relative projected gradient at which a row is finished.
        max_iterations: Iterations after which to stop.
        name: What error messages call the matrix.

    Raises:
        ValueError: If an argument holds NaN or Inf, or the result overflows fp32.
    """
    _require_finite(name, gram=gram, dense=dense, start=dense if start is None else start)
    with torch.no_grad(), full_fp32(dense.device):
        G, W0, M = gram.float(), dense.float(), keep.float()
        H = W0 @ G
        whole, scale = (W0 * H).sum(1), (H * M).norm(dim=1)
        del H
        W1 = (W0 if start is None else start.float()).masked_fill(~keep, 0)
        E_G = (W0 - W1) @ G
        before = ((W0 - W1) * E_G).sum(1)
        W, E_G, iterations = _iterate(G, W0, M, W1, E_G, tolerance * scale, max_iterations)
        after = ((W0 - W) * E_G).sum(1)
        _require_finite(name, solution=W, objective=torch.stack([before, after, whole]))
        # Rounding may lift a row that starts at its optimum.
        lifted = after > before
        if lifted.any():
            W = torch.where(lifted[:, None], W1, W)
            E_G = (W0 - W) @ G
        return Solution(
            weight=W,
            iterations=iterations,
            projected_gradient=_ratio((E_G * M).norm(), scale.norm()),
            relative_error=_ratio(torch.minimum(before, after).sum(), whole.sum()),
        )


def _iterate(
    G: Tensor, W0: Tensor, M: Tensor, start: Tensor, E_G: Tensor, target: Tensor, max_iterations: int
) -> tuple[Tensor, Tensor, int]:
    """Run conjugate gradients until each row's true residual is within its target or no longer falls.

    The updated residual R drifts from the true one, M * (E G) with E = W0 - W, so the true one is computed once R is
    within the target, and the rows that it finds unfinished start again from it. Refreshing every 25 iterations takes
    up to twice the iterations to the same residual, for each refresh spoils the conjugacy of P.

    Returns:
        W, E G of this W and the number of iterations.
    """
    W, iteration = start.clone(), 0
    diagonal = G.diagonal()
    # An input that never occurred is never updated; 1 / a subnormal would be infinite.
    preconditioner = torch.where(diagonal > torch.finfo(diagonal.dtype).tiny, 1 / diagonal, 0)
    best = torch.full_like(target, float("inf"))
    while True:
        norms = (E_G * M).norm(dim=1)
        rows = ((norms > target) & (norms < PROGRESS * best)).nonzero().flatten()
        if len(rows) == 0 or iteration == max_iterations:
            return W, E_G, iteration
        best = torch.minimum(best, norms)
        iteration += _descend(G, W, M, E_G, rows, target, preconditioner, max_iterations - iteration)
        # Differences first: H - W G would cancel. All rows, for the rounding of a product depends on how many it has.
        E_G = (W0 - W) @ G


def _descend(
    G: Tensor,
    weight: Tensor,
    mask: Tensor,
    E_G: Tensor,
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
    R = E_G[rows].mul_(M)
    P, previous = torch.zeros_like(R), torch.full_like(target, float("inf"))
    Z, Q = torch.empty_like(R), torch.empty_like(R)
    for iteration in range(max_iterations):
        active = R.norm(dim=1) > target
        num_active = int(active.sum())
        if num_active <= SHRINK * len(rows):
            weight[rows] = W
            if num_active == 0:
                return iteration
            rows, W, M, R, P = rows[active], W[active], M[active], R[active], P[active]
            target, previous, active = target[active], previous[active], active[active]
            Z, Q = Z[:num_active], Q[:num_active]
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


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    """The quotient; 0 / 0 is 0, for a matrix without inputs is exact."""
    return 0.0 if numerator == 0 else float(numerator / denominator)


def _require_finite(name: str, **tensors: Tensor) -> None:
    for argument, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"the solver needs finite numbers in fp32, got NaN or Inf in `{argument}` of `{name}`; check "
                "the weights and the calibration inputs of this matrix"
            )
