"""Loading batches onto the device, one ahead of the batch in use."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")
Batch = TypeVar("Batch", Tensor, dict[str, Tensor])


class Prefetch:
    """Loads each batch before the one in front of it is used.

    On a CUDA device loading runs on a stream of its own: copies out of pinned memory overlap with the computation, at
    the cost of memory for one batch more. Elsewhere only the order differs.

    Args:
        device: Device that batches are loaded onto.
    """

    def __init__(self, device: torch.device) -> None:
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def batches(self, keys: Iterable[Key], load: Callable[[Key], Batch]) -> Iterator[tuple[Key, Batch]]:
        """Yield each key with its batch, in order.

        Args:
            keys: Keys of the batches; the next one is taken, and its batch loaded, before the last batch is used.
            load: Makes the batch of a key. It must not depend on what is done with the batch in front.
        """
        coming = None
        for key in keys:
            ready = None if coming is None else self._ready(*coming)
            coming = key, self._load(key, load)
            if ready is not None:
                yield ready
        if coming is not None:
            yield self._ready(*coming)

    def _load(self, key: Key, load: Callable[[Key], Batch]) -> Batch:
        if self._copies is None:
            return load(key)
        self._copies.wait_stream(torch.cuda.current_stream(self._copies.device))  # it may have written the source
        with torch.cuda.stream(self._copies):
            return load(key)

    def _ready(self, key: Key, batch: Batch) -> tuple[Key, Batch]:
        """Make the computation wait for a batch, and its memory for the computation, before the next load begins."""
        if self._copies is not None:
            computation = torch.cuda.current_stream(self._copies.device)
            computation.wait_stream(self._copies)
            for tensor in batch.values() if isinstance(batch, dict) else (batch,):
                tensor.record_stream(computation)
        return key, batch
