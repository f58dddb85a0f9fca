"""Random: all weights are equally important. The floor that a criterion has to beat."""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from recon.calibration.statistics import InputStatistics, Need
from recon.pruning.criteria.base import Criterion


@dataclass(frozen=True)
class Random(Criterion):
    """Scores uniform in [0, 1), the same for a matrix on every device and in every order of pruning.

    Args:
        seed: Another seed gives another mask.
    """

    needs: ClassVar[Need] = "none"

    seed: int = 0

    def scores(
        self, weight: Float[Tensor, "out in_"], statistics: InputStatistics | None, name: str
    ) -> Float[Tensor, "out in_"]:
        """Draw the scores of the matrix `name`."""
        # hash() of a string differs from process to process; a hash of the bytes does not.
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.rand(weight.shape, generator=generator, dtype=torch.float32).to(weight.device)
