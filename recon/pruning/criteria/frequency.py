"""Frequency: an expert matters as much as the router asks for it. The floor that REAP has to beat."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from recon.pruning.criteria.experts import ExpertCriterion, Routing


@dataclass(frozen=True)
class Frequency(ExpertCriterion):
    """The number of calibration tokens that the router sends to an expert."""

    def rate(self, routing: Routing) -> Float[Tensor, "experts"]:
        """See `ExpertCriterion.rate`."""
        return routing.tokens
