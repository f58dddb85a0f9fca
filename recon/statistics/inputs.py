"""What is known about the inputs X (tokens x in) of one matrix."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

Need = Literal["none", "norms", "gram"]


@dataclass
class InputStatistics:
    """Sums over the tokens that entered one matrix, in fp32.

    Args:
        num_tokens: Number of rows of X.
        sum_squares: sum_t X_tj^2 for each input j; None unless collected.
        gram: G = X^T X; None unless collected.
        cross: C = X_d^T X, X_d being what enters the matrix in the dense model; None unless collected by pairs.
        dense_gram: G_d = X_d^T X_d; with `cross` only.
    """

    num_tokens: int
    sum_squares: Float[Tensor, "in_"] | None = None
    gram: Float[Tensor, "in_ in_"] | None = None
    cross: Float[Tensor, "in_ in_"] | None = None
    dense_gram: Float[Tensor, "in_ in_"] | None = None

    @property
    def norms(self) -> Float[Tensor, "in_"]:
        """||X_j||_2 for each input j, from the sums of squares or the diagonal of G."""
        if self.sum_squares is not None:
            return self.sum_squares.sqrt()
        if self.gram is not None:
            return self.gram.diagonal().sqrt()
        raise ValueError('norms need statistics collected with need="norms" or need="gram", got neither')
