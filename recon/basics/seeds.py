"""Randomness that does not leak: a seed for one piece of work, the global state as it was afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(*parts: int) -> int:
    """A seed for one piece of work out of the run's seed and the numbers that name the piece."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@contextmanager
def isolated_seed(seed: int) -> Iterator[None]:
    """Seed torch inside the block and restore its state afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
