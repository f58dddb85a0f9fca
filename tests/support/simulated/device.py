"""The simulated device as a context: the two modes, and what torch offers for CUDA beside tensors."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

from tests.support.simulated.counts import Counts
from tests.support.simulated.operations import Operations
from tests.support.simulated.requests import Requests
from tests.support.simulated.tags import CUDA


class Stream:
    """A stream of the device; everything is done at once, in order."""

    def __init__(self, device: Any = None, *args: Any, **kwargs: Any) -> None:
        self.device = CUDA

    def synchronize(self) -> None:
        """Do nothing: all is done."""

    def wait_stream(self, other: "Stream") -> None:
        """Do nothing: the other has nothing left to do."""


class _Autocast(torch.autocast):
    """Autocast for the device is the CPU's."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _device_of_storage(storage: torch.UntypedStorage) -> torch.device:
    return vars(storage).get("simulated_device") or torch._C.StorageBase.device.__get__(storage)  # type: ignore[attr-defined]


def _clone_of_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    clone = torch.UntypedStorage(storage.nbytes()).copy_(storage)
    vars(clone).update(vars(storage))
    return clone


@contextmanager
def simulated_cuda() -> Iterator[Counts]:
    """Have a device `cuda:0` within the context, in this thread."""
    counts = Counts()
    operations = Operations(counts)
    requests, engine = Requests(operations), torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        # `backward` is overridable: the mode is off within it, and hooks would see the CPU.
        with requests:
            return engine(*args, **kwargs)

    replaced = [
        (torch, "autocast", _Autocast),
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "current_stream", lambda device=None: Stream()),
        (torch.cuda, "stream", lambda stream: nullcontext()),
        (torch.cuda, "synchronize", lambda device=None: counts.wait("synchronize")),
        (torch.cuda, "get_device_name", lambda device=None: "simulated"),
        (torch.accelerator, "synchronize", lambda device=None: counts.wait("synchronize")),
        (torch.autograd, "_engine_run_backward", run_backward),
        (torch.Tensor, "record_stream", lambda tensor, stream: None),
        (torch.UntypedStorage, "device", property(_device_of_storage)),
        (torch.UntypedStorage, "clone", _clone_of_storage),
    ]
    with ExitStack() as stack:
        for place, name, stand_in in replaced:
            stack.enter_context(mock.patch.object(place, name, stand_in))
        stack.enter_context(requests)
        stack.enter_context(operations)
        yield counts
