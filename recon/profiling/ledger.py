"""The ledger: live storages, their categories and their peak bytes."""

import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from recon.basics.trees import tensors_in
from recon.profiling.entries import Category, Entry, Holders, Peak, Side
from recon.profiling.listener import Listener
from recon.profiling.scan import Scanner
from recon.profiling.sums import add_up

Item = TypeVar("Item")

_open: "list[Ledger]" = []


def claim(category: Category, *tensors: Tensor, on_host: bool = False) -> None:
    """Label `tensors` where they are made; nothing happens unless a ledger is open."""
    for ledger in _open:
        ledger.label(category, tensors, on_host)


@contextmanager
def followed(stage: str) -> Iterator[None]:
    """Have an open ledger follow new tensors inside, unless it has followed this stage before."""
    with ExitStack() as stack:
        for ledger in _open:
            stack.enter_context(ledger.following(stage))
        yield


def sampled(items: Iterable[Item], stage: str) -> Iterator[Item]:
    """Yield `items`; production and use of the first are `followed`, for the others are like it."""
    remaining = iter(items)
    with followed(stage):
        for first in remaining:
            yield first
            del first  # a batch's logits, say, which would live as long as all others
            break
    yield from remaining


class Ledger:
    """Follows storages from birth to death; views of one count once.

    The order of calls is `open`, `listen` and `pause` any number of times, `close`. While it does not listen, deaths
    are still seen, births are not. It is to be closed whatever happens.

    Args:
        holders: Class -> tensors of its objects. Parameters, with weights and gradients, come first in any case.

    Attributes:
        device: The device that computes. With an accelerator, all CPU tensors are on the host's side.
        stage: Name of the current step of work.
        peaks: Side -> peak since the last `reset`.
    """

    def __init__(self, holders: Holders) -> None:
        self.device = torch.device("cpu")
        self.stage = ""
        self.peaks: dict[Side, Peak] = {}
        self._scanner = Scanner(holders)
        self._shapes: set[torch.Size] = set()  # of matrices: a bool tensor of such a shape is an unpacked mask
        self._listener: Listener | None = None
        self._forget()

    @property
    def is_open(self) -> bool:
        """Whether an account is open."""
        return self._started is not None

    @property
    def listens(self) -> bool:
        """Whether births are followed."""
        return self._listener is not None

    def open(self, stage: str, listen: bool = False) -> None:
        """Open an account with all tensors that live now; earlier peaks stay until `reset`.

        Args:
            stage: Name of the current step of work.
            listen: Whether to follow births from now on.
        """
        assert not self.is_open
        self._started, self.stage = time.monotonic(), stage
        try:
            self._scan()
        except BaseException:
            self._forget()
            raise
        _open.append(self)
        if listen:
            self._listen()

    def remember(self) -> None:
        """Note the holders that exist, before `gc.freeze` hides them from later scans."""
        self._scanner.remember()

    def reset(self) -> None:
        """Forget all peaks."""
        assert not self.is_open
        self.peaks = {}

    def listen(self) -> None:
        """Follow births until `pause`, which must be called within the same contexts."""
        if self._listener is None:
            self._scan()  # for what was born meanwhile
            self._listen()

    def pause(self) -> None:
        """Stop following births for a while."""
        if self._listener is not None:
            listener, self._listener = self._listener, None
            listener.__exit__(None, None, None)

    @contextmanager
    def following(self, stage: str) -> Iterator[None]:
        """Follow births inside; nothing happens if this stage of the account was followed before."""
        if stage in self._followed:
            yield
            return
        self._followed.add(stage)
        before, self.stage, listened = self.stage, stage, self.listens
        self.listen()
        listener = self._listener
        try:
            yield
        finally:
            # A generator that an exception left behind may come here when another account listens.
            if self._listener is listener:
                self.stage = before
                if not listened:
                    self.pause()

    def close(self) -> dict[Side, Peak]:
        """Close the account, if one is open, and return the peak of each side."""
        self.pause()
        if self in _open:
            _open.remove(self)
        try:
            if self.is_open:
                self.settle()
        finally:
            self._forget()
        return self.peaks

    def look(self, stage: str) -> dict[Side, Peak]:
        """Count the tensors that live now, as far as Python sees them; a peak if they are more."""
        assert not self.is_open
        self._started, self.stage = time.monotonic(), stage
        return self.close()

    def forward(self, stage: str) -> None:
        """Begin a training step: its new tensors may be kept for the backward pass."""
        self.stage, self._is_backward, self._candidates = stage, False, set()

    def backward(self, stage: str) -> None:
        """Begin the backward pass: live tensors of the step are kept for it."""
        self.stage, self._is_backward = stage, True
        self._keep()

    def step(self, stage: str) -> None:
        """End the backward pass."""
        self.stage, self._is_backward, self._candidates = stage, False, None

    def label(self, category: Category, tensors: Any, on_host: bool = False) -> None:
        """Label the tensors in nested containers; earlier labels stay.

        Args:
            category: Their category.
            tensors: The tensors; unknown ones are live from now on.
            on_host: Whether they stay on the host, with an accelerator too.
        """
        for tensor in tensors_in(tensors):
            entry = self._entry(tensor, None)
            if entry is not None:
                entry.on_host |= on_host
                if entry.category in (None, "activations"):
                    entry.category = category

    def settle(self) -> None:
        """Scan the holders, and add up the events."""
        self._scan()
        events, self._events = self._events, []  # a storage may die while they are added up
        self._opening = add_up(self._opening, events, self.peaks)

    def live(self) -> dict[int, Entry]:
        """Identity of each live storage -> its entry."""
        self._scan()
        return {key: ref.entry for key, ref in list(self._live.items())}

    def _listen(self) -> None:
        self._listener = Listener(self._born)
        self._listener.__enter__()

    def _born(self, out: Any, operation: Any) -> None:
        """An operation returned `out`."""
        for tensor in (out,) if isinstance(out, Tensor) else tensors_in(out):
            entry = self._entry(tensor, operation)
            if entry is not None and self._candidates is not None and entry.operation is operation:
                if not self._is_backward or torch.is_grad_enabled():  # checkpoints compute the forward pass again
                    self._candidates.add(entry)
                else:
                    self._keep()

    def _keep(self) -> None:
        for entry in self._candidates or ():
            if entry.category is None:
                entry.category = "activations"
        if self._candidates:
            self._candidates = set()

    def _entry(self, tensor: Tensor, operation: Any) -> Entry | None:
        """The entry of a tensor's storage, which begins now if there is none; None if it takes no memory."""
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            tensor = getattr(tensor, "_local_tensor", tensor)  # what a sharded tensor has here
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # sparse tensors have none
            return None
        key = id(storage)  # of an object that lives as long as the memory does
        is_mask = tensor.dtype is torch.bool and tensor.shape in self._shapes
        if key in self._live:
            entry = self._live[key].entry
            if is_mask and entry.category is None:
                entry.category = "masks"
            return entry
        size, kind = storage.nbytes(), storage.device.type
        if size == 0 or kind == "meta" or self._started is None or (kind == "cpu" and storage.filename is not None):
            return None
        is_left = kind == "cpu" and self.device.type != "cpu"
        module = None if self._listener is None else self._listener.module
        seconds = time.monotonic() - self._started
        entry = Entry(size, is_left, "masks" if is_mask else None, self.stage, seconds, operation, module)
        self._live[key] = _Storage(storage, self._died, key, entry)
        self._events.append(entry)
        return entry

    def _died(self, ref: "_Storage") -> None:
        if self._live.pop(ref.key, None) is not None:
            self._events.append(ref.entry)
            if self._candidates:
                self._candidates.discard(ref.entry)

    def _scan(self) -> None:
        """Find all tensors that Python knows, and label those of holders."""
        found = self._scanner.scan()
        self._shapes.update(one.shape for one in found.parameters if one.ndim == 2)
        for held in found.held:
            self.label(held.category, held.tensors, held.on_host)
        for tensor in found.tensors:
            self._entry(tensor, None)

    def _forget(self) -> None:
        self._live: dict[int, _Storage] = {}
        self._events: list[Entry] = []
        self._opening: list[Entry] = []
        self._followed: set[str] = set()
        self._candidates: set[Entry] | None = None
        self._is_backward = False
        self._started: float | None = None


class _Storage(weakref.ref):
    """A storage that is alive."""

    __slots__ = ("entry", "key")

    def __new__(cls, storage: Any, died: Callable[[Any], None], key: int, entry: Entry) -> "_Storage":
        return super().__new__(cls, storage, died)

    def __init__(self, storage: Any, died: Callable[[Any], None], key: int, entry: Entry) -> None:
        self.key, self.entry = key, entry
