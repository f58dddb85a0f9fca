"""The batches that a window is trained on."""

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

Batch = dict[str, Tensor]
"""Inputs of a window (`hidden`, and `attention` where it takes that) and `target`, each [batch, seq, dim]."""


class WindowBatches:
    """Batches of the window under way, in a new order every epoch.

    Args:
        num_sequences: Calibration sequences.
        batch_size: Sequences per batch; the last one of an epoch may be smaller.
        seed: Gives the seed of an epoch's order when the epoch begins.
        load: Makes the batches of an epoch from its order, int64[num_sequences].
    """

    def __init__(
        self,
        num_sequences: int,
        batch_size: int,
        seed: Callable[[], int],
        load: Callable[[Int[Tensor, "num"]], Iterable[Batch]],
    ) -> None:
        self.num_sequences, self.batch_size, self.seed, self.load = num_sequences, batch_size, seed, load

    def __len__(self) -> int:
        return -(-self.num_sequences // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        yield from self.load(shuffled(self.num_sequences, self.num_sequences, self.seed()))


def shuffled(num_sequences: int, count: int, seed: int) -> Int[Tensor, "count"]:
    """Shuffle the sequences, again and again if `count` is larger than their number, and return the first `count`."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(num_sequences, generator=generator) for _ in range(-(-count // num_sequences))]
    return torch.cat(rounds)[:count]
