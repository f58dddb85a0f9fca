"""A snapshot of a run: the bytes on the device that computes, by category."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from recon.profiling.entries import CATEGORIES

FP32 = 4

SOLVER_COPIES = 12
"""Matrices of the solved one's size that conjugate gradients hold in fp32, beside its dense weight: start, residual,
target, mask and iterate of the whole, six of the unfinished rows, and the products of a sum over a row. Finished rows
leave within this memory."""

SOLVER_ITERATIONS = 50
"""Assumed products of all rows with the Gram matrix in a solve. To 1e-6, rows of real layers take 30 to 300 iterations
and leave as they finish; four small models took as long as 20 to 60 products of all rows."""

START_RESIDUALS = 3
"""Products of all rows with the Gram matrix in the full fp32 of a start: first and last residual, and W0 G."""

START_ITERATIONS = 6
"""Assumed products of all rows in the iterations of a start: 44 matrices with 128 to 384 inputs took 3 to 6, those that
take 25 to 33 to 1e-6 the most."""


@dataclass(frozen=True)
class Snapshot:
    """The content of one process's device.

    Args:
        name: Name of its kind: `collect`, `solve`, `forward`, `backward` or `step`.
        held: Category -> bytes.
    """

    name: str
    held: Counter[str]

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return self.held.total()


def held(*parts: Counter[str], **bytes_of: int) -> Counter[str]:
    """Add up parts that live at the same time."""
    total = Counter(bytes_of)
    for part in parts:
        total.update(part)
    assert set(total) <= set(CATEGORIES), f"unknown category among {sorted(total)}"
    return total


def numel(tensors: Iterable[Tensor]) -> int:
    """Count the elements of all tensors."""
    return sum(tensor.numel() for tensor in tensors)


def adamw_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of AdamW's state: two moments in the weight's precision, and an fp32 step counter for each tensor."""
    return sum(2 * tensor.numel() * tensor.element_size() + FP32 for tensor in tensors)


def adamw_temporary(tensors: Sequence[Tensor], device: str) -> int:
    """Temporary bytes of a step of AdamW: on CUDA the roots of all second moments at once, else of one."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    return sum(sizes) if device == "cuda" else 2 * max(sizes)
