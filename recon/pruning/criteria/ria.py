"""RIA: a weight is important if it is a large part of its row and column, and its input is large (Plug-and-Play)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from recon.calibration.statistics import InputStatistics, Need
from recon.pruning.criteria.base import Criterion


@dataclass(frozen=True)
class RIA(Criterion):
    """Score (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2^a ("Plug-and-Play", ICLR 2024).

    Wanda can lose a whole input or output whose weights are all small; the relative importance keeps a part of it.

    Args:
        exponent: a. 0 ignores the inputs, 1 weighs them as Wanda does; the paper uses 0.5.
    """

    needs: ClassVar[Need] = "norms"

    exponent: float = 0.5

    def __post_init__(self) -> None:
        if not self.exponent >= 0:
            raise ValueError(
                f"`exponent` needs to be >= 0, got {self.exponent}; a negative one would prefer inputs that are zero"
            )

    def scores(
        self, weight: Float[Tensor, "out in_"], statistics: InputStatistics | None, name: str
    ) -> Float[Tensor, "out in_"]:
        """Rate each weight by its part of its input's and its output's weights, times a power of its input's norm."""
        norms = self.require_norms(statistics, name)
        magnitude = weight.float().abs()
        relative = _share(magnitude, magnitude.sum(0, keepdim=True)) + _share(magnitude, magnitude.sum(1, keepdim=True))
        return relative * norms**self.exponent


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """The quotient; 0 / 0 is 0, for weights of a row or column without any are all alike."""
    return torch.where(whole > 0, part / whole, part)
