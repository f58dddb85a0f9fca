"""Storages of pruned matrices: the same product, the bytes that they say, and what they need."""

from typing import Any

import pytest
import torch
from torch import Tensor

from recon.pruning.storages import STORAGES, fits_2_4, missing

ROWS, COLUMNS = 24, 40


def pruned() -> tuple[Tensor, Tensor]:
    """A matrix and its mask: unstructured, with an empty row and a kept weight that is zero."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(ROWS, COLUMNS, generator=generator) < 0.4
    weight = torch.randn(ROWS, COLUMNS, generator=generator).masked_fill(~keep, 0)
    keep[3], weight[3] = False, 0
    keep[5, 7], weight[5, 7] = True, 0
    return weight, keep


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("name", ["dense", "CSR", "packed"])
def test_the_product_is_that_of_the_masked_matrix(name: str, tokens: int) -> None:
    weight, keep = pruned()
    stored = STORAGES[name](weight, keep)
    x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(1))
    slow = [
        [sum(float(x[t, j]) * float(weight[i, j]) for j in range(COLUMNS)) for i in range(ROWS)] for t in range(tokens)
    ]
    torch.testing.assert_close(stored.product(x), torch.tensor(slow))
    assert torch.equal(stored.dense(), weight)


def test_bytes_are_those_of_values_and_places() -> None:
    weight, keep = pruned()
    num_kept, num_values = int(keep.sum()), int(weight.count_nonzero())
    assert STORAGES["dense"](weight, keep).num_bytes == 4 * ROWS * COLUMNS
    assert STORAGES["CSR"](weight, keep).num_bytes == 8 * num_values + 4 * (ROWS + 1)
    assert STORAGES["packed"](weight, keep).num_bytes == 4 * num_kept + ROWS * COLUMNS // 8


class Compressed:
    """In place of torch's 2:4 tensor: two tensors within, and the dense matrix for products."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.packed, self.meta = weight, torch.zeros(12), torch.zeros(3, dtype=torch.int16)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["packed", "meta"], None

    def to_dense(self) -> Tensor:
        return self.weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        return func(*(one.weight if isinstance(one, Compressed) else one for one in args), **(kwargs or {}))


def test_2_4_is_torchs_semi_structured_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda w: asked.append(w) or Compressed(w))
    weight, keep = pruned()
    stored = STORAGES["2:4"](weight, keep)
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(stored.product(x), x @ weight.T)
    assert len(asked) == 1
    assert asked[0] is weight
    assert stored.dense() is weight
    assert stored.num_bytes == 12 * 4 + 3 * 2


@pytest.mark.parametrize(
    ("storage", "device", "capability", "dtype", "fits", "needed"),
    [
        ("2:4", "cuda", (8, 0), "float16", True, []),
        ("2:4", "cuda", (9, 0), "bfloat16", True, []),
        ("2:4", "cuda", (10, 0), "bfloat16", True, []),
        ("2:4", "cuda", (7, 5), "float16", True, ["capability 8.0", "7.5"]),
        ("2:4", "cpu", None, "bfloat16", True, ["capability 8.0", "a CPU"]),
        ("2:4", "cuda", (8, 6), "float32", True, ["half precision", "float32"]),
        ("2:4", "cuda", (8, 6), "float16", False, ["pattern 2:4", "60% per row"]),
        ("2:4", "cpu", None, "float32", False, ["capability 8.0", "pattern 2:4", "half precision"]),
        ("CSR", "cpu", None, "float32", False, []),
        ("CSR", "cpu", None, "bfloat16", False, ["float32 on a CPU"]),
        ("CSR", "cuda", (8, 0), "float16", False, []),
        ("packed", "cpu", None, "float16", False, []),
        ("dense", "cpu", None, "float16", False, []),
    ],
)
def test_a_storage_says_what_it_needs(
    storage: str, device: str, capability: tuple[int, int] | None, dtype: str, fits: bool, needed: list[str]
) -> None:
    said = missing(storage, device, capability, dtype, fits, "60% per row")
    if not needed:
        assert said is None
        return
    assert said is not None
    assert all(word in said for word in needed)
    others = {"capability 8.0", "pattern 2:4", "half precision"} - set(needed)
    assert not any(word in said for word in others)


def test_csr_of_16_bits_has_no_product_on_a_cpu() -> None:
    """The reason for which `missing` refuses it; if this fails, torch has learned it and the refusal can go."""
    weight, keep = pruned()
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(RuntimeError, match="not implemented"):
            STORAGES["CSR"](weight.to(dtype), keep).product(torch.ones(2, COLUMNS, dtype=dtype))


def test_which_masks_are_2_4() -> None:
    rows = {"1100 0110": True, "1000 0000": True, "1110 0000": False, "0111 1000": False, "0011 1100": True}
    for text, fits in rows.items():
        keep = torch.tensor([[one == "1" for one in text.replace(" ", "")]])
        assert fits_2_4(keep) is fits
        assert fits_2_4(torch.cat([torch.zeros_like(keep), keep])) is fits
    assert not fits_2_4(torch.zeros(2, 6, dtype=torch.bool))  # rows are no whole groups
