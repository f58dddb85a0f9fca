"""The interface of a criterion that rates whole experts, for patterns that remove experts."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NoReturn

from jaxtyping import Float
from torch import Tensor

from recon.calibration.statistics import InputStatistics, Need
from recon.pruning.criteria.base import Criterion


@dataclass
class Routing:
    """What a mixture did with the calibration tokens.

    Args:
        tokens: Number of tokens that the router sent to each expert.
        weighted_norms: Sum over these tokens of the gate value times the norm of the expert's output.
    """

    tokens: Float[Tensor, "experts"]
    weighted_norms: Float[Tensor, "experts"]


class ExpertCriterion(Criterion):
    """A measure of the importance of each expert of a mixture.

    Attributes:
        needs_outputs: Whether it reads `Routing.weighted_norms`, which take one more pass through the experts.
    """

    needs: ClassVar[Need] = "none"
    needs_outputs: ClassVar[bool] = False

    @abstractmethod
    def rate(self, routing: Routing) -> Float[Tensor, "experts"]:
        """Rate every expert; a higher score is more important."""

    def scores(self, weight: Tensor, statistics: InputStatistics | None, name: str) -> NoReturn:
        """Refuse to rate weights.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"criterion {self} rates whole experts, got the weights of `{name}`; choose pattern experts, or a "
            f"criterion of weights, such as wanda"
        )
