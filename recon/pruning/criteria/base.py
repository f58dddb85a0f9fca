"""The contract of a criterion.

A new criterion is one class with `scores`. Those that also move the surviving weights, as SparseGPT does,
override `prune` and set `moves_weights`.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from recon.calibration.statistics import InputStatistics, Need
from recon.pruning.patterns import Pattern


class Criterion(ABC):
    """How much each weight of a matrix matters.

    Attributes:
        needs: Which input statistics `scores` and `prune` read.
        moves_weights: Whether `prune` changes surviving weights.
    """

    needs: ClassVar[Need]
    moves_weights: ClassVar[bool] = False

    def __str__(self) -> str:
        return type(self).__name__.lower()

    @abstractmethod
    def scores(
        self, weight: Float[Tensor, "out in_"], statistics: InputStatistics | None, name: str
    ) -> Float[Tensor, "out in_"]:
        """Rate every weight; higher matters more.

        Args:
            weight: W, out x in, in any floating-point type.
            statistics: Of the inputs of this matrix; None is enough for criteria with `needs = "none"`.
            name: What error messages call the matrix.

        Returns:
            fp32 scores, out x in.
        """

    def prune(
        self,
        weight: Float[Tensor, "out in_"],
        statistics: InputStatistics | None,
        pattern: Pattern,
        name: str,
    ) -> tuple[Float[Tensor, "out in_"], Bool[Tensor, "out in_"]]:
        """Choose the survivors of one matrix.

        Args:
            weight: W, out x in.
            statistics: Of the inputs of this matrix.
            pattern: Which zeros are allowed; one that does not rank across the model.
            name: What error messages call the matrix.

        Returns:
            The weight, out x in - here the one received, with nothing zeroed - and the mask, True = kept.
        """
        return weight, pattern.select(self.scores(weight, statistics, name), name)
