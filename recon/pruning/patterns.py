"""Patterns: which zeros are allowed, and how many.

A pattern turns scores into a mask with an exact number of zeros. Thresholds are never used within a matrix:
`score <= sorted[k]` prunes k+1 weights and every tie with them. Ranks are exact, and among equal scores the
weight with the lower index is kept. `Unstructured` and `NM` give every matrix the same density, `Counted` each
its own.
"""

import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Per = Literal["row", "matrix", "model"]


class Pattern(ABC):
    """A rule for which weights of a matrix, or of all matrices together, may survive."""

    @property
    @abstractmethod
    def density(self) -> float:
        """The fraction of weights kept, before it is rounded to a count."""

    @property
    def across_model(self) -> bool:
        """Whether matrices compete with each other, so that only `select_all` can choose."""
        return False

    @abstractmethod
    def select(self, scores: Float[Tensor, "out in_"], name: str = "the matrix") -> Bool[Tensor, "out in_"]:
        """Choose the survivors of one matrix.

        Args:
            scores: How much each weight matters, out x in; higher is kept.
            name: What error messages call the matrix.

        Returns:
            The mask, out x in, True = kept.

        Raises:
            ValueError: If a score is NaN or infinite, or the pattern does not fit the matrix.
        """

    def parts(self, name: str, num_rows: int, num_columns: int) -> list[tuple[slice, "Pattern"]]:
        """The patterns of one matrix with the rows that each of them chooses for, by default this one for all.

        Args:
            name: Of the matrix, as a parameter of the model.
            num_rows: Its outputs.
            num_columns: Its inputs.

        Returns:
            Slices of rows, in order and together all rows, each with its pattern.
        """
        return [(slice(None), self)]

    def select_all(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Choose the survivors of several matrices, by default of each on its own.

        Args:
            scores: Matrix name -> scores, each out x in.

        Returns:
            Matrix name -> mask, each out x in, True = kept, in the order received.
        """
        return {name: self.select(matrix, name) for name, matrix in scores.items()}


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Zeros anywhere, exactly `round(sparsity * n)` of them among the n weights of a row, matrix or model.

    The product is exact for the decimal that was written (0.35 * 10 is 3.5), and a half is rounded to the
    even neighbour as Python's `round` does.

    Args:
        sparsity: The fraction of weights to prune, 0 <= sparsity < 1.
        per: Where weights compete: within each output "row", within each "matrix", or across the "model".
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

    @property
    def across_model(self) -> bool:
        """True for `per="model"`."""
        return self.per == "model"

    def num_kept(self, num_weights: int) -> int:
        """How many of `num_weights` competing weights survive."""
        return num_weights - round(Fraction(str(self.sparsity)) * num_weights)

    def select(self, scores: Float[Tensor, "out in_"], name: str = "the matrix") -> Bool[Tensor, "out in_"]:
        """Keep the highest scores of each row or of the matrix."""
        if self.across_model:
            raise ValueError(
                f"{self} ranks the weights of all matrices together and cannot choose within `{name}` alone; "
                'call `select_all`, or set `pattern.per` to "row" or "matrix"'
            )
        require_finite(scores, name)
        ranked = scores if self.per == "row" else scores.reshape(1, -1)
        return _keep_highest(ranked, self.num_kept(ranked.shape[1])).view_as(scores)

    def select_all(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Choose the survivors of several matrices; `per="model"` ranks them together, in fp32.

        Ties go to the matrix that comes first, then to the lower index.
        """
        if not self.across_model:
            return super().select_all(scores)
        for name, matrix in scores.items():
            require_finite(matrix, name)
        num_kept = self.num_kept(sum(matrix.numel() for matrix in scores.values()))
        threshold = _kth_highest(list(scores.values()), num_kept)
        masks = {name: (matrix.float() > threshold).contiguous() for name, matrix in scores.items()}
        num_ties_kept = num_kept - sum(int(keep.sum()) for keep in masks.values())
        for name, matrix in scores.items():
            ties = (matrix.float() == threshold).flatten().nonzero().flatten()[:num_ties_kept]
            masks[name].view(-1)[ties] = True
            num_ties_kept -= ties.numel()
        return masks


@dataclass(frozen=True)
class NM(Pattern):
    """Semi-structured zeros: `keep` weights survive in each group of `of` consecutive inputs of a row.

    Args:
        keep: Weights kept in each group, 1 <= keep <= of.
        of: Consecutive inputs in a group; in_features must be divisible by it.
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
        if scores.shape[1] % self.of:
            raise ValueError(
                f"{self} needs in_features divisible by {self.of}, got {scores.shape[1]} for `{name}`; "
                "exclude it with `pruning.exclude` or choose an unstructured pattern"
            )
        require_finite(scores, name)
        return _keep_highest(scores.reshape(-1, self.of), self.keep).view_as(scores)


@dataclass(frozen=True)
class Counted(Pattern):
    """Zeros anywhere, a given number of them in each matrix, as an allocation finds it for the matrices of a block.

    Where the number is no multiple of the rows, the first rows of a matrix have one zero more than the others.

    Args:
        zeros: Parameter name -> the number of zeros; so few that every row (or the matrix) keeps a weight.
        num_weights: How many weights these matrices have together.
        per: Where weights compete: within each output "row" or within each "matrix".
    """

    zeros: Mapping[str, int]
    num_weights: int
    per: Literal["row", "matrix"] = "row"

    def __str__(self) -> str:
        return f"{100 * (1 - self.density):.3g}% per {self.per}"

    @property
    def density(self) -> float:
        """The fraction of weights kept, in all these matrices together; 1 without any."""
        return 1 - sum(self.zeros.values()) / max(1, self.num_weights)

    def parts(self, name: str, num_rows: int, num_columns: int) -> list[tuple[slice, Pattern]]:
        """One unstructured pattern with the count of the matrix, or two for rows that differ by one zero."""
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


def require_finite(scores: Float[Tensor, "out in_"], name: str) -> None:
    """Refuse scores that have no order."""
    if not bool(scores.isfinite().all()):
        count = int((~scores.isfinite()).sum())
        raise ValueError(
            f"scores need to be finite, got {count} NaN or infinite of {scores.numel()} for `{name}`; "
            "check its weight and the calibration inputs for NaN"
        )


def _keep_highest(scores: Float[Tensor, "group n"], num_kept: int) -> Bool[Tensor, "group n"]:
    # The sort must be stable: `topk` breaks ties differently from device to device.
    order = scores.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :num_kept], True)


def _kth_highest(scores: list[Tensor], k: int) -> float:
    """The k-th highest of all fp32 scores; infinity for k = 0.

    Bisection over the bits of a float: 32 counts, no copy. Sorting the concatenated scores would take
    28 + 56 GB for a model of 7 billion weights.
    """
    if k == 0:
        return float("inf")
    low, high = _ordinal(float("-inf")), _ordinal(float("inf"))
    while high - low > 1:  # at least k scores are >= low, fewer are >= high
        middle = (low + high) // 2
        value = _from_ordinal(middle)
        enough = sum(int((matrix.float() >= value).sum()) for matrix in scores) >= k
        low, high = (middle, high) if enough else (low, middle)
    return _from_ordinal(low)


def _ordinal(value: float) -> int:
    """Number the fp32 values in ascending order: 0.0 is 0, the smallest subnormal is 1, its negative -1."""
    magnitude = struct.unpack("<I", struct.pack("<f", abs(value)))[0]
    return magnitude if value >= 0 else -magnitude


def _from_ordinal(ordinal: int) -> float:
    magnitude = struct.unpack("<f", struct.pack("<I", abs(ordinal)))[0]
    return magnitude if ordinal >= 0 else -magnitude
