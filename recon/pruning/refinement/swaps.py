"""Swaps: exchange kept for pruned weights while the error of the outputs falls."""

import logging
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import vecdot

from recon.calibration.statistics import full_fp32
from recon.pruning.criteria.reconstruction import require_finite_result, without_dead_columns
from recon.pruning.ranking import require_finite
from recon.pruning.refinement import exchange
from recon.pruning.refinement.base import Refinement
from recon.pruning.refinement.candidates import Candidates, in_groups, in_rows
from recon.pruning.refinement.mean_field import FACTORIZATIONS, MeanField, submatrices
from recon.solvers import ConjugateGradients, LeastSquares
from recon.solvers.normalized import normalize

Objective = Literal["exact", "fixed"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Swaps(Refinement):
    """Exchange one kept for one pruned weight of a row, or of an n:m group, while the row's error falls.

    The error is e G e^T for the row e of W - W0. With the objective `fixed` weights keep their values (SparseSwaps,
    arXiv 2512.10922). With `exact` it is the error after the remaining weights are set to their best values, and they
    are set to them. Counts of rows and groups stay.

    A round exchanges the most promising weights of all rows, then computes their errors. A row whose error has not
    fallen gets its mask back and half as many exchanges in its next round.

    Args:
        objective: The error that falls: with `fixed` weights, or after the `exact` solve.
        rounds: Limit of the rounds.
        candidates: Pruned and kept weights of a row among which a round exchanges, each; of n:m
            groups whole ones with as many weights together.
        damping: Added to the diagonal of G while masks are sought, relative to inputs of norm 1.
        tolerance: With `exact`, conjugate gradients stop in each round when the residuals of the kept weights are this
            small, relative to those of the pruned ones.
        max_iterations: Limit of conjugate gradients' iterations in each round.
    """

    objective: Objective = "exact"
    rounds: int = 8
    candidates: int = 16
    damping: float = 1e-3
    tolerance: float = 0.1
    max_iterations: int = 30

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise ValueError(
                f"swaps need an objective of {' or '.join(get_args(Objective))}, got {self.objective!r}; choose exact "
                "if the weights are solved for or recovered afterwards"
            )
        if not (min(self.rounds, self.candidates, self.max_iterations) >= 1 and min(self.damping, self.tolerance) > 0):
            raise ValueError(
                "swaps need rounds, candidates and max_iterations of 1 or more, damping and tolerance above 0, got "
                f"{self.rounds}, {self.candidates}, {self.max_iterations}, {self.damping} and {self.tolerance}; leave "
                "them at their defaults"
            )

    def __str__(self) -> str:
        return "swaps" if self.objective == "exact" else "fixed swaps"

    @property
    def moves_weights(self) -> bool:
        """Whether the weights of the exact solve are returned."""
        return self.objective == "exact"

    def refine(
        self,
        dense: Float[Tensor, "out in_"],
        gram: Float[Tensor, "in_ in_"],
        weight: Float[Tensor, "out in_"],
        keep: Bool[Tensor, "out in_"],
        group: int | None,
        name: str,
    ) -> tuple[Float[Tensor, "out in_"], Bool[Tensor, "out in_"]]:
        """Improve the mask of one matrix; see `Refinement.refine`.

        A weight that becomes a survivor has its dense value with `fixed`.

        Raises:
            ValueError: If a weight is not finite.
            FloatingPointError: If the Gram matrix or the result is not finite.
        """
        require_finite(dense, name)
        require_finite(weight, name)
        require_finite_result(name, **{"the Gram matrix": gram})
        with torch.no_grad(), full_fp32(dense.device):
            values = torch.where(keep, weight, dense)
            improved, products = self.improve(dense, gram, values, keep, group)
            changed = int((improved & ~keep).sum()) / len(keep)
            _log.info("%s on `%s`: %.1f exchanges a row, %.1f products", self, name, changed, products)
            if self.objective == "fixed":
                return values.to(weight.dtype), improved
            problem = LeastSquares(gram, without_dead_columns(dense, gram))
            moved = ConjugateGradients().solve(problem, improved, start=values.float() * improved, name=name).weight
        require_finite_result(name, **{"the moved weight": moved})
        return moved, improved

    def improve(
        self,
        dense: Float[Tensor, "out in_"],
        gram: Float[Tensor, "in_ in_"],
        values: Float[Tensor, "out in_"],
        keep: Bool[Tensor, "out in_"],
        group: int | None,
    ) -> tuple[Bool[Tensor, "out in_"], float]:
        """Find the mask.

        Args:
            dense: See `refine`.
            gram: See `refine`.
            values: The weights before the exchanges, pruned ones too.
            keep: See `refine`.
            group: See `refine`.

        Returns:
            The mask, and the number of products of all rows with a matrix of G's size that it took; a factorization
            with its inverse counts as one of in_ rows.
        """
        search = _Search(self, dense, gram, values, keep, group)
        for _ in range(self.rounds):
            if not search.advance():
                break
        return search.keep, search.products


class _Search:
    """The masks of all rows on their way, in units in which every input has norm 1."""

    def __init__(
        self, swaps: Swaps, dense: Tensor, gram: Tensor, values: Tensor, keep: Tensor, group: int | None
    ) -> None:
        problem = normalize(gram, without_dead_columns(dense, gram))
        self.swaps, self.group, self.keep = swaps, group, keep.clone()
        self.G, self.W0 = problem.gram, problem.weight
        self.G.diagonal().add_(swaps.damping)
        self.values = without_dead_columns(values, gram) * problem.norms
        self.limit = torch.full_like(keep[:, 0], keep.shape[1], dtype=torch.long)
        self.products, self.mean_field = 0.0, None
        density = int(keep.sum()) / max(1, keep.numel())
        if not 0 < density < 1:
            self.limit.zero_()
            return
        self.W = self.values * keep
        self.R = self._product(self.W0 - self.W)
        if swaps.objective == "exact":
            self.mean_field = MeanField.of(self.G, density)
            self.products += FACTORIZATIONS * len(self.G) / len(keep)
            self.W, self.R = self._descend(self.W, self.R, keep.float())
        self.errors = vecdot(self.W0 - self.W, self.R)

    def advance(self) -> bool:
        """Make one round; False if there was nothing to exchange."""
        rows = self.limit.nonzero().flatten()
        if len(rows) == 0:
            return False
        keep, exchanged = self.keep[rows], []
        for some in rows.split(self._chunk()):
            exchanged.append(self._exchange(some))
        keep, count = (torch.cat(parts) for parts in zip(*exchanged, strict=True))
        self.limit[rows[count == 0]] = 0
        rows, keep, count = rows[count > 0], keep[count > 0], count[count > 0]
        if len(rows) == 0:
            return False
        W = (self.values if self.mean_field is None else self.W)[rows] * keep
        R = self.R[rows] + self._product(self.W[rows] - W)
        if self.mean_field is not None:
            W, R = self._descend(W, R, keep.float())
        errors = vecdot(self.W0[rows] - W, R)
        better = errors < self.errors[rows]
        self.limit[rows[~better]] = count[~better] // 2
        at = rows[better]
        self.keep[at], self.W[at], self.R[at], self.errors[at] = keep[better], W[better], R[better], errors[better]
        return True

    def _chunk(self) -> int:
        width = max(2 * self.swaps.candidates, self.group or 0)
        return max(1, exchange.CHUNK // (width + 1) ** 2)

    def _exchange(self, rows: Int[Tensor, "some"]) -> tuple[Bool[Tensor, "some in_"], Int[Tensor, "some"]]:
        """Choose new masks for some rows, with the number of exchanges of each."""
        keep, W, R, errors, limit = self.keep[rows], self.W[rows], self.R[rows], self.errors[rows], self.limit[rows]
        if self.mean_field is None:
            v = self.values[rows]
            own, with_error = v * v * self.G.diagonal(), 2 * v * R
            chosen = self._candidates(with_error - own, with_error + own, keep)
            C, a = chosen.inputs, chosen.pruned.shape[1]
            u = v.gather(1, C)
            cross = submatrices(self.G, C) * (2 * u[:, :, None]) * u[:, None]
            add, remove = (own - with_error).gather(1, chosen.pruned), (own + with_error).gather(1, chosen.kept)
            done = exchange.with_fixed_weights(add, remove, cross, chosen.forbidden, errors, limit)
        else:
            variances = self.mean_field.variances
            chosen = self._candidates(R * R / variances, W * W * variances, keep)
            C, a = chosen.inputs, chosen.pruned.shape[1]
            A, x = self.mean_field.covariances(C, chosen.usable), W.gather(1, chosen.kept)
            tableau = exchange.support_tableau(A, x, R.gather(1, C), a)
            done = exchange.after_exact_solve(tableau, a, chosen.forbidden, errors, limit)
        kept_now = keep.gather(1, chosen.pruned) | done.added
        keep = keep.scatter(1, chosen.pruned, kept_now)
        # A place of a forbidden weight may stand for one that was added.
        removed = torch.zeros_like(keep).scatter_(1, chosen.kept, done.removed)
        return keep & ~removed, done.added.sum(1)

    def _candidates(self, gain: Tensor, cost: Tensor, keep: Tensor) -> Candidates:
        if self.group is None:
            return in_rows(gain, cost, keep, self.swaps.candidates)
        return in_groups(gain, cost, keep, 2 * self.swaps.candidates, self.group)

    def _product(self, rows: Tensor) -> Tensor:
        self.products += len(rows) / len(self.keep)
        return rows @ self.G

    def _descend(self, W: Tensor, R: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
        """Move W towards the best weights on the mask M by conjugate gradients, and R = (W0 - W) G with it.

        In these units the diagonal of G is constant, so that Jacobi's preconditioner changes nothing.
        """
        P, previous = torch.zeros_like(W), None
        for _ in range(self.swaps.max_iterations):
            D = R * M
            squares = vecdot(D, D)
            if squares.sum() <= self.swaps.tolerance**2 * (vecdot(R, R) - squares).sum():
                break
            factor = 0 if previous is None else torch.where(previous > 0, squares / previous, 0)[:, None]
            P, previous = D + factor * P, squares
            Q = self._product(P)
            curvature = vecdot(P, Q)
            step = torch.where(curvature > 0, squares / curvature, 0)[:, None]
            W, R = W + step * P, R - step * Q
        return W, R
