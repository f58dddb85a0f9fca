"""Randomness that does not leak: a seed for one piece of work, the global state as it was afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def isolated_seed(seed: int) -> Iterator[None]:
    """Seed torch inside the block and restore its state afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
