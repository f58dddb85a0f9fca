"""Wanda: a weight is important if it and its input are large (arXiv 2306.11695)."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from recon.calibration.statistics import InputStatistics, Need
from recon.pruning.criteria.base import Criterion


class Wanda(Criterion):
    """Score |W_ij| * ||X_j||_2 (arXiv 2306.11695, eq. 1); the paper compares within each row."""

    needs: ClassVar[Need] = "norms"

    def scores(
        self, weight: Float[Tensor, "out in_"], statistics: InputStatistics | None, name: str
    ) -> Float[Tensor, "out in_"]:
        """Rate each weight by its magnitude times the norm of its input."""
        return weight.float().abs() * self.require_norms(statistics, name)
