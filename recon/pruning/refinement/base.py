"""The interface of a refinement, and the criterion that it makes of another one.

A refinement takes the mask that a criterion chose and improves it with the Gram matrix of the inputs. Each row, or each
group of an n:m pattern, keeps its count.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from recon.calibration.statistics import InputStatistics, Need
from recon.pruning.criteria import Criterion
from recon.pruning.patterns import NM, Pattern


class Refinement(ABC):
    """An improvement of masks."""

    def __str__(self) -> str:
        return type(self).__name__.lower()

    @property
    @abstractmethod
    def moves_weights(self) -> bool:
        """Whether `refine` returns other weights than those it got."""

    @abstractmethod
    def refine(
        self,
        dense: Float[Tensor, "out in_"],
        gram: Float[Tensor, "in_ in_"],
        weight: Float[Tensor, "out in_"],
        keep: Bool[Tensor, "out in_"],
        group: int | None,
        name: str,
    ) -> tuple[Float[Tensor, "out in_"], Bool[Tensor, "out in_"]]:
        """Improve the mask of one matrix.

        Args:
            dense: W0, out x in, in any floating-point type; left as it is.
            gram: G = X^T X.
            weight: The weight as the criterion left it; the dense one if it moves none.
            keep: The criterion's mask, True = kept.
            group: Number of consecutive inputs within which weights are exchanged; None for the whole row.
            name: Name of the matrix, for error messages.

        Returns:
            The weight, and the mask with the same number of survivors in each row and group.
        """


@dataclass(frozen=True)
class Refined(Criterion):
    """A criterion whose masks are refined.

    Args:
        criterion: Chooses the masks.
        refinement: Improves them.
    """

    needs: ClassVar[Need] = "gram"

    criterion: Criterion
    refinement: Refinement

    def __str__(self) -> str:
        return f"{self.criterion} + {self.refinement}"

    @property
    def moves_weights(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the criterion or the refinement changes surviving weights."""
        return self.criterion.moves_weights or self.refinement.moves_weights

    def scores(
        self, weight: Float[Tensor, "out in_"], statistics: InputStatistics | None, name: str
    ) -> Float[Tensor, "out in_"]:
        """Rate each weight as the criterion does."""
        return self.criterion.scores(weight, statistics, name)

    def prune(
        self, weight: Float[Tensor, "out in_"], statistics: InputStatistics | None, pattern: Pattern, name: str
    ) -> tuple[Float[Tensor, "out in_"], Bool[Tensor, "out in_"]]:
        """Choose the survivors of one matrix and improve the choice; see `Criterion.prune`."""
        after, keep = self.criterion.prune(weight, statistics, pattern, name)
        return self.refine(weight, statistics, after, keep, pattern, name)

    def refine(
        self,
        dense: Float[Tensor, "out in_"],
        statistics: InputStatistics | None,
        weight: Float[Tensor, "out in_"],
        keep: Bool[Tensor, "out in_"],
        pattern: Pattern,
        name: str,
    ) -> tuple[Float[Tensor, "out in_"], Bool[Tensor, "out in_"]]:
        """Improve a mask that was chosen under `pattern`; see `Refinement.refine`."""
        gram = self.require_gram(statistics, name)
        group = pattern.of if isinstance(pattern, NM) else None
        return self.refinement.refine(dense, gram, weight, keep, group, name)


def refined(criterion: Criterion | None, refinement: Refinement | None) -> Criterion | None:
    """Return the criterion, with its masks refined if there is a refinement.

    Raises:
        ValueError: If there is a refinement without a criterion.
    """
    if refinement is None:
        return criterion
    if criterion is None:
        raise ValueError(
            f"refinement: {refinement} improves a criterion's masks, got no criterion; give one or drop it"
        )
    return Refined(criterion, refinement)
