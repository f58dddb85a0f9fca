"""The interface of an allocation: a density for every block, and the exact counts of zeros that follow.

A new allocation is one class with `densities`. The model as a whole loses exactly the pattern's number of weights,
whatever the densities are.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction

from recon.calibration.activations import Activations
from recon.models.matrices import Matrix
from recon.pruning.criteria import Criterion
from recon.pruning.patterns import Counted, Pattern, Unstructured


class Allocation(ABC):
    """The fraction of its weights that each block keeps."""

    def __str__(self) -> str:
        return type(self).__name__.lower()

    @abstractmethod
    def densities(
        self,
        walk: Activations,
        matrices: Sequence[Mapping[str, Matrix]],
        criterion: Criterion,
        pattern: Unstructured,
    ) -> dict[int, float]:
        """Choose a density for every block that has matrices to prune.

        Args:
            walk: The dense model and calibration sequences, before the first block; may be walked once.
            matrices: For each block, name of the weight -> the matrix to prune; may be none.
            criterion: The criterion that chooses the survivors later.
            pattern: Per row or per matrix; its density is that of all blocks together.

        Returns:
            Index of the block -> the fraction of weights it keeps. Their mean, weighted with the numbers of weights,
            is the pattern's density; rounding is left to `spread`.
        """

    def require(self, pattern: Pattern) -> Unstructured:
        """Return `pattern` if blocks can differ under it.

        Raises:
            ValueError: If they cannot.
        """
        if not isinstance(pattern, Unstructured) or pattern.across_model:
            raise ValueError(
                f"pruning.allocation: {self} gives each block a density of its own and needs an unstructured pattern "
                f'per row or per matrix, got {pattern}; set `pattern` to Unstructured with `pattern.per` "row" or '
                f'"matrix", or `pruning.allocation` to null'
            )
        return pattern

    def patterns(
        self,
        walk: Activations,
        matrices: Sequence[Mapping[str, Matrix]],
        criterion: Criterion,
        pattern: Pattern,
    ) -> list[Counted]:
        """Make a pattern for every block; all together have as many zeros as `pattern` over all weights.

        Args:
            walk: As in `densities`.
            matrices: As in `densities`.
            criterion: The criterion that chooses the survivors later.
            pattern: Unstructured, per row or per matrix.

        Returns:
            One pattern for each block, in order.

        Raises:
            ValueError: If blocks cannot differ under `pattern`, or so many zeros leave a row without a weight.
        """
        pattern = self.require(pattern)
        shapes = [{name: matrix.shape for name, matrix in members.items()} for members in matrices]
        num_weights = sum(count(members) for members in shapes)
        chosen = self.densities(walk, matrices, criterion, pattern)
        densities = [chosen[block] if members else 1.0 for block, members in enumerate(shapes)]
        return spread(densities, shapes, num_weights - pattern.num_kept(num_weights), pattern)


def spread(
    densities: Sequence[float],
    shapes: Sequence[Mapping[str, tuple[int, int]]],
    num_zeros: int,
    pattern: Unstructured,
) -> list[Counted]:
    """Distribute exactly `num_zeros` zeros among matrices, as near to the densities of their blocks as rows allow.

    Each matrix gets the same whole number of zeros in each row, and the rest of the rounding passes to the next matrix.
    The last rest goes to the last matrix, whose rows then differ by one zero, and to matrices before it if necessary.
    Per matrix there is hardly a rest, for any number is whole.

    Args:
        densities: Density of each block.
        shapes: For each block, name of the weight -> (out, in).
        num_zeros: Zeros of all matrices together.
        pattern: Per row or per matrix; nothing else of it is used.

    Returns:
        One pattern for each block, in order.

    Raises:
        ValueError: If so many zeros would leave a row, or a matrix, without a weight.
    """
    assert pattern.per != "model", pattern
    unit = {name: out if pattern.per == "row" else 1 for members in shapes for name, (out, _) in members.items()}
    most = {name: out * in_ - unit[name] for members in shapes for name, (out, in_) in members.items()}
    if num_zeros > sum(most.values()):
        raise ValueError(
            f"every {pattern.per} needs to keep a weight, which allows {sum(most.values())} zeros in these matrices, "
            f"got {num_zeros} to share out; lower `pattern.sparsity` or exclude the narrowest with `pruning.exclude`"
        )
    zeros: dict[str, int] = {}
    left_over = Fraction(0)
    for density, members in zip(densities, shapes, strict=True):
        for name, (out, in_) in members.items():
            due = (1 - Fraction(density)) * out * in_ + left_over
            whole = most[name] // unit[name]
            zeros[name] = unit[name] * min(max(round(due / unit[name]), 0), whole)
            left_over = due - zeros[name]
    missing = num_zeros - sum(zeros.values())
    for name in reversed(zeros):
        change = min(max(missing, -zeros[name]), most[name] - zeros[name])
        zeros[name] += change
        missing -= change
    return [Counted({name: zeros[name] for name in members}, count(members), pattern.per) for members in shapes]


def count(shapes: Mapping[str, tuple[int, int]]) -> int:
    """Count the weights of matrices with these shapes."""
    return sum(out * in_ for out, in_ in shapes.values())
