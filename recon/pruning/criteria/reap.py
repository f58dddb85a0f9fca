"""REAP: an expert matters as much as what it adds to the output of its mixture.

REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression, ICLR 2026 (arXiv 2510.13999). Gate values are those
that the model multiplies with: normalised over the chosen experts where it does that.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from recon.pruning.criteria.experts import ExpertCriterion, Routing


@dataclass(frozen=True)
class REAP(ExpertCriterion):
    """Router-weighted expert activation: S_j is the mean of g_j(x) ||f_j(x)||_2 over the tokens routed to expert j.

    An expert without a token has the lowest score, 0.
    """

    needs_outputs: ClassVar[bool] = True

    def rate(self, routing: Routing) -> Float[Tensor, "experts"]:
        """See `ExpertCriterion.rate`."""
        return routing.weighted_norms / routing.tokens.clamp(min=1)
