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

    Args:
        forbidden: Pairs that may not be exchanged; left as it is.

    Attributes:
        added: Weights of P that are kept now, rows x a.
        removed: Weights of S that are pruned now, rows x b.
        rows: The index of each row.
    """

    def __init__(self, forbidden: Bool[Tensor, "rows a b"]) -> None:
        self.forbidden, self.rows = forbidden.clone(), torch.arange(len(forbidden), device=forbidden.device)
        self.added, self.removed = torch.zeros_like(forbidden[:, :, 0]), torch.zeros_like(forbidden[:, 0])

    def best(
        self, costs: Float[Tensor, "rows a b"], objective: Float[Tensor, "rows"], allowed: Bool[Tensor, "rows"]
    ) -> tuple[Int[Tensor, "rows"], Int[Tensor, "rows"], Bool[Tensor, "rows"]]:
        """Exchange the pair with the lowest cost in each row if its objective falls by more than `MIN_GAIN`.

        Args:
            costs: Change of the objective by each exchange; changed in place.
            objective: The objective of each row; changed in place.
            allowed: Rows in which weights may be exchanged.

        Returns:
            p, k and whether they are exchanged.
        """
        lowest, flat = costs.masked_fill_(self.forbidden, torch.inf).flatten(1).min(1)
        p, k = flat // costs.shape[2], flat % costs.shape[2]
        moves = (lowest < -MIN_GAIN * objective) & allowed
        objective.add_(torch.where(moves, lowest, 0)).clamp_(min=0)
        for exchanged, which in ((self.added, p), (self.removed, k)):
            exchanged[self.rows, which] |= moves
        self.forbidden[self.rows, p] |= moves[:, None]
        self.forbidden[self.rows, :, k] |= moves[:, None]
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

    With e the error of a row, r = e G, and v its weights, keeping p adds v_p^2 G_pp - 2 r_p v_p to e G e^T, pruning k
    adds v_k^2 G_kk + 2 r_k v_k, and both together add 2 v_p v_k G_pk less than their sum.

    Args:
        add: The cost of keeping each weight of P.
        remove: The cost of pruning each weight of S.
        cross: 2 v_i v_j G_ij for the weights of P, then those of S.
        forbidden: Pairs that may not be exchanged.
        objective: e G e^T of each row.
        limit: Highest number of exchanges of each row.
    """
    a, b = forbidden.shape[1:]
    done, add, remove, objective = Exchanged(forbidden), add.clone(), remove.clone(), objective.clone()
    pairs, costs = cross[:, :a, a:].contiguous(), cross.new_empty(forbidden.shape)
    for step in range(min(a, b)):
        torch.sub(add[:, :, None], pairs, out=costs).add_(remove[:, None])
        p, k, moves = done.best(costs, objective, step < limit)
        if not bool(moves.any()):
            break
        change = (cross[done.rows, p] - cross[done.rows, a + k]) * moves[:, None]
        add += change[:, :a]
        remove -= change[:, a:]
    return done


def after_exact_solve(
    tableau: Float[Tensor, "rows n n"],
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
    V, b, done, objective = tableau, tableau.shape[1] - 1 - a, Exchanged(forbidden), objective.clone()
    diagonal, B = V.diagonal(dim1=1, dim2=2), V[:, :a, a:-1]
    costs, spread = V.new_empty(forbidden.shape), V.new_empty(forbidden.shape)
    for step in range(min(a, b)):
        s, t = diagonal[:, :a], V[:, :a, -1] / diagonal[:, :a]
        torch.mul(B, B, out=spread).div_(s[:, :, None]).sub_(diagonal[:, None, a:-1])  # H^-1 has a minus in V
        torch.mul(B, t[:, :, None], out=costs).sub_(V[:, None, a:-1, -1]).square_().div_(spread)
        costs.sub_((t * V[:, :a, -1])[:, :, None])
        p, k, moves = done.best(costs, objective, step < limit)
        if not bool(moves.any()):
            break
        for pivot in (p, a + k):
            line = V[done.rows, pivot]
            scale = torch.where(moves, 1 / line.gather(1, pivot[:, None])[:, 0], 0)
            V.baddbmm_((line * scale[:, None])[:, :, None], line[:, None], alpha=-1)
    return done


def support_tableau(
    A: Float[Tensor, "rows m m"], x: Float[Tensor, "rows b"], r: Float[Tensor, "rows m"], a: int
) -> Float[Tensor, "rows n n"]:
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
