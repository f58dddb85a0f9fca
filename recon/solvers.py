"""Masked least squares: the best weights of one matrix for a fixed mask, by conjugate gradients.

With W0 the dense weight, G = X^T X and M the mask, minimise tr((W - W0) G (W - W0)^T) over W = M * W. The
rows are independent convex problems of the same G: all run at once, and an iteration has one large product.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from recon.statistics import full_fp32

PROGRESS = 0.9
"""Stop when no unfinished row's true residual fell below this fraction of its best: fp32 is at its limit."""


@dataclass
class Solution:
    """What the solver found, measured on the fp32 weight that it returns.

    Args:
        weight: W, fp32, zero outside the mask.
        iterations: Until the last row was finished or the solver stopped; each is one product with G.
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
        G, W0, pruned = gram.float(), dense.float(), ~keep
        W1 = (W0 if start is None else start.float()).masked_fill(pruned, 0)
        W, iterations = _iterate(G, W0, pruned, W1, tolerance, max_iterations)
        before, after, whole = (_row_errors(V, W0, G) for V in (W1, W, torch.zeros_like(W)))
        _require_finite(name, solution=W, objective=torch.stack([before, after, whole]))
        # Rounding may lift a row that starts at its optimum.
        W = torch.where((after <= before)[:, None], W, W1)
        gradient, scale = _residual(W, W0, G, pruned), _residual(torch.zeros_like(W), W0, G, pruned)
        return Solution(
            weight=W,
            iterations=iterations,
            projected_gradient=_ratio(gradient.norm(), scale.norm()),
            relative_error=_ratio(torch.minimum(before, after).sum(), whole.sum()),
        )


def _iterate(
    G: Tensor, W0: Tensor, pruned: Tensor, start: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, int]:
    """Run conjugate gradients until each row's true residual is within the tolerance or no longer falls.

    The updated residual R drifts from the true one, so each time R is within the tolerance the true one is
    computed, and the rows that it finds unfinished start again from it. Refreshing every 25 iterations takes
    up to twice the iterations to the same residual, for each refresh spoils the conjugacy of P.
    """
    W, iteration = start.clone(), 0
    diagonal = G.diagonal()
    # An input that never occurred is never updated; 1 / a subnormal would be infinite.
    preconditioner = torch.where(diagonal > torch.finfo(diagonal.dtype).tiny, 1 / diagonal, 0)
    target = tolerance * _residual(torch.zeros_like(W), W0, G, pruned).norm(dim=1)
    best = torch.full_like(target, float("inf"))
    while True:
        R = _residual(W, W0, G, pruned)
        norms = R.norm(dim=1)
        progress = (norms > target) & (norms < PROGRESS * best)
        if not progress.any():
            return W, iteration
        best = torch.minimum(best, norms)
        P, previous = torch.zeros_like(R), torch.full_like(best, float("inf"))
        while (active := R.norm(dim=1) > target).any():
            if iteration == max_iterations:
                return W, iteration
            iteration += 1
            Z = R * preconditioner
            rz = (R * Z).sum(1)
            P = torch.where(active[:, None], Z + (rz / previous)[:, None] * P, 0)
            previous = rz
            Q = (P @ G).masked_fill_(pruned, 0)
            curvature = (P * Q).sum(1)
            step = torch.where(curvature > 0, rz / curvature, 0)[:, None]
            W += step * P
            R -= step * Q


def _residual(W: Tensor, W0: Tensor, G: Tensor, pruned: Tensor) -> Tensor:
    """Minus half the gradient, on the mask. Differences first: W G - W0 G would cancel."""
    return ((W0 - W) @ G).masked_fill_(pruned, 0)


def _row_errors(W: Tensor, W0: Tensor, G: Tensor) -> Tensor:
    """(w - w0) G (w - w0)^T of each row."""
    E = W - W0
    return ((E @ G) * E).sum(1)


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
