"""SparseGPT: prune column by column and let the columns still to come make up for the loss (arXiv 2301.00774)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from recon.calibration.statistics import InputStatistics, Need, full_fp32
from recon.pruning.criteria.base import Criterion
from recon.pruning.patterns import NM, Pattern, Unstructured
from recon.pruning.ranking import require_finite
from recon.solvers.cholesky import cholesky, dead_columns

Choose = Callable[[Tensor, int], Tensor]
"""Scores of consecutive columns and the index of the first column -> their mask."""


@dataclass(frozen=True)
class SparseGPT(Criterion):
    """Prune and update in one sweep over the columns (arXiv 2301.00774, Alg. 1).

    H = G + damping * mean(diag G) * I and H^-1 = U^T U. The paper's factor 2 / N in H cancels.

    Args:
        block: Columns whose updates of later columns are applied together, as one product. An unstructured mask is
            chosen a block at a time, so this changes the result; n:m rounds it down to whole groups.
        damping: Relative to the mean of the diagonal of G.
        published_counts: Threshold as the published code does, which prunes one weight more per block, and all
            that tie with it. To compare with it; by default counts are exact.
    """

    needs: ClassVar[Need] = "gram"
    moves_weights: ClassVar[bool] = True

    block: int = 128
    damping: float = 0.01
    published_counts: bool = False

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(
                f"`block` is a number of columns and needs to be >= 1, got {self.block}; the paper's is 128"
            )
        if not self.damping >= 0:
            raise ValueError(f"`damping` needs to be >= 0, got {self.damping}; the paper's is 0.01")

    def scores(
        self, weight: Float[Tensor, "out in_"], statistics: InputStatistics | None, name: str
    ) -> Float[Tensor, "out in_"]:
        """Rate each weight by W_ij^2 / U_jj^2, the loss of pruning it first among the columns from j on.

        These are the scores before any update. `prune` chooses by the scores of the updated weights, which differ.
        """
        with torch.no_grad(), full_fp32(weight.device):
            W, U = self._start(weight, statistics, name)
            return (W / U.diagonal()).square()

    def prune(
        self,
        weight: Float[Tensor, "out in_"],
        statistics: InputStatistics | None,
        pattern: Pattern,
        name: str,
    ) -> tuple[Float[Tensor, "out in_"], Bool[Tensor, "out in_"]]:
        """Choose the survivors of one matrix and move them.

        "Per matrix" is the paper's choice: the weights of all rows compete within a block of columns. "Per row"
        only those of a row do. Blocks get their part of the count by cumulative rounding, so that the total of a row
        or matrix is exact. The n:m mask of a group is chosen when the sweep reaches the group.

        Weights of inputs that never occurred (G_jj = 0) become zero. They are the first to be pruned within their
        row, block or group; those that are left over count as kept.

        Args:
            weight: W, out x in, in any floating-point type; left as it is.
            statistics: With the Gram matrix.
            pattern: Unstructured per row or per matrix, or n:m.
            name: Name of the matrix, for error messages.

        Returns:
            The moved weight, out x in, fp32 and exactly zero where pruned, and the mask, True = kept.

        Raises:
            ValueError: If the pattern does not fit, the weight is not finite, or H has no Cholesky factor.
            FloatingPointError: If the Gram matrix is not finite.
        """
        out, in_features = weight.shape
        choose, block, group = self._choice(pattern, out, in_features, name)
        with torch.no_grad(), full_fp32(weight.device):
            W, U = self._start(weight, statistics, name)
            return sweep(W, U, choose, block, group)

    def _start(self, weight: Tensor, statistics: InputStatistics | None, name: str) -> tuple[Tensor, Tensor]:
        """Copy W to fp32 without its dead columns, and compute U."""
        gram = self.require_gram(statistics, name)
        dead = dead_columns(gram)
        W = weight.to(torch.float32, copy=True)
        require_finite(W, name)  # a NaN in a dead column is an error too
        W[:, dead] = 0
        return W, inverse_factor(_revived(gram, dead), self.damping, name)

    def _choice(self, pattern: Pattern, out: int, in_features: int, name: str) -> tuple[Choose, int, int]:
        """Return the rule of choice, the columns per block and the columns per choice."""
        if isinstance(pattern, NM):
            pattern.require_whole_groups(in_features, name)
            groups = max(1, self.block // pattern.of)
            return lambda scores, first: pattern.select(scores, name), groups * pattern.of, pattern.of
        if not isinstance(pattern, Unstructured) or pattern.across_model:
            raise ValueError(
                f"{self} moves the weights of a matrix while it chooses among them and needs an n:m pattern or an "
                f"unstructured one per row or matrix, got {pattern} for `{name}`; choose one of those or a criterion "
                "that only scores, such as wanda"
            )
        if self.published_counts:
            if pattern.per != "matrix":
                raise ValueError(
                    f"`criterion.published_counts` repeats a threshold per matrix, got {pattern} for `{name}`; "
                    'set `pattern.per` to "matrix" or leave the switch off'
                )
            return lambda scores, first: _above_published_threshold(scores, pattern.sparsity), self.block, self.block
        return lambda scores, first: _keep_exactly(scores, first, pattern, name), self.block, self.block


def inverse_factor(gram: Float[Tensor, "n n"], damping: float, name: str) -> Float[Tensor, "n n"]:
    """Compute U, upper triangular, with U^T U = H^-1 and H = G + damping * mean(diag G) * I.

    The published code inverts H and factorizes the inverse. Here H = R R^T with R upper triangular, from the Cholesky
    factor of H with its rows and columns reversed, and U = R^-1: one factorization that can fail instead of two, and
    an error that grows with the square root of the condition.
    """
    R = cholesky(gram.flip(0, 1), damping, name).lower.flip(0, 1)
    identity = torch.eye(len(R), dtype=R.dtype, device=R.device)
    return torch.linalg.solve_triangular(R, identity, upper=True)


def sweep(
    W: Float[Tensor, "out in_"], U: Float[Tensor, "in_ in_"], choose: Choose, block: int, group: int
) -> tuple[Float[Tensor, "out in_"], Bool[Tensor, "out in_"]]:
    """Prune column after column, each error e_j spread over the columns to its right (Alg. 1).

    Args:
        W: The weight; overwritten.
        U: Upper triangular, U^T U = H^-1.
        choose: Chooses the mask of consecutive columns by their scores.
        block: Columns whose updates of later blocks are applied together; a multiple of `group`.
        group: Columns chosen at once; the last group may have fewer.

    Returns:
        W, zero where pruned, and the mask, True = kept.
    """
    keep = torch.ones_like(W, dtype=torch.bool)
    for start in range(0, W.shape[1], block):
        columns = slice(start, min(start + block, W.shape[1]))
        # Transposed, for a column of W is then contiguous.
        W1, U1, keep1 = W[:, columns].T.contiguous(), U[columns, columns], keep[:, columns]
        E = torch.empty_like(W1)
        for j in range(len(W1)):
            if j % group == 0:
                chosen = slice(j, j + group)
                keep1[:, chosen] = choose((W1[chosen].T / U1.diagonal()[chosen]).square(), start + j)
                pruned = ~keep1[:, chosen].T
            E[j] = W1[j] * pruned[j % group] / U1[j, j]
            W1[j + 1 :].addr_(U1[j, j + 1 :], E[j], alpha=-1)
        W[:, columns] = W1.T.masked_fill(~keep1, 0)
        W[:, columns.stop :] -= E.T @ U[columns, columns.stop :]
    return W, keep


def _revived(gram: Tensor, dead: Tensor) -> Tensor:
    """Give G a positive diagonal where inputs are dead; without it H is singular.

    The paper's 1 is large or small depending on the units of X, and through the mean of the diagonal it would damp
    the live inputs. Their mean leaves the damping as it is without the dead ones.
    """
    if not bool(dead.any()):
        return gram
    fill = 1.0 if bool(dead.all()) else gram.diagonal()[~dead].mean()
    revived = gram.clone()
    revived.diagonal()[dead] = fill
    return revived


def _keep_exactly(scores: Tensor, first: int, pattern: Unstructured, name: str) -> Tensor:
    """Keep as many as the pattern keeps of all columns up to these, less those it keeps of the columns before."""
    require_finite(scores, name)
    last = first + scores.shape[1]
    before, after = (pattern.num_kept(pattern.num_competing(len(scores), columns)) for columns in (first, last))
    return pattern.select_count(scores, after - before)


def _above_published_threshold(scores: Tensor, sparsity: float) -> Tensor:
    """`mask1 = tmp <= thresh` of the published sparsegpt.py, inverted."""
    return scores > scores.flatten().sort().values[int(scores.numel() * sparsity)]
