"""Storage of hidden states between two passes: on the device, in the host's memory, or in files."""

import logging
import math
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from recon.basics.mapped import mapped
from recon.basics.units import in_bytes, readable
from recon.profiling.host_memory import available_bytes

log = logging.getLogger("recon")

Place = Literal["device", "host", "disk", "auto"]
"""Place of a copy of the hidden states:

- `device`: on the device that the model computes on;
- `host`: in the host's memory, pinned if the device is a CUDA device;
- `disk`: in an unnamed file that is mapped into memory, whose pages the system keeps as far as it has room;
- `auto`: in the first of these whose budget has room for it.
"""

SHARE = 0.5
"""Of the host's available memory, for a copy without a budget; the rest is for the model and for other processes."""


class Budget:
    """Bytes that copies of the hidden states may take, for `auto`. A copy's bytes are free again when it is deleted.

    Args:
        device: Bytes on the device.
        host: Bytes in the host's memory; no limit if None.
    """

    def __init__(self, device: int, host: int | None = None) -> None:
        self.left: dict[Place, float] = {"device": device, "host": math.inf if host is None else host}
        self.left["disk"] = math.inf
        self._on_host: set[int] = set()  # ids of the copies that are not on the device

    @classmethod
    def of(cls, place: Place, device: str | None, host: str | None) -> "Budget | None":
        """Read the options; None for any place but `auto`.

        Args:
            place: `model.activations`.
            device: `model.activations_budget`, such as 4GiB; nothing if None, so that the peak of a window is its own.
            host: `model.activations_host_budget`.

        Raises:
            ValueError: If the options do not go together, or one of them is no amount of memory.
        """
        if place != "auto":
            if device is not None or host is not None:
                raise ValueError(
                    f"model.activations_budget and model.activations_host_budget are for model.activations: auto, got "
                    f"model.activations: {place}; leave them out, or choose auto"
                )
            return None
        on_device = 0 if device is None else _amount("activations_budget", device)
        return cls(on_device, None if host is None else _amount("activations_host_budget", host))

    def choose(self, nbytes: int) -> Place:
        """Return the first place with room for `nbytes` bytes."""
        return next(place for place, left in self.left.items() if nbytes <= left)

    def take(self, place: Place, tensor: Tensor) -> None:
        """Count the bytes of `tensor` at its place as long as it lives."""
        self.left[place] -= tensor.nbytes
        if place != "device":
            self._on_host.add(id(tensor))
        weakref.finalize(tensor, self._free, place, tensor.nbytes, id(tensor)).atexit = False

    def is_on_host(self, tensor: Tensor) -> bool:
        """Whether this copy is on the host or on disk."""
        return id(tensor) in self._on_host

    def _free(self, place: Place, nbytes: int, key: int) -> None:
        self.left[place] += nbytes
        self._on_host.discard(key)


@dataclass(frozen=True)
class Storage:
    """Place and dtype of hidden states.

    Args:
        place: See `Place`.
        dtype: Dtype of the copies; that of the model's computation if None.
        budget: Budget for `auto`, shared by all copies that exist at a time.
        directory: Directory of the files; the system's directory for temporary files if None.
    """

    place: Place = "device"
    dtype: torch.dtype | None = None
    budget: Budget | None = None
    directory: Path | None = None

    @property
    def may_leave(self) -> bool:
        """Whether copies may be elsewhere than on the compute device."""
        return self.place != "device"

    @property
    def may_be_on_device(self) -> bool:
        """Whether copies may take the compute device's memory."""
        return self.place == "device" or (self.budget is not None and self.budget.left["device"] > 0)

    def is_on_host(self, tensor: Tensor) -> bool:
        """Whether a copy is in the host's memory, or mapped into it, whichever device computes."""
        return self.budget.is_on_host(tensor) if self.budget is not None else self.place != "device"

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate one copy.

        Args:
            shape: Shape of the copy.
            dtype: Dtype of the copy.
            device: Device that the model computes on.

        Raises:
            OSError: If it is to be on disk and there is no room for it.
        """
        place = self.place
        if place == "auto":
            assert self.budget is not None
            place = self._chosen(self.budget, math.prod(shape) * dtype.itemsize)
        if place == "disk":
            tensor = self._on_disk(shape, dtype)
        elif place == "host":
            tensor = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
        else:
            tensor = torch.empty(shape, dtype=dtype, device=device)
        if self.budget is not None:
            self.budget.take(place, tensor)
        return tensor

    @staticmethod
    def _chosen(budget: Budget, nbytes: int) -> Place:
        """Choose a place for `nbytes` bytes; a host without a budget has room as far as its memory is available."""
        place = budget.choose(nbytes)
        if place == "host" and budget.left["host"] == math.inf and nbytes > SHARE * (free := available_bytes()):
            log.warning(
                f"a copy of the hidden states ({readable(nbytes)}) goes to disk: it would take more than half of the "
                f"{readable(int(free))} that the host has available; model.activations: host keeps it there"
            )
            return "disk"
        return place

    def _on_disk(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        where = self.directory or Path(tempfile.gettempdir())
        try:
            with tempfile.TemporaryFile(dir=where) as file:
                return mapped(file, shape, dtype)
        except OSError as error:
            needed, free = math.prod(shape) * dtype.itemsize, shutil.disk_usage(where).free
            raise OSError(
                error.errno,
                f"model.activations: disk needs {readable(needed)} for one copy of the hidden states, got "
                f"{readable(free)} free in `{where}` ({error.strerror}); free space there, choose model.activations: "
                f"host or fewer data.num_sequences, or halve it with model.activations_dtype: bfloat16",
            ) from error


def _amount(option: str, text: str) -> int:
    try:
        return in_bytes(text)
    except ValueError as error:
        raise ValueError(f"model.{option}: {error}") from None


ON_DEVICE = Storage()
"""For signatures; it cannot change."""

ON_HOST = Storage("host")
"""Beside models whose blocks are offloaded."""
