"""OWL: a block keeps more weights if more of its scores stand out (arXiv 2310.05175)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recon.calibration.activations import Activations
from recon.calibration.statistics import InputStatistics
from recon.models.matrices import Matrix
from recon.pruning.allocation.base import Allocation
from recon.pruning.criteria import Criterion, Wanda
from recon.pruning.patterns import Unstructured


@dataclass(frozen=True)
class OWL(Allocation):
    """Densities from the outliers among Wanda's scores (arXiv 2310.05175, Section 3.3), whatever the criterion.

    D_l is the fraction of the scores of block l, all its matrices together, that are above M times their mean. Block l
    keeps 2 lambda (D_l - min D) / (max D - min D) - mean + 1 - s of its weights, where mean is that of the first term
    over the blocks, weighted with their numbers of weights. Blocks whose D are all the same keep 1 - s.

    On some models it hurts, the bundled one among them: measure. It takes one more forward pass over the calibration
    sequences, through the dense model.

    Args:
        lambda_: Densities span 2 lambda; the paper's is 0.08.
        M: Threshold of an outlier, as a multiple of the mean; the paper's is 5.
    """

    lambda_: float = 0.08
    M: float = 5.0

    def __post_init__(self) -> None:
        if not (0 < self.lambda_ < 0.5 and self.M > 0):
            raise ValueError(
                f"OWL needs 0 < lambda_ < 0.5 and M > 0, got {self.lambda_} and {self.M}; the paper's are 0.08 and 5"
            )

    def densities(
        self,
        walk: Activations,
        matrices: Sequence[Mapping[str, Matrix]],
        criterion: Criterion,
        pattern: Unstructured,
    ) -> dict[int, float]:
        """See `Allocation.densities`.

        Raises:
            ValueError: If a density is not between 0 and 1.
        """
        shares, sizes = {}, {}
        for block, members in enumerate(matrices):
            if members:
                statistics = walk.enter([block], members, "norms")
                shares[block], sizes[block] = outlier_share(members, statistics, self.M)
        least, span = min(shares.values()), max(shares.values()) - min(shares.values())
        term = {block: 2 * (share - least) / span if span else 0.0 for block, share in shares.items()}
        mean = sum(term[block] * size for block, size in sizes.items()) / sum(sizes.values())
        above = {block: one - mean for block, one in term.items()}  # the density above 1 - s, in units of lambda
        densities = {block: self.lambda_ * one + pattern.density for block, one in above.items()}
        if not all(0 < density <= 1 for density in densities.values()):
            fitting = min(
                (pattern.sparsity if one > 0 else pattern.density) / abs(one) for one in above.values() if one
            )
            raise ValueError(
                f"OWL needs densities between 0 and 1, got {min(densities.values()):.3f} to "
                f"{max(densities.values()):.3f} with lambda_ {self.lambda_} at {pattern}; set "
                f"`pruning.allocation.lambda_` below {fitting:.3g}"
            )
        return densities


def outlier_share(
    matrices: Mapping[str, Matrix], statistics: Mapping[str, InputStatistics], M: float
) -> tuple[float, int]:
    """Return the fraction of Wanda's scores above M times their mean, over `matrices` together, and their number."""

    def total(measure: str, threshold: float = 0.0) -> float:
        """Compute scores anew for each sum rather than hold them: those of a block are twice its weights in 16 bits."""
        result = 0.0
        for name, matrix in matrices.items():
            scores = Wanda().scores(matrix.weight, statistics[name], name)
            result += scores.double().sum().item() if measure == "sum" else int((scores > threshold).sum())
        return result

    num_scores = sum(matrix.weight.numel() for matrix in matrices.values())
    mean = total("sum") / num_scores
    return total("outliers", M * mean) / num_scores, num_scores
