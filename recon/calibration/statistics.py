"""Statistics of the inputs X (tokens x in) of one matrix, and the precision of their sums."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
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
        cross: C = X_d^T X, X_d being the inputs of the matrix in the dense model; None unless collected by pairs.
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


@contextmanager
def full_fp32(device: torch.device) -> Iterator[None]:
    """Compute fp32 products in fp32 within the context: no autocast, no TF32, whatever the caller has chosen.

    With TF32 a Gram matrix has three digits and conjugate gradients stall at 1e-3.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    chosen = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type=device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, chosen, strict=True):
            backend.fp32_precision = precision
