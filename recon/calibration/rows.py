"""The sequences of a batch in a random order: their numbers, where they are needed."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Numbers of the sequences of a batch.

    Args:
        on_host: To gather copies in the host's memory.
        on_device: To gather copies on the compute device; the same numbers.
    """

    on_host: Int[Tensor, "batch"]
    on_device: Int[Tensor, "batch"]

    @classmethod
    def split(cls, order: Int[Tensor, "num"], batch_size: int, device: torch.device) -> "Iterator[Rows]":
        """Split an epoch's order, on the host, into batches.

        It is uploaded once: the host waits for the device at each upload.
        """
        pairs = zip(order.split(batch_size), order.to(device).split(batch_size), strict=True)
        return (cls(*pair) for pair in pairs)

    def __len__(self) -> int:
        return len(self.on_host)
