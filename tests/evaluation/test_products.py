"""Products are checked before they are timed: none is timed that is wrong or that torch refuses."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from recon.evaluation.products import MEASUREMENTS, Maker, measure_storages, relative_error
from recon.report.speed import Stored


class Matrix:
    """A storage whose product is given."""

    num_bytes = 7

    def __init__(self, weight: Tensor, product: Callable[[Tensor], Tensor], dense: Tensor | None = None) -> None:
        self.weight, self.of, self.held, self.asked = weight, product, dense, []

    def product(self, x: Tensor) -> Tensor:
        self.asked.append(len(x))
        return self.of(x)

    def dense(self) -> Tensor:
        return self.weight if self.held is None else self.held


def weight_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(12, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


def measured(makers: dict[str, Maker | str], weight: Tensor, tokens: tuple[int, ...] = (1, 4)) -> list[Stored]:
    return measure_storages(weight, makers, tokens, 1e-4, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_times_of_right_products(dtype: torch.dtype) -> None:
    weight = weight_of(dtype)
    matrix = Matrix(weight, lambda x: x @ weight.T)
    (found,) = measured({"own": lambda: matrix}, weight)
    assert (found.storage, found.status, found.reason, found.num_bytes) == ("own", "timed", "", 7)
    assert [one.tokens for one in found.products] == [1, 4]
    for one in found.products:
        assert one.measurements >= MEASUREMENTS
        assert 0 < one.low <= one.seconds <= one.high
    assert found.error == max(one.error for one in found.products)
    assert set(matrix.asked) == {1, 4}


def test_seconds_are_those_of_one_product() -> None:
    weight = weight_of()

    def slow(x: Tensor) -> Tensor:
        torch.linalg.eigh(torch.eye(60))  # some work, whatever x is
        return x @ weight.T

    fast, slowed = measured(
        {"fast": lambda: Matrix(weight, lambda x: x @ weight.T), "slow": lambda: Matrix(weight, slow)}, weight
    )
    for one, other in zip(fast.products, slowed.products, strict=True):
        assert one.seconds < other.seconds < 0.1


def off_by(factor: float, weight: Tensor, x: Tensor) -> Tensor:
    y = x @ weight.T
    y[-1, -1] += factor * y.abs().max()
    return y


@pytest.mark.parametrize(
    ("factor", "status"), [(1e-7, "timed"), (1e-4, "wrong"), (math.nan, "wrong"), (math.inf, "wrong")]
)
def test_a_wrong_product_is_not_timed(factor: float, status: str) -> None:
    weight = weight_of()
    matrix = Matrix(weight, partial(off_by, factor, weight))
    found, other = measured({"own": lambda: matrix, "other": lambda: Matrix(weight, lambda x: x @ weight.T)}, weight)
    assert found.status == status
    assert other.status == "timed"
    if status == "timed":
        return
    assert found.products == []
    assert len(matrix.asked) == 1
    assert "for inputs of 1 x 16" in found.reason
    assert found.error is None if not math.isfinite(factor) else found.error == pytest.approx(factor, rel=0.1)


def test_a_product_that_gets_wrong_later_keeps_the_earlier_times() -> None:
    weight = weight_of()
    matrix = Matrix(weight, lambda x: off_by(1.0 if len(x) == 4 else 0.0, weight, x))
    (found,) = measured({"own": lambda: matrix}, weight)
    assert (found.status, [one.tokens for one in found.products]) == ("wrong", [1])
    assert "for inputs of 4 x 16" in found.reason
    assert found.error == pytest.approx(1, rel=0.1)


def test_a_storage_that_does_not_hold_the_weights_is_wrong() -> None:
    """Its product may be within the rounding of 16 bits."""
    weight = weight_of(torch.bfloat16)
    other = weight.clone()
    other[0, 0] *= 1.01
    matrix = Matrix(weight, lambda x: x @ weight.T, dense=other)
    (found,) = measured({"own": lambda: matrix}, weight)
    assert (found.status, found.reason) == ("wrong", "1 of 192 stored weights differ")
    assert matrix.asked == []


def test_what_torch_refuses_has_failed_and_what_is_missing_is_needed() -> None:
    weight = weight_of()

    def refuse(*_: object) -> Tensor:
        raise NotImplementedError("no kernel\nof that kind")

    makers: dict[str, Maker | str] = {
        "made": refuse,  # pyright: ignore[reportAssignmentType]
        "multiplied": lambda: Matrix(weight, refuse),
        "needs": "a GPU",
    }
    made, multiplied, needs = measured(makers, weight)
    assert (made.status, made.reason, made.num_bytes) == ("failed", "no kernel", None)
    assert (multiplied.status, multiplied.reason, multiplied.num_bytes) == (
        "failed",
        "no kernel, for inputs of 1 x 16",
        7,
    )
    assert (needs.status, needs.reason, needs.error) == ("needs", "a GPU", None)


def test_an_error_is_relative_to_the_largest_value() -> None:
    expected = torch.tensor([[1.0, -8.0]], dtype=torch.float64)
    assert relative_error(torch.tensor([[1.5, -8.0]]), expected) == 0.0625
    assert relative_error(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.float64)) == 0
