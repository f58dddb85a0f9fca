"""Amounts of memory as people write them."""

import pytest

from recon.basics.units import in_bytes, readable


@pytest.mark.parametrize(("text", "amount"), [("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("1.5MiB", 3 * 2**19)])
def test_units(text: str, amount: int) -> None:
    assert in_bytes(text) == amount


@pytest.mark.parametrize("text", ["24", "24Gib", "GiB", "-1GiB", "0GiB", "24 GiB x"])
def test_an_amount_without_a_known_unit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="one of the units B, KiB"):
        in_bytes(text)


def test_amounts_are_readable() -> None:
    assert [readable(n) for n in (12, 2**20, 24 * 2**30, 300 * 2**30)] == ["12 B", "1.0 MiB", "24.0 GiB", "300 GiB"]
