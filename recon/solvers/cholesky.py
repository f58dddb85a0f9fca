"""Cholesky factors of Gram matrices, which may be indefinite through rounding and correlated inputs.

A failed factorization is repeated in fp64, then with more damping, with a warning in the log. It is never replaced by
the identity or the diagonal: the methods that read the factor would silently become other methods.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAX_DAMPING = 1.0
"""With as much added to the diagonal as its mean, few correlations are left to read."""

FIRST_DAMPING = 1e-6
"""First value of a damping of zero that fails: a little above the rounding of an fp32 sum."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Factor:
    """L with L L^T = G + damping * mean(diag G) * I.

    Args:
        lower: L, fp32, zero above its diagonal.
        damping: The damping used; larger than the requested one if that failed.
    """

    lower: Float[Tensor, "n n"]
    damping: float


def cholesky(gram: Float[Tensor, "n n"], damping: float, name: str) -> Factor:
    """Factorize a damped Gram matrix in fp32; if that fails in fp64, then with ten times the damping, and so on.

    The first retry keeps the damping, for a matrix is often indefinite through the rounding of fp32 alone.

    Args:
        gram: G, n x n, symmetric; only its lower triangle is read.
        damping: Addition to the diagonal, relative to its mean; may be 0.
        name: Name of the matrix, for messages.

    Raises:
        FloatingPointError: If G holds NaN or Inf.
        ValueError: If the damping is negative, or G is not positive definite even with `MAX_DAMPING`.
    """
    if not damping >= 0:
        raise ValueError(
            f"`damping` is relative to the mean of the diagonal and needs to be >= 0, got {damping} for `{name}`"
        )
    if not bool(gram.isfinite().all()):
        count = int((~gram.isfinite()).sum())
        raise FloatingPointError(
            f"a Cholesky factorization needs finite numbers, got {count} NaN or infinite of {gram.numel()} in the "
            f"Gram matrix of `{name}`; check the calibration inputs of this matrix"
        )
    lower = _try_cholesky(gram.float(), damping)
    if lower is not None:
        return Factor(lower, damping)
    double = gram.double()
    for larger in _dampings(damping):
        lower = _try_cholesky(double, larger)
        if lower is not None:
            _log.warning(
                "the Gram matrix of `%s` has no Cholesky factor in fp32 with damping %g; used fp64 and damping %g",
                name,
                damping,
                larger,
            )
            return Factor(lower, larger)
    raise ValueError(
        "a Cholesky factorization needs a positive definite matrix whose factor fits fp32, got the Gram matrix of "
        f"`{name}`, which has none even in fp64 with damping {max(damping, MAX_DAMPING):g}; use more calibration data "
        "or exclude the matrix with `pruning.exclude`"
    )


def dead_columns(gram: Float[Tensor, "n n"]) -> Bool[Tensor, "n"]:
    """Mark the inputs that were zero in every token: G_jj = 0."""
    return gram.diagonal() == 0


def _dampings(damping: float) -> Iterator[float]:
    """Yield the given damping, then ten times as much each time, at last `MAX_DAMPING`."""
    yield damping
    while damping < MAX_DAMPING:
        damping = min(10 * damping, MAX_DAMPING) if damping > 0 else FIRST_DAMPING
        yield damping


def _try_cholesky(gram: Tensor, damping: float) -> Tensor | None:
    """L in fp32, or None if the matrix has none in its own precision or L does not fit fp32."""
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    lower, info = torch.linalg.cholesky_ex(damped)
    lower = lower.float()
    # LAPACK may report success on an overflow, and a pivot that fp32 rounds to zero cannot be divided by.
    usable = bool(info == 0) and bool(lower.isfinite().all()) and bool((lower.diagonal() > 0).all())
    return lower if usable else None
