"""Statistics of the inputs X (tokens x in) of one matrix, and the precision of products of fp32 matrices."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Need = Literal["none", "norms", "start gram", "gram"]
"""Statistics to collect: none, norms, the Gram matrix for a start (`gram.py`), or the one in full fp32."""

Products = Literal["fp32", "tf32"]
"""Precision of products of fp32 matrices, whose sums are in fp32.

- `fp32`: full fp32.
- `tf32`: both factors are rounded to 11 significant bits, a relative error of at most 2**-11 (4.9e-4), on a device with
  TF32 (NVIDIA's since Ampere), where a product takes an eighth of the time. Elsewhere, above all on a CPU, as `fp32`.
"""


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
    def has_sums(self) -> bool:
        """Whether anything was collected."""
        return self.sum_squares is not None or self.gram is not None

    @property
    def norms(self) -> Float[Tensor, "in_"]:
        """||X_j||_2 for each input j, from the sums of squares or the diagonal of G."""
        if self.sum_squares is not None:
            return self.sum_squares.sqrt()
        if self.gram is not None:
            return self.gram.diagonal().sqrt()
        raise ValueError('norms need statistics collected with need="norms" or need="gram", got neither')


def full_fp32(device: torch.device) -> AbstractContextManager[None]:
    """Compute fp32 products in fp32 within the context: no autocast, no TF32, whatever the caller has chosen.

    With TF32 a Gram matrix has three digits and conjugate gradients stall at 1e-3.
    """
    return fp32_products(device, "fp32")


@contextmanager
def fp32_products(device: torch.device, products: Products) -> Iterator[None]:
    """Compute products of fp32 matrices as `products` says within the context, whatever the caller has chosen."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    chosen = [backend.fp32_precision for backend in backends]
    try:
        for backend, precision in zip(backends, ("tf32" if products == "tf32" else "ieee", "ieee"), strict=True):
            backend.fp32_precision = precision
        with torch.autocast(device_type=device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, chosen, strict=True):
            backend.fp32_precision = precision
