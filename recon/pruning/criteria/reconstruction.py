"""The reconstruction problem of SparseFW, ADMM and ALPS: keep the outputs X W^T of one matrix with fewer weights.

Minimise ||X (W - W0)^T||_F^2 = tr((W - W0) G (W - W0)^T) over W with the zeros of a pattern, W0 being dense.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from recon.calibration.statistics import InputStatistics
from recon.pruning.criteria.base import Criterion
from recon.pruning.patterns import Pattern
from recon.pruning.ranking import require_finite
from recon.solvers.cholesky import dead_columns


def require_problem(
    criterion: Criterion,
    weight: Float[Tensor, "out in_"],
    statistics: InputStatistics | None,
    pattern: Pattern,
    name: str,
) -> Float[Tensor, "in_ in_"]:
    """Check pattern and numbers of one matrix, and return the Gram matrix in fp32.

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
    gram = criterion.require_gram(statistics, name)
    require_finite(weight, name)
    G = gram.float()
    require_finite_result(name, **{"the Gram matrix": G})
    return G


def require_finite_result(name: str, **tensors: Tensor) -> None:
    """Refuse NaN and Inf in tensors that come from the calibration inputs of `name`.

    Raises:
        FloatingPointError: If a tensor has any.
    """
    for what, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise FloatingPointError(
                f"finite numbers are needed in fp32, got NaN or Inf in {what} of `{name}`; "
                "check the weights and the calibration inputs of this matrix"
            )


def row_errors(E: Float[Tensor, "out in_"], G: Float[Tensor, "in_ in_"]) -> Float[Tensor, "out"]:
    """e G e^T for each row e of E = W - W0, summed in fp64."""
    return ((E @ G) * E).sum(1, dtype=torch.float64)


def without_dead_columns(weight: Float[Tensor, "out in_"], gram: Float[Tensor, "in_ in_"]) -> Float[Tensor, "out in_"]:
    """Copy W0 to fp32 with zeros where the input never occurred: these weights are pruned first."""
    return weight.float().masked_fill(dead_columns(gram), 0)
