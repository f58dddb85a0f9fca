"""Magnitude: large weights are important. The baseline without data."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from recon.calibration.statistics import InputStatistics, Need
from recon.pruning.criteria.base import Criterion


class Magnitude(Criterion):
    """Score |W_ij|."""

    needs: ClassVar[Need] = "none"

    def scores(
        self, weight: Float[Tensor, "out in_"], statistics: InputStatistics | None, name: str
    ) -> Float[Tensor, "out in_"]:
        """Rate each weight by its absolute value."""
        return weight.float().abs()
