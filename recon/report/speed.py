"""The record of a measurement of speed, `speed.json`: products with the matrices of a pruned model.

All records are plain dataclasses, and all numbers in them are finite, so that the file is strict JSON.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FORMAT = "recon-speed-1"

DENSE = "dense"
"""The storage that all others are compared with."""

Status = Literal["timed", "needs", "failed", "wrong"]
"""Outcome of a storage: timed; not tried, for something that it needs is missing; not accepted by torch; not equal."""


@dataclass(frozen=True)
class Product:
    """A product of inputs with one stored matrix.

    Args:
        tokens: Rows of the inputs.
        error: Largest difference from the product in higher precision, relative to the largest output.
        seconds: Median of the measurements.
        low: First quartile of the measurements, in seconds.
        high: Third quartile, in seconds.
        measurements: Number of them; each is the mean of a block of runs.
    """

    tokens: int
    error: float
    seconds: float
    low: float
    high: float
    measurements: int


@dataclass(frozen=True)
class Stored:
    """One matrix in one storage.

    Args:
        storage: Name of the storage.
        status: Outcome.
        reason: Of another outcome than "timed".
        num_bytes: Size of all tensors of the storage; None if it was not made.
        error: Largest error of a product, that of a wrong one too; None if it is not finite, or there was no product.
        products: One for each number of tokens, up to the first that was wrong or failed.
    """

    storage: str
    status: Status = "timed"
    reason: str = ""
    num_bytes: int | None = None
    error: float | None = None
    products: Sequence[Product] = ()


@dataclass(frozen=True)
class MatrixSpeed:
    """The matrices of one shape.

    Args:
        name: Parameter name of the one that was measured, whose sparsity is the median of the shape.
        rows: Number of outputs.
        columns: Number of inputs.
        count: Number of matrices of this shape.
        sparsity: Share of zeros in the measured matrix, 0 to 1.
        stored: One for each storage, dense first.
    """

    name: str
    rows: int
    columns: int
    count: int
    sparsity: float
    stored: Sequence[Stored]

    @property
    def shape(self) -> str:
        """The shape for people."""
        return f"{self.rows} x {self.columns}"

    def of(self, storage: str) -> Stored:
        """The record of a storage."""
        return next(one for one in self.stored if one.storage == storage)


@dataclass(frozen=True)
class Speed:
    """All that was measured on one run, with what the figures depend on.

    Args:
        run_dir: The run.
        pattern: Its pattern.
        sparsity: Share of zeros in all pruned matrices together, 0 to 1.
        dtype: Precision of weights and inputs.
        tolerance: Largest error of a product that is accepted.
        tokens: Rows of the inputs.
        seed: Decides the inputs.
        min_seconds: Least time spent on the measurement of each product.
        environment: Device, threads, date, versions.
        digests: `masks` and `model`, SHA-256 in hex: the files that were measured.
        matrices: One for each shape.
    """

    run_dir: str
    pattern: str
    sparsity: float
    dtype: str
    tolerance: float
    tokens: Sequence[int]
    seed: int
    min_seconds: float
    environment: Mapping[str, Any]
    digests: Mapping[str, str]
    matrices: Sequence[MatrixSpeed] = field(default_factory=list)

    @property
    def storages(self) -> list[str]:
        """Names of all storages, dense first."""
        return [one.storage for one in self.matrices[0].stored]

    @property
    def num_matrices(self) -> int:
        """Number of pruned matrices."""
        return sum(one.count for one in self.matrices)

    @property
    def wrong(self) -> list[tuple[MatrixSpeed, Stored]]:
        """The storages whose products or weights are not those of the masked matrix."""
        return [(matrix, one) for matrix in self.matrices for one in matrix.stored if one.status == "wrong"]

    def as_dict(self) -> dict[str, Any]:
        """The content of `speed.json`, without what is computed from it."""
        return {"format": FORMAT, **asdict(self)}
