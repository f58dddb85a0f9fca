"""Exchanges among a few weights of each row, one after another, with exact costs for a quadratic objective.

Of each row `a` pruned weights P are candidates to be kept and `b` kept weights S to be pruned. The best pair (p, k) is
exchanged, the costs of the others are updated, and so on; a weight is exchanged once. All rows go at once.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MIN_GAIN = 1e-5
"""Smallest fall of a row's objective, relative to it, for which weights are exchanged: above the rounding of fp32."""

CHUNK = 2**18
"""Numbers of a matrix per row that are worked on at once: they stay in a core's cache."""


class Exchanged:
    """The exchanges made in each row.

    Attributes:
        added: Weights of P that are kept now, rows x a.
        removed: Weights of S that are pruned now, rows x b.
    """

    def __init__(self, rows: int, a: int, b: int, device: torch.device) -> None:
        self.added = torch.zeros(rows, a, dtype=torch.bool, device=device)
        self.removed = torch.zeros(rows, b, dtype=torch.bool, device=device)

    def best(
        self, costs: Float[Tensor, "rows a b"], threshold: Float[Tensor, "rows"], allowed: Bool[Tensor, "rows"]
    ) -> tuple[Int[Tensor, "rows"], Int[Tensor, "rows"], Bool[Tensor, "rows"]]:
        """Find the pair with the lowest cost in each row and mark it as exchanged if it is below the threshold.

        Args:
            costs: Change of the objective by each exchange; infinite where none is possible. Changed in place.
            threshold: Highest cost of an exchange, negative.
            allowed: Rows in which weights may be exchanged.

        Returns:
            p, k and whether they are exchanged.
        """
        costs.masked_fill_(self.added[:, :, None] | self.removed[:, None], torch.inf)
        lowest, flat = costs.flatten(1).min(1)
        p, k = flat // costs.shape[2], flat % costs.shape[2]
        moves = (lowest < threshold) & allowed
        self.added.scatter_(1, p[:, None], moves[:, None] | self.added.gather(1, p[:, None]))
        self.removed.scatter_(1, k[:, None], moves[:, None] | self.removed.gather(1, k[:, None]))
        return p, k, moves


def with_fixed_weights(
    add: Float[Tensor, "rows a"],
    remove: Float[Tensor, "rows b"],
    cross: Float[Tensor, "rows m m"],
    forbidden: Bool[Tensor, "rows a b"],
    objective: Float[Tensor, "rows"],
    limit: Int[Tensor, "rows"],
) -> Exchanged:
    """Exchange weights that keep their values.

    With e the error of a row, r = e G, and v its weights, keeping p adds v_p^2 G_pp - 2 r_p v_p to e G e^T, pruning k adds
    v_k^2 G_kk + 2 r_k v_k, and both together add 2 v_p v_k G_pk less than their sum.

    Args:
        add: The cost of keeping each weight of P.
        remove: The cost of pruning each weight of S.
        cross: 2 v_i v_j G_ij for the weights of P, then those of S.
        forbidden: Pairs that may not be exchanged.
        objective: e G e^T of each row.
        limit: Highest number of exchanges of each row.
    """
    (rows, a), b = add.shape, remove.shape[1]
    done, at = Exchanged(rows, a, b, add.device), torch.arange(rows, device=add.device)
    pairs, add, remove, objective = cross[:, :a, a:], add.clone(), remove.clone(), objective.clone()
    for step in range(min(a, b)):
        costs = (add[:, :, None] + remove[:, None] - pairs).masked_fill_(forbidden, torch.inf)
        p, k, moves = done.best(costs, -MIN_GAIN * objective, step < limit)
        if not bool(moves.any()):
            break
        objective += torch.where(moves, costs[at, p, k], 0)
        change = (cross[at, p] - cross[at, a + k]) * moves[:, None]
        add += change[:, :a]
        remove -= change[:, a:]
    return done


def after_exact_solve(
    tableau: Float[Tensor, "rows m+1 m+1"],
    a: int,
    forbidden: Bool[Tensor, "rows a b"],
    objective: Float[Tensor, "rows"],
    limit: Int[Tensor, "rows"],
) -> Exchanged:
    """Exchange weights where all others take their best values afterwards.

    Keeping p gains r_p^2 / s_p with s_p the Schur complement, and moves x_k to x_k - B_pk r_p / s_p and (H^-1)_kk to
    (H^-1)_kk + B_pk^2 / s_p, with B = G_PS H^-1; then pruning k costs x_k^2 / (H^-1)_kk.

    Args:
        tableau: See `support_tableau`; changed in place.
        a: The number of weights in P.
        forbidden: Pairs that may not be exchanged.
        objective: The objective of each row.
        limit: Highest number of exchanges of each row.
    """
    V, rows, b = tableau, len(tableau), tableau.shape[1] - 1 - a
    done, at = Exchanged(rows, a, b, V.device), torch.arange(rows, device=V.device)
    diagonal, B = V.diagonal(dim1=1, dim2=2), V[:, :a, a:-1]
    objective, costs = objective.clone(), torch.empty_like(forbidden, dtype=V.dtype)
    spread = torch.empty_like(costs)
    for step in range(min(a, b)):
        s, t = diagonal[:, :a], V[:, :a, -1] / diagonal[:, :a]
        torch.mul(B, B, out=spread).div_(s[:, :, None]).sub_(diagonal[:, None, a:-1])  # H^-1 has a minus in V
        torch.mul(B, t[:, :, None], out=costs).sub_(V[:, None, a:-1, -1]).square_().div_(spread)
        costs.sub_((t * V[:, :a, -1])[:, :, None]).masked_fill_(forbidden, torch.inf)
        p, k, moves = done.best(costs, -MIN_GAIN * objective, step < limit)
        if not bool(moves.any()):
            break
        objective += torch.where(moves, costs[at, p, k], 0)
        for pivot in (p, a + k):
            line = V[at, pivot]
            scale = torch.where(moves, 1 / line.gather(1, pivot[:, None])[:, 0], 0)
            V.baddbmm_((line * scale[:, None])[:, :, None], line[:, None], alpha=-1)
    return done


def support_tableau(
    A: Float[Tensor, "rows m m"], x: Float[Tensor, "rows b"], r: Float[Tensor, "rows m"], a: int
) -> Float[Tensor, "rows m+1 m+1"]:
    """Sweep a quadratic form on its support, so that exchanges are rank-one updates of the result.

    Args:
        A: The form for P, then S.
        x: The weights of S.
        r: A (x* - x) for the unconstrained optimum x*: residuals of P and of S.
        a: The number of weights in P.

    Returns:
        [[A_PP - B A_SP, B, r_P], [B^T, -H^-1, x_S], [r_P^T, x_S^T, .]] with H = A_SS, B = A_PS H^-1, and x_S and r_P
        those after the solve on S.
    """
    V = A.new_zeros(len(A), A.shape[1] + 1, A.shape[1] + 1)
    inverse = torch.linalg.inv(A[:, a:, a:])
    B = A[:, :a, a:] @ inverse
    V[:, :a, :a] = A[:, :a, :a] - B @ A[:, a:, :a]
    V[:, :a, a:-1], V[:, a:-1, :a], V[:, a:-1, a:-1] = B, B.mT, -inverse
    V[:, :a, -1] = r[:, :a] - (B @ r[:, a:, None])[:, :, 0]
    V[:, a:-1, -1] = x + (inverse @ r[:, a:, None])[:, :, 0]
    V[:, -1, :-1] = V[:, :-1, -1]
    return V
