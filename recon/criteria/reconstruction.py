"""The problem that SparseFW, ADMM and ALPS solve: of one matrix, keep the outputs X W^T with fewer weights.

Minimise ||X (W - W0)^T||_F^2 = tr((W - W0) G (W - W0)^T) over W with the zeros of a pattern, W0 being dense.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from recon.criteria.base import Criterion
from recon.factorization import dead_columns
from recon.patterns import Pattern, require_finite
from recon.statistics import InputStatistics


def require_problem(
    criterion: Criterion,
    weight: Float[Tensor, "out in_"],
    statistics: InputStatistics | None,
    pattern: Pattern,
    name: str,
) -> Float[Tensor, "in_ in_"]:
    """The Gram matrix in fp32, once the pattern allows to choose within this matrix and all numbers are finite.

    Raises:
        ValueError: If there is no Gram matrix, the pattern ranks across the model or the weight is not finite.
        FloatingPointError: If the Gram matrix is not finite.
    """
    if pattern.across_model:
        raise ValueError(
            f"{criterion} chooses the mask of a matrix as a whole, not by scores that other matrices could compete "
            f"with, and needs a pattern per row, matrix or group, got {pattern} for `{name}`; set `pattern.per` to "
            '"row" or "matrix", or choose a criterion that only scores, such as wanda'
        )
    if statistics is None or statistics.gram is None:
        raise ValueError(
            f"{criterion} needs the Gram matrix of the inputs of `{name}`, got none; "
            'run the model inside `collect(..., need="gram")`'
        )
    require_finite(weight, name)
    G = statistics.gram.float()
    require_finite_result(name, **{"the Gram matrix": G})
    return G


def require_finite_result(name: str, **tensors: Tensor) -> None:
    """Refuse NaN and Inf in what was computed from the calibration inputs of `name`."""
    for what, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise FloatingPointError(
                f"finite numbers are needed in fp32, got NaN or Inf in {what} of `{name}`; "
                "check the weights and the calibration inputs of this matrix"
            )


def row_errors(E: Float[Tensor, "out in_"], G: Float[Tensor, "in_ in_"]) -> Float[Tensor, "out"]:
    """e G e^T for each row e of E = W - W0, summed in fp64."""
    return ((E @ G) * E).sum(1, dtype=torch.float64)


@dataclass(frozen=True)
class Normalized:
    """The same problem in units in which every input has norm 1, as ADMM and ALPS see it.

    |W| then is the score of Wanda, and one penalty rho suits all columns.

    Args:
        norms: n = sqrt(diag G), 1 where an input never occurred (G_jj = 0).
        gram: G / (n n^T).
        weight: W0 * n.
    """

    norms: Float[Tensor, "in_"]
    gram: Float[Tensor, "in_ in_"]
    weight: Float[Tensor, "out in_"]


def normalize(gram: Float[Tensor, "in_ in_"], weight: Float[Tensor, "out in_"]) -> Normalized:
    """Scale the columns of W0 and the rows and columns of G, in fp32."""
    G = gram.float()
    n = torch.where(dead_columns(G), 1.0, G.diagonal().sqrt())
    return Normalized(norms=n, gram=G / n / n[:, None], weight=weight.float() * n)


def without_dead_columns(weight: Float[Tensor, "out in_"], gram: Float[Tensor, "in_ in_"]) -> Float[Tensor, "out in_"]:
    """W0 in fp32 with zeros where the input never occurred, so that these weights are pruned first."""
    return weight.float().masked_fill(dead_columns(gram), 0)
