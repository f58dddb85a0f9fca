"""The interface of a criterion.

A new criterion is one class with `scores`. A criterion that also moves the surviving weights, as SparseGPT does,
overrides `prune` and sets `moves_weights`.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from recon.calibration.statistics import InputStatistics, Need
from recon.pruning.patterns import Pattern


class Criterion(ABC):
    """A measure of the importance of each weight of a matrix.

    Attributes:
        needs: Input statistics that `scores` and `prune` read.
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
        """Rate every weight; a higher score is more important.

        Args:
            weight: W, out x in, in any floating-point type.
            statistics: Statistics of the inputs of this matrix; None is enough for criteria with `needs = "none"`.
            name: Name of the matrix, for error messages.

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
            statistics: Statistics of the inputs of this matrix.
            pattern: The pattern of zeros; none that ranks across the model.
            name: Name of the matrix, for error messages.

        Returns:
            The weight, out x in - here the one received, with nothing zeroed - and the mask, True = kept.
        """
        return weight, pattern.select(self.scores(weight, statistics, name), name)

    def require_norms(self, statistics: InputStatistics | None, name: str) -> Float[Tensor, "in_"]:
        """Return the norms ||X_j||_2 of the inputs of the matrix `name`.

        Raises:
            ValueError: If there are no statistics.
        """
        return self._required(statistics, "norms", "the norms", name).norms

    def require_gram(self, statistics: InputStatistics | None, name: str) -> Float[Tensor, "in_ in_"]:
        """Return the Gram matrix G = X^T X of the inputs of the matrix `name`.

        Raises:
            ValueError: If it was not collected.
        """
        gram = self._required(statistics, "gram", "the Gram matrix", name).gram
        assert gram is not None
        return gram

    def _required(self, statistics: InputStatistics | None, need: Need, words: str, name: str) -> InputStatistics:
        if statistics is not None and statistics.has_sums and statistics.num_tokens == 0:
            raise ValueError(
                f"{self} needs {words} of the inputs of `{name}`, got no row that the router sends there; choose "
                f"pruning.experts: all, give more calibration sequences, or exclude it with `pruning.exclude`"
            )
        if statistics is None or (need == "gram" and statistics.gram is None):
            raise ValueError(
                f"{self} needs {words} of the inputs of `{name}`, got none; "
                f'run the model inside `collect(..., need="{need}")`'
            )
        return statistics
