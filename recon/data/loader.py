"""A DataLoader that continues, in a resumed run, at the batch where the killed one stopped, and its order."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

PIECE = 4096
"""Indices that are Python numbers at a time: those take five times the memory of a tensor."""


class SeededOrder(DistributedSampler):
    """The order of `DistributedSampler`, another one every epoch, that can begin in the middle of an epoch.

    Each process has its own share; together they have every sequence once. Where their number is not divisible by the
    processes, the first sequences of the order fill up the last shares, so that no process waits for another.

    Attributes:
        begin: Sequences of this process to leave out at the beginning of the next epoch only.
    """

    begin = 0

    def __iter__(self) -> Iterator[int]:
        """Indices of this process in this epoch."""
        begin, self.begin = self.begin, 0
        num = len(self.dataset)  # pyright: ignore[reportArgumentType]
        order = torch.randperm(num, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        positions = torch.arange(self.rank, self.total_size, self.num_replicas)[begin:]
        for piece in positions.split(PIECE):
            yield from order[piece % num].tolist()


class ResumableLoader(DataLoader):
    """A DataLoader whose state dict counts the batches given in this epoch.

    Lightning saves and restores that state with a checkpoint. With a `SeededOrder` a resumed epoch begins where the
    earlier one was; with another sampler it draws the earlier batches again and drops them.
    """

    given = 0
    _skip = 0

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The batches of an epoch; after `load_state_dict`, the remaining batches of that epoch."""
        self.given, self._skip = self._skip, 0
        redrawn = self.given
        if isinstance(self.sampler, SeededOrder) and self.batch_size is not None:
            self.sampler.begin, redrawn = self.given * self.batch_size, 0
        for batch in islice(super().__iter__(), redrawn, None):
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches given in this epoch."""
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip that number of batches in the next epoch."""
        self._skip = state["given"] % len(self)
