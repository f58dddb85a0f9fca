"""A moment of a run and what the device that computes holds then, by category."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "calibration", "gram", "masks", "other")
"""`activations` are those kept for the backward pass, `calibration` those of the calibration and held-out sequences."""

FP32 = 4

SOLVER_COPIES = 12
"""Matrices of the size of the one being solved that conjugate gradients hold in fp32, its dense weight apart: start,
residual, target, mask and iterate of the whole, six of the unfinished rows, and the products of a sum over a row. Rows
that finish leave within this memory."""

SOLVER_ITERATIONS = 50
"""Products of all rows with the Gram matrix that a solve is taken to need. To 1e-6, rows of real layers take 30 to 300
iterations and leave as they finish; four small models took as long as 20 to 60 products of all rows."""


@dataclass(frozen=True)
class Moment:
    """What one process holds on its device.

    Args:
        name: `collect`, `solve`, `forward`, `backward` or `step`.
        held: Category -> bytes.
    """

    name: str
    held: Counter[str]

    @property
    def total(self) -> int:
        """All categories."""
        return self.held.total()


def held(*parts: Counter[str], **bytes_of: int) -> Counter[str]:
    """The sum of what lives at the same time."""
    total = Counter(bytes_of)
    for part in parts:
        total.update(part)
    assert set(total) <= set(CATEGORIES), f"unknown category among {sorted(total)}"
    return total


def numel(tensors: Iterable[Tensor]) -> int:
    """Elements of all of them."""
    return sum(tensor.numel() for tensor in tensors)


def adamw_bytes(tensors: Iterable[Tensor]) -> int:
    """State of AdamW: two moments in the weight's precision, and an fp32 step counter each."""
    return sum(2 * tensor.numel() * tensor.element_size() + FP32 for tensor in tensors)


def adamw_temporary(tensors: Sequence[Tensor], device: str) -> int:
    """What a step of AdamW allocates on the way: on CUDA the roots of all second moments at once, else of one."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    return sum(sizes) if device == "cuda" else 2 * max(sizes)
