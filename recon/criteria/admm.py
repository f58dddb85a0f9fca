"""ADMM: let copies of the weight with and without zeros converge to each other (arXiv 2401.02938)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from recon.criteria.base import Criterion
from recon.criteria.reconstruction import normalize, require_finite_result, require_problem, without_dead_columns
from recon.criteria.wanda import Wanda
from recon.factorization import cholesky
from recon.patterns import Pattern, Unstructured
from recon.statistics import InputStatistics, Need, full_fp32

Choose = Callable[[int, Tensor], Tensor]
"""The iteration t and the weight W + U to be projected -> the mask."""


@dataclass(frozen=True)
class ADMM(Criterion):
    """Move the weights by ADMM while the mask grows to its sparsity (arXiv 2401.02938, Alg. 1 and Section 3.3).

    An n:m mask has all its zeros from the first iteration on and is only re-chosen. The published code grows it too:
    a fraction of the matrix is pruned, sparing the best n of each group. That is worse on both golden layers (2:4
    .01125 against .01079 and .01004 against .00964), and a group with fewer zeros is no n:m mask yet.

    Args:
        iterations: Of ADMM.
        rho: The penalty on the distance of the two copies, relative to inputs of norm 1.
        damping: Added to the diagonal of G, relative to its mean.
        mask_steps: The first iterations choose the mask anew, the others keep it. 1 takes the mask of Wanda.
    """

    needs: ClassVar[Need] = "gram"
    moves_weights: ClassVar[bool] = True

    iterations: int = 20
    rho: float = 1.0
    damping: float = 0.1
    mask_steps: int = 15

    def __post_init__(self) -> None:
        if not 1 <= self.mask_steps <= self.iterations:
            raise ValueError(
                f"the mask reaches its sparsity in step `mask_steps` of `iterations` and needs 1 <= mask_steps <= "
                f"iterations, got {self.mask_steps} and {self.iterations}; the paper's are 15 and 20"
            )
        _require_penalties(self.rho, self.damping)

    def scores(
        self, weight: Float[Tensor, "out in_"], statistics: InputStatistics | None, name: str
    ) -> Float[Tensor, "out in_"]:
        """Rate each weight by |W_ij| * ||X_j||_2, as the first iteration does.

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

        Iteration t = 0 .. mask_steps - 1 prunes the fraction s_t = s (1 - (1 - (t + 1) / mask_steps)^3) with the
        lowest |W + U| of each row or of the matrix. Counts are rounded down, as in the published code, but the last
        is the pattern's. Weights of inputs that never occurred (G_jj = 0) become zero and are pruned first; those
        that are left over count as kept.

        Args:
            weight: W0, out x in, in any floating-point type; left as it is.
            statistics: With the Gram matrix.
            pattern: Unstructured per row or per matrix, or n:m.
            name: What error messages call the matrix.

        Returns:
            The moved weight, out x in, fp32 and exactly zero where pruned, and the mask, True = kept.

        Raises:
            ValueError: If the pattern does not fit, the weight is not finite, or G + rho I has no Cholesky factor.
            FloatingPointError: If the Gram matrix or the result is not finite.
        """
        G = require_problem(self, weight, statistics, pattern, name)
        W0 = without_dead_columns(weight, G)

        def choose(t: int, W: Tensor) -> Tensor:
            left = (1 - (t + 1) / self.mask_steps) ** 3
            return grown_mask(W.abs(), pattern, 1 - left, name)

        return _admm(G, W0, choose, self.mask_steps, self.iterations, self.rho, self.damping, name)


def fixed_mask(
    gram: Float[Tensor, "in_ in_"],
    weight: Float[Tensor, "out in_"],
    keep: Bool[Tensor, "out in_"],
    iterations: int,
    rho: float,
    damping: float,
    name: str,
) -> Float[Tensor, "out in_"]:
    """Move the weights towards the optimum for a mask (arXiv 2401.02938, Alg. 1).

    Args:
        gram: G, in x in.
        weight: W0, out x in, in any floating-point type.
        keep: M, True = kept.
        iterations: The paper uses 20; 0 only zeroes what is pruned.
        rho: The penalty, relative to inputs of norm 1; the paper's is 1.
        damping: Added to the diagonal of G, relative to its mean; the paper's is 0.1.
        name: What error messages call the matrix.

    Returns:
        The moved weight, out x in, fp32 and exactly zero where pruned. Kept weights of inputs that never occurred
        stay as they are.

    Raises:
        ValueError: If a penalty is out of range or G + rho I has no Cholesky factor.
        FloatingPointError: If an argument or the result is not finite.
    """
    _require_penalties(rho, damping)
    require_finite_result(name, gram=gram, weight=weight)
    return _admm(gram, weight.float(), lambda t, W: keep, 1, iterations, rho, damping, name)[0]


def grown_mask(
    scores: Float[Tensor, "out in_"], pattern: Pattern, progress: float, name: str
) -> Bool[Tensor, "out in_"]:
    """The pattern's mask at `progress` times its sparsity if it is unstructured, at all of it otherwise.

    The count of zeros per row or matrix is rounded down, unless progress is 1: then it is the pattern's.
    """
    if progress >= 1 or not isinstance(pattern, Unstructured):
        return pattern.select(scores, name)
    ranked = scores if pattern.per == "row" else scores.reshape(1, -1)
    num_kept = ranked.shape[1] - math.floor(ranked.shape[1] * pattern.sparsity * progress)
    order = ranked.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, order[:, :num_kept], True).view_as(scores)


def _admm(
    gram: Tensor, W0: Tensor, choose: Choose, mask_steps: int, iterations: int, rho: float, damping: float, name: str
) -> tuple[Tensor, Tensor]:
    """The moved weight and its mask. W is dense, Z has the zeros, U sums up their differences."""
    with torch.no_grad(), full_fp32(W0.device):
        problem = normalize(gram, W0)
        n, G, W = problem.norms, problem.gram, problem.weight
        G.diagonal().add_(damping * G.diagonal().mean())
        Y = W @ G
        G.diagonal().add_(rho)
        P = torch.cholesky_inverse(cholesky(G, 0.0, name).lower)
        U, M = torch.zeros_like(W), choose(0, W)
        for t in range(iterations):
            if 0 < t < mask_steps:
                M = choose(t, W + U)
            Z = (W + U) * M
            U += W - Z
            W = (Y + rho * (Z - U)) @ P
        moved = ((W + U) / n).masked_fill(~M, 0)  # times M would leave negative zeros
        require_finite_result(name, **{"the moved weight": moved})
        return moved, M


def _require_penalties(rho: float, damping: float) -> None:
    if not (rho > 0 and damping >= 0):
        raise ValueError(
            f"ADMM needs rho > 0 and damping >= 0, got {rho} and {damping}; the paper's are 1 and 0.1, relative to "
            "inputs of norm 1"
        )
