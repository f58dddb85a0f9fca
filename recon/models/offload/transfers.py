"""Copies of weights between the host's memory and the device.

A copy from or to pageable memory makes the host wait for the device, and afterwards the device for the host. For a CUDA
device weights therefore pass through pinned memory, into which a thread gathers the next block ahead of its use. The
host's own copies of a whole model stay pageable: pinned, they would take up to twice their size and could not be
swapped.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from recon.profiling.ledger import claim


@dataclass
class Onloaded:
    """A tensor that is on the device.

    Args:
        tensor: A parameter or buffer, which is one object all the time.
        host_copy: Its data on the host (none, if the weights are on disk).
    """

    tensor: Tensor
    host_copy: Tensor

    def __post_init__(self) -> None:
        self.note()

    def note(self) -> None:
        """Take the values of this moment for those of the host."""
        # The version counts changes in place, but not new data. Kernels that do not count are told of by
        # `torch.autograd.graph.increment_version`.
        self._version, self._place = self.tensor._version, self.tensor.data_ptr()

    @property
    def has_changed(self) -> bool:
        """Whether its values may differ from those of the host."""
        return (self.tensor._version, self.tensor.data_ptr()) != (self._version, self._place)

    def restore(self) -> None:
        """Give the tensor the host's data again."""
        self.tensor.data = self.host_copy


class Pinned:
    """Gathers the weights of one block after another in pinned memory, the next one ahead.

    Attributes:
        ahead: Key of the block that is gathered ahead; None if there is none.
    """

    def __init__(self) -> None:
        self.ahead: int | None = None
        self._thread = ThreadPoolExecutor(1, "recon-pinned")
        self._rooms: list[Tensor] = []
        self._versions: list[int] = []
        self._done: Future[None] | None = None

    def begin(self, key: int, tensors: Sequence[Tensor]) -> None:
        """Begin to gather tensors on the host, in a thread."""
        self.ahead, self._versions = key, [tensor._version for tensor in tensors]
        self._rooms = [torch.empty_like(tensor.data, pin_memory=True) for tensor in tensors]
        claim("weights", *self._rooms, on_host=True)
        self._done = self._thread.submit(_copy, self._rooms, [tensor.data for tensor in tensors])

    def take(self, key: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return pinned copies of tensors on the host; those gathered ahead, if they still are what they were."""
        rooms, done, ahead = self._rooms, self._done, self.ahead
        self._rooms, self._done, self.ahead = [], None, None
        if done is not None:
            done.result()
        if ahead == key and self._versions == [tensor._version for tensor in tensors]:
            return rooms
        return [torch.empty_like(tensor.data, pin_memory=True).copy_(tensor.data) for tensor in tensors]


def copy_to_host(changed: Sequence[Onloaded], device: torch.device) -> None:
    """Copy changed values back to the host."""
    if device.type != "cuda":
        _copy([one.host_copy for one in changed], [one.tensor.data for one in changed])
        return
    _copy([one.host_copy for one in changed], copies_on_host([one.tensor.data for one in changed], device))


def copies_on_host(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return copies in the host's memory, pinned if they come from a CUDA device, for which the host waits once."""
    rooms = [torch.empty_like(tensor, device="cpu", pin_memory=device.type == "cuda") for tensor in tensors]
    for room, tensor in zip(rooms, tensors, strict=True):
        room.copy_(tensor, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return rooms


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
