"""Storages of one pruned matrix, each with its product: dense, CSR, packed bits, and the 2:4 storage of GPUs.

A storage is made from a matrix, out x in, that is zero where it is pruned, and from its mask. torch raises a
RuntimeError where it cannot store a matrix so, or cannot multiply by it.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from recon.pruning.bits import pack, unpack

HALF = ("float16", "bfloat16")

FIRST_CAPABILITY = (8, 0)
"""Compute capability of the first GPUs with sparse tensor cores (Ampere)."""


class Dense:
    """All weights, zeros too."""

    def __init__(self, weight: Float[Tensor, "out in_"], keep: Bool[Tensor, "out in_"]) -> None:
        self.weight = weight

    def product(self, x: Float[Tensor, "tokens in_"]) -> Float[Tensor, "tokens out"]:
        """Multiply by the matrix."""
        return F.linear(x, self.weight)

    def dense(self) -> Float[Tensor, "out in_"]:
        """The matrix."""
        return self.weight

    @property
    def num_bytes(self) -> int:
        """Size of the weights."""
        return self.weight.nbytes


class CSR:
    """Compressed sparse rows: the values that are not zero, their columns, and the begin of each row."""

    def __init__(self, weight: Float[Tensor, "out in_"], keep: Bool[Tensor, "out in_"]) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
            wide = weight.to_sparse_csr()
            # MKL takes indices of 32 bits only: torch would convert those of 64, which are twice as large, each time.
            indices = wide.crow_indices().int(), wide.col_indices().int()
            self.weight = torch.sparse_csr_tensor(*indices, wide.values(), wide.shape, check_invariants=True)

    def product(self, x: Float[Tensor, "tokens in_"]) -> Float[Tensor, "tokens out"]:
        """Multiply by the matrix."""
        if len(x) == 1:
            return F.linear(x, self.weight)
        return (self.weight @ x.T).T  # for several tokens up to four times as fast as F.linear

    def dense(self) -> Float[Tensor, "out in_"]:
        """The matrix."""
        return self.weight.to_dense()

    @property
    def num_bytes(self) -> int:
        """Size of values and indices."""
        parts = self.weight.crow_indices(), self.weight.col_indices(), self.weight.values()
        return sum(part.nbytes for part in parts)


class Packed:
    """The kept values and the mask as bits, made dense for each product."""

    def __init__(self, weight: Float[Tensor, "out in_"], keep: Bool[Tensor, "out in_"]) -> None:
        self.values, self.bits, self.shape = weight[keep], pack(keep).to(weight.device), tuple(weight.shape)

    def product(self, x: Float[Tensor, "tokens in_"]) -> Float[Tensor, "tokens out"]:
        """Make the matrix and multiply by it."""
        return F.linear(x, self.dense())

    def dense(self) -> Float[Tensor, "out in_"]:
        """The matrix."""
        return self.values.new_zeros(self.shape).masked_scatter_(unpack(self.bits, self.shape), self.values)

    @property
    def num_bytes(self) -> int:
        """Size of values and bits."""
        return self.values.nbytes + self.bits.nbytes


class SemiStructured:
    """Two values of each four inputs and their places, for the sparse tensor cores of a GPU."""

    def __init__(self, weight: Float[Tensor, "out in_"], keep: Bool[Tensor, "out in_"]) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor is in prototype stage")
            self.weight = torch.sparse.to_sparse_semi_structured(weight)

    def product(self, x: Float[Tensor, "tokens in_"]) -> Float[Tensor, "tokens out"]:
        """Multiply by the matrix."""
        return F.linear(x, self.weight)

    def dense(self) -> Float[Tensor, "out in_"]:
        """The matrix."""
        return self.weight.to_dense()

    @property
    def num_bytes(self) -> int:
        """Size of values and places."""
        names, _ = self.weight.__tensor_flatten__()
        return sum(getattr(self.weight, name).nbytes for name in names)


Storage = Dense | CSR | Packed | SemiStructured

STORAGES: dict[str, Callable[[Tensor, Tensor], Storage]] = {
    "dense": Dense,
    "CSR": CSR,
    "packed": Packed,
    "2:4": SemiStructured,
}
"""Name -> class, dense first."""


def missing(
    storage: str, device: str, capability: tuple[int, int] | None, dtype: str, fits_2_4: bool, pattern: str
) -> str | None:
    """Say what a storage needs and does not have here; None if it can be tried.

    Args:
        storage: Name, as in `STORAGES`.
        device: Type of the device, "cpu" or "cuda".
        capability: Compute capability of a CUDA device.
        dtype: Name of the precision, such as "float16".
        fits_2_4: Whether at most two of each four inputs of the matrix are kept.
        pattern: Of the run, for the message.
    """
    if storage == "CSR" and device == "cpu" and dtype in HALF:
        return f"float32 on a CPU (here is {dtype}; --dtype float32)"
    if storage != "2:4":
        return None
    found = []
    if device != "cuda" or capability is None or capability < FIRST_CAPABILITY:
        here = "a CPU" if capability is None else f"one of {capability[0]}.{capability[1]}"
        found.append(f"a GPU of compute capability 8.0 or later (here is {here})")
    if not fits_2_4:
        found.append(f"the pattern 2:4, at most two kept weights in each four inputs (here is {pattern})")
    if dtype not in HALF:
        found.append(f"half precision (here is {dtype}; --dtype bfloat16 or float16)")
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found) or None


def fits_2_4(keep: Bool[Tensor, "out in_"]) -> bool:
    """Whether a mask keeps at most two of each four consecutive inputs."""
    return keep.shape[1] % 4 == 0 and bool((keep.reshape(-1, 4).sum(1) <= 2).all())
