"""Patterns: positions and number of the zeros.

A pattern turns scores into a mask with an exact number of zeros; among equal scores it keeps the weight with the lower
index. `Unstructured` and `NM` give every matrix the same density, `Counted` gives each its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from recon.pruning.competition import Competition
from recon.pruning.ranking import keep_highest, require_finite

Per = Literal["row", "matrix", "model"]


class Pattern(ABC):
    """A rule for the survivors of a matrix, or of all matrices together."""

    @property
    @abstractmethod
    def density(self) -> float:
        """The fraction of weights kept, before it is rounded to a count."""

    @property
    def across_model(self) -> bool:
        """Whether matrices compete with each other; only `competition` and `select_all` can choose then."""
        return self.competition() is not None

    def competition(self) -> Competition | None:
        """Begin to choose among the weights of all matrices together; None if matrices do not compete."""
        return None

    @abstractmethod
    def select(self, scores: Float[Tensor, "out in_"], name: str = "the matrix") -> Bool[Tensor, "out in_"]:
        """Choose the survivors of one matrix.

        Args:
            scores: Importance of each weight, out x in; higher is kept.
            name: Name of the matrix, for error messages.

        Returns:
            The mask, out x in, True = kept.

        Raises:
            ValueError: If a score is NaN or infinite, or the pattern does not fit the matrix.
        """

    def require(self, name: str, num_rows: int, num_columns: int) -> None:  # noqa: B027 -- all matrices fit
        """Refuse a matrix that the pattern does not fit, before any is scored; by default all fit.

        Args:
            name: Parameter name of the matrix.
            num_rows: Number of outputs.
            num_columns: Number of inputs.

        Raises:
            ValueError: If the pattern cannot be kept, or leaves no weight.
        """

    def parts(self, name: str, num_rows: int, num_columns: int) -> list[tuple[slice, "Pattern"]]:
        """List the patterns of one matrix with their rows; by default this pattern for all rows.

        Args:
            name: Parameter name of the matrix.
            num_rows: Number of outputs.
            num_columns: Number of inputs.

        Returns:
            Slices of rows, in order and together all rows, each with its pattern.
        """
        return [(slice(None), self)]

    def kept_in(self, num_rows: int, num_columns: int) -> tuple[int, int] | None:
        """Count the survivors among weights that compete within a matrix.

        Args:
            num_rows: Number of outputs.
            num_columns: Number of inputs.

        Returns:
            A number of consecutive weights, row-major, and how many of each such run survive; None if the pattern
            does not say so.
        """
        return None

    def select_all(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Choose the survivors of several matrices, each on its own or all together.

        Args:
            scores: Matrix name -> scores, each out x in.

        Returns:
            Matrix name -> mask, each out x in, True = kept, in the order received.
        """
        if (competition := self.competition()) is None:
            return {name: self.select(matrix, name) for name, matrix in scores.items()}
        for take in (competition.count, competition.mark):
            for name, matrix in scores.items():
                take(name, matrix)
        return dict(competition.masks())


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Zeros anywhere, exactly `round(sparsity * n)` of them among the n weights of a row, matrix or model.

    The product is exact for the decimal that was written (0.35 * 10 is 3.5), and a half is rounded to the
    even neighbour as Python's `round` does.

    Args:
        sparsity: The fraction of weights to prune, 0 <= sparsity < 1.
        per: Weights that compete: those of each output "row", of each "matrix", or of the "model".
    """

    sparsity: float = 0.6
    per: Per = "row"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"`sparsity` is the fraction of weights to prune and needs 0 <= sparsity < 1, "
                f"got {self.sparsity}; write 60 % as 0.6"
            )
        if self.per not in get_args(Per):
            raise ValueError(f"`per` needs to be one of {', '.join(get_args(Per))}, got {self.per!r}")

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g}% per {self.per}"

    @property
    def density(self) -> float:
        """The fraction of weights kept, before it is rounded to a count."""
        return 1 - self.sparsity

    def competition(self) -> Competition | None:
        """As `Pattern.competition`, for `per="model"`."""
        return Competition(self.num_kept) if self.per == "model" else None

    def num_kept(self, num_weights: int) -> int:
        """Count the survivors among `num_weights` competing weights."""
        return num_weights - round(Fraction(str(self.sparsity)) * num_weights)

    def num_competing(self, num_rows: int, num_columns: int) -> int:
        """Count the weights of a matrix that compete with each other: those of a row, or all."""
        return num_columns if self.per == "row" else num_rows * num_columns

    def require(self, name: str, num_rows: int, num_columns: int) -> None:
        """Refuse a matrix with so few weights that all of a row or of the matrix would be pruned."""
        num_weights = self.num_competing(num_rows, num_columns)
        if not self.across_model and self.num_kept(num_weights) == 0:
            raise ValueError(
                f"{self} needs to keep a weight of each {self.per}, got none of {num_weights} for `{name}`; lower "
                f"pattern.sparsity, or choose pattern.per: model"
            )

    def kept_in(self, num_rows: int, num_columns: int) -> tuple[int, int] | None:
        """As `Pattern.kept_in`: of a row or of the matrix."""
        if self.across_model:
            return None
        num = self.num_competing(num_rows, num_columns)
        return num, self.num_kept(num)

    def select_count(self, scores: Float[Tensor, "out in_"], num_kept: int) -> Bool[Tensor, "out in_"]:
        """Keep the `num_kept` highest scores of each row or of the matrix."""
        return keep_highest(scores.reshape(-1, self.num_competing(*scores.shape)), num_kept).view_as(scores)

    def select(self, scores: Float[Tensor, "out in_"], name: str = "the matrix") -> Bool[Tensor, "out in_"]:
        """Keep the highest scores of each row or of the matrix."""
        if self.across_model:
            raise ValueError(
                f"{self} ranks the weights of all matrices together and cannot choose within `{name}` alone; "
                'call `select_all`, or set `pattern.per` to "row" or "matrix"'
            )
        require_finite(scores, name)
        return self.select_count(scores, self.num_kept(self.num_competing(*scores.shape)))


@dataclass(frozen=True)
class NM(Pattern):
    """Semi-structured zeros: `keep` weights survive in each group of `of` consecutive inputs of a row.

    Args:
        keep: Weights kept in each group, 1 <= keep <= of.
        of: Consecutive inputs in a group; a divisor of in_features.
    """

    keep: int = 2
    of: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.of:
            raise ValueError(
                f"an n:m pattern needs 1 <= keep <= of, got keep={self.keep} and of={self.of}; 2:4 is keep=2, of=4"
            )

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    @property
    def density(self) -> float:
        """The fraction of weights kept."""
        return self.keep / self.of

    def select(self, scores: Float[Tensor, "out in_"], name: str = "the matrix") -> Bool[Tensor, "out in_"]:
        """Keep the `keep` highest scores of every group."""
        self.require_whole_groups(scores.shape[1], name)
        require_finite(scores, name)
        return keep_highest(scores.reshape(-1, self.of), self.keep).view_as(scores)

    def require(self, name: str, num_rows: int, num_columns: int) -> None:
        """Refuse a matrix whose rows are no whole number of groups."""
        self.require_whole_groups(num_columns, name)

    def kept_in(self, num_rows: int, num_columns: int) -> tuple[int, int] | None:
        """As `Pattern.kept_in`: of a group."""
        return self.of, self.keep

    def require_whole_groups(self, in_features: int, name: str) -> None:
        """Refuse a matrix whose rows are no whole number of groups.

        Raises:
            ValueError: If `of` does not divide `in_features`.
        """
        if in_features % self.of:
            raise ValueError(
                f"{self} needs in_features divisible by {self.of}, got {in_features} for `{name}`; "
                "exclude it with `pruning.exclude` or choose an unstructured pattern"
            )


@dataclass(frozen=True)
class Experts(Pattern):
    """Whole experts are removed: each mixture keeps `round(keep * n)` of its n experts, a half to the even neighbour.

    All weights of a removed expert are pruned, those of the others survive. The written model has fewer experts and
    its router no rows for the removed ones.

    Args:
        keep: The fraction of experts kept, 0 < keep < 1.
    """

    keep: float = 0.75

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"`keep` is the fraction of experts kept and needs 0 < keep < 1, got {self.keep}")

    def __str__(self) -> str:
        return f"{100 * self.keep:g}% of experts"

    @property
    def density(self) -> float:
        """The fraction of experts kept."""
        return self.keep

    def num_kept(self, num_experts: int) -> int:
        """Count the survivors among the experts of a mixture."""
        return round(Fraction(str(self.keep)) * num_experts)

    def choose(self, scores: Float[Tensor, "experts"], name: str) -> list[int]:
        """Return the experts with the highest scores, in order."""
        require_finite(scores[None], name)
        keep = keep_highest(scores[None], self.num_kept(len(scores)))
        return keep[0].nonzero().flatten().tolist()

    def select(self, scores: Float[Tensor, "out in_"], name: str = "the matrix") -> Bool[Tensor, "out in_"]:
        """Refuse to choose within a matrix.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{self} removes whole experts and cannot choose within `{name}`; choose another pattern")


