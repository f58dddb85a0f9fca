"""The Gram matrix for a start: half the products of a full one, at the rate of a device's 16-bit or TF32 products.

Sums are in fp32. Inputs of 16 bits are multiplied as they are, so that no product is rounded. Inputs of fp32 are
multiplied in TF32 where the device has it: G then is the Gram matrix of inputs that differ by 2**-11 of each at most,
hence positive semidefinite, and |error of G_ij| <= 2**-10 sqrt(G_ii G_jj), beside the rounding of sums. The bound is
relative to each input's own norm, so large inputs take no precision from small ones.
"""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from recon.calibration.statistics import fp32_products

COLUMNS = 2048
"""Columns of G that one product adds to, from their diagonal downwards. A GPU is idle in part with fewer: 2048 x 2048
are 128 tiles of 128 x 256, and an H100 works on 132 at a time."""


class StartGram:
    """Adds tokens to the columns of a Gram matrix from the diagonal downwards, and mirrors them in the end.

    Args:
        total: G, zeros.
    """

    def __init__(self, total: Float[Tensor, "n n"]) -> None:
        self.total = total
        self._is_whole = True

    def add(self, tokens: Float[Tensor, "token n"]) -> None:
        """Add the tokens, in their own precision."""
        self._is_whole = False
        device, as_they_are = tokens.device, tokens.dtype.itemsize == 2 and has_16_bit_products(str(tokens.device))
        tokens = tokens if as_they_are else tokens.float()
        with fp32_products(device, "tf32"):
            for first, last in self._panels():
                rows, columns = tokens[:, first:].T, tokens[:, first:last]
                if as_they_are:
                    self.total[first:, first:last] += torch.mm(rows, columns, out_dtype=torch.float32)
                else:
                    self.total[first:, first:last].addmm_(rows, columns)

    def finish(self) -> None:
        """Mirror the lower part of G."""
        if self._is_whole:
            return
        for first, last in self._panels():
            self.total[first:last, last:] = self.total[last:, first:last].T
        self._is_whole = True

    def _panels(self) -> list[tuple[int, int]]:
        width = len(self.total)
        return [(first, min(first + COLUMNS, width)) for first in range(0, width, COLUMNS)]


def products(width: int) -> int:
    """Count the multiplications that a token takes, of a Gram matrix of `width` inputs."""
    return sum(min(COLUMNS, width - first) * (width - first) for first in range(0, width, COLUMNS))


@cache
def has_16_bit_products(device: str) -> bool:
    """Whether the device multiplies 16-bit matrices with sums and a result in fp32; torch has that for CUDA alone."""
    one = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
    try:
        return torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (NotImplementedError, RuntimeError):
        return False
