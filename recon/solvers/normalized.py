"""The problem of a matrix in the units of ADMM and ALPS, in which every input has norm 1.

|W| then is the score of Wanda, and one penalty rho suits all columns.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from recon.solvers.cholesky import dead_columns


@dataclass(frozen=True)
class Normalized:
    """A Gram matrix and a weight in these units.

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
