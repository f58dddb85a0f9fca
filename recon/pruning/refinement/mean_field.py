"""Conditional variances of inputs given a random part of the others, for all rows of a matrix at once.

The exact cost of an exchange needs the inverse of the Gram matrix on each row's support: for 2048 x 2048 weights at
half density more than 200 products of that size, and 8 GiB. But all rows have supports of about the same density f.
Over random supports T of density f, (G_TT)^-1, filled up with zeros, is on average near K = (G + diag(L))^-1, with
noise L that hides as much of each input as its absence does: L_j = (1 - f) / K_jj. An input's variance given the others
in T is f / K_jj.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ITERATIONS = 4
"""Of the fixed point L. On golden layer b, the variances then are within 2 % of their means over 20 random supports."""

FACTORIZATIONS = ITERATIONS + 1
"""Number of factorizations with their inverses."""

MAX_RATIO = 0.9
"""Of two steps of the fixed point, whose geometric series is summed up."""


@dataclass(frozen=True)
class MeanField:
    """The average support of a density.

    Args:
        inverse: K.
        noise: L.
        variances: f / K_jj.
    """

    inverse: Float[Tensor, "in_ in_"]
    noise: Float[Tensor, "in_"]
    variances: Float[Tensor, "in_"]

    @classmethod
    def of(cls, G: Float[Tensor, "in_ in_"], density: float) -> "MeanField":
        """Solve for K and L by iteration; every second step is extended by its geometric series.

        Args:
            G: Positive definite.
            density: f, 0 < f < 1.
        """
        noise, first = (1 - density) * G.diagonal(), 0.0
        for iteration in range(ITERATIONS):
            found = (1 - density) / _inverse(G, noise).diagonal()
            step = float((found / noise).log().mean())
            if iteration % 2 and first:
                ratio = min(max(step / first, 0.0), MAX_RATIO)
                found = found * math.exp(step * ratio / (1 - ratio))
            noise, first = found, step
        inverse = _inverse(G, noise)
        return cls(inverse, noise, density / inverse.diagonal())

    def covariances(self, chosen: Int[Tensor, "rows m"], usable: Bool[Tensor, "rows m"]) -> Float[Tensor, "rows m m"]:
        """Compute the covariances of the chosen inputs of each row given the rest of the average support.

        Args:
            chosen: Indices of inputs.
            usable: The others count as independent, with variance 1; they may repeat an index.
        """
        both = usable[:, :, None] & usable[:, None]
        inverse = submatrices(self.inverse, chosen) * both + torch.diag_embed((~usable).float())
        A = torch.linalg.inv(inverse)
        A.diagonal(dim1=1, dim2=2).sub_(self.noise[chosen] * usable)
        return A


def submatrices(G: Float[Tensor, "in_ in_"], chosen: Int[Tensor, "rows m"]) -> Float[Tensor, "rows m m"]:
    """Take the rows and columns of a matrix that are chosen, for each row of `chosen`."""
    return G[chosen[:, :, None], chosen[:, None]]


def _inverse(G: Tensor, noise: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(G + noise.diag()))