@dataclass(frozen=True)
class Counted(Pattern):
    """Zeros anywhere, with a given number of them in each matrix. An allocation makes one for each block.

    Where the number is no multiple of the rows, the first rows of a matrix have one zero more than the others.

    Args:
        zeros: Parameter name -> number of zeros; every row (or the matrix) must keep a weight.
        num_weights: Number of weights of these matrices together.
        per: Weights that compete: those of each output "row" or of each "matrix".
    """

    zeros: Mapping[str, int]
    num_weights: int
    per: Literal["row", "matrix"] = "row"

    def __str__(self) -> str:
        return f"{100 * (1 - self.density):.3g}% per {self.per}"

    @property
    def density(self) -> float:
        """The fraction of weights kept in these matrices together; 1 without matrices."""
        return 1 - sum(self.zeros.values()) / max(1, self.num_weights)

    def parts(self, name: str, num_rows: int, num_columns: int) -> list[tuple[slice, Pattern]]:
        """Make one unstructured pattern with the matrix's count, or two for rows that differ by one zero."""
        assert name in self.zeros, f"{name} is not among {list(self.zeros)}"
        if self.per == "matrix":
            return [(slice(None), Unstructured(self.zeros[name] / (num_rows * num_columns), "matrix"))]
        in_each, num_longer = divmod(self.zeros[name], num_rows)
        rows = [(slice(num_longer, None), in_each)]
        if num_longer:
            rows.insert(0, (slice(0, num_longer), in_each + 1))
        return [(some, Unstructured(zeros / num_columns, "row")) for some, zeros in rows]

    def select(self, scores: Float[Tensor, "out in_"], name: str = "the matrix") -> Bool[Tensor, "out in_"]:
        """Keep the highest scores of each row or of the matrix `name`."""
        return torch.cat([part.select(scores, name)[rows] for rows, part in self.parts(name, *scores.shape)])
