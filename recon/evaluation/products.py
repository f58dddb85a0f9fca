"""Products with one matrix in several storages: checked against the masked dense product, then timed."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.benchmark import Timer, timer

from recon.report.speed import Product, Status, Stored

MEASUREMENTS = 5
"""The least number of measurements of a product."""

TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest accepted error of a product by precision: in 16 bits four roundings, in 32 bits those of a long sum."""


class StoredMatrix(Protocol):
    """A matrix in memory, with its product."""

    def product(self, x: Tensor) -> Tensor:
        """Multiply inputs, tokens x in, by the transposed matrix, as a linear layer does."""
        ...

    def dense(self) -> Tensor:
        """The matrix, out x in."""
        ...

    @property
    def num_bytes(self) -> int:
        """Size of all tensors that a product reads, without its inputs."""
        ...


Maker = Callable[[], StoredMatrix]


@torch.inference_mode()
def measure_storages(
    weight: Float[Tensor, "out in_"],
    makers: Mapping[str, Maker | str],
    tokens: Sequence[int],
    min_seconds: float,
    seed: int,
) -> list[Stored]:
    """Check and time the products of one matrix in several storages.

    Storages alternate for each number of tokens, so that other work on the machine meets all of them. One that is
    wrong, or that torch does not accept, is not timed any further.

    Args:
        weight: The masked matrix, on the device and in the precision to measure.
        makers: Name of a storage -> what makes it, or what it needs and does not have here.
        tokens: Rows of the inputs.
        min_seconds: Least time spent on each product.
        seed: Decides the inputs, which are normally distributed.

    Returns:
        One record for each of `makers`, in order.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(max(tokens), weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    expected = x.double() @ weight.double().T
    trials = [_Trial(name, maker, weight) for name, maker in makers.items()]
    for count in tokens:
        for trial in trials:
            trial.measure(x[:count], expected[:count], min_seconds)
    return [trial.record() for trial in trials]


def relative_error(y: Float[Tensor, "tokens out"], expected: Float[Tensor, "tokens out"]) -> float:
    """The largest difference from `expected`, relative to its largest value."""
    return float((y.double() - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(y.dtype).tiny))


class _Trial:
    """One storage while it is measured."""

    def __init__(self, name: str, maker: Maker | str, weight: Tensor) -> None:
        self.name, self.reason = name, ""
        self.status: Status = "timed"
        self.storage: StoredMatrix | None = None
        self.num_bytes: int | None = None
        self.products: list[Product] = []
        self.errors: list[float] = []
        if isinstance(maker, str):
            self._stop("needs", maker)
            return
        try:
            self.storage = maker()
            self.num_bytes = self.storage.num_bytes
            different = int((self.storage.dense() != weight).sum())
        except RuntimeError as error:  # torch has no kernel for this matrix, or no memory
            self._stop("failed", _first_line(error))
            return
        if different:
            self._stop("wrong", f"{different} of {weight.numel()} stored weights differ")

    def measure(self, x: Tensor, expected: Tensor, min_seconds: float) -> None:
        """Check one product, then time it; nothing once the storage was wrong or failed."""
        if self.storage is None:
            return
        try:
            error = relative_error(self.storage.product(x), expected)
            self.errors.append(error)
            if not error <= TOLERANCES[x.dtype]:  # NaN is not
                self._stop("wrong", f"error {error:.0e} for inputs of {len(x)} x {x.shape[1]}")
                return
            times = _times(self.storage.product, x, min_seconds)
        except RuntimeError as error:
            self._stop("failed", f"{_first_line(error)}, for inputs of {len(x)} x {x.shape[1]}")
            return
        low, high = np.quantile(times, [0.25, 0.75]).tolist()
        self.products.append(Product(len(x), error, median(times), low, high, len(times)))

    def record(self) -> Stored:
        """What was found."""
        largest = max(self.errors, default=math.nan)
        error = largest if all(math.isfinite(one) for one in [largest, *self.errors]) else None
        return Stored(self.name, self.status, self.reason, self.num_bytes, error, self.products)

    def _stop(self, status: Status, reason: str) -> None:
        self.storage, self.status, self.reason = None, status, reason


def _times(product: Callable[[Tensor], Tensor], x: Tensor, min_seconds: float) -> list[float]:
    """Seconds of a run, several measurements after warm-up; the device has finished when each ends."""
    began = timer()
    product(x)
    at_least = max(min_seconds, MEASUREMENTS * (timer() - began))
    run = Timer("product(x)", globals={"product": product, "x": x}, num_threads=torch.get_num_threads())
    times: list[float] = []
    while len(times) < MEASUREMENTS:
        times += run.blocked_autorange(min_run_time=at_least).times
    return times


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
