"""Operations on the simulated device: refuse mixed devices, tag results, count transfers and waits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.simulated.counts import Counts, place
from tests.support.simulated.tags import CPU, CUDA, device_of, is_pinned, key_of, put

aten = torch.ops.aten

TRANSFERS = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
"""Operations whose tensors may be on different devices."""

INDEXING = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
"""Operations that take indices on the host, too, and then copy them to the device."""

WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten._linalg_check_errors.default,
}
"""Operations whose result, or the shape of it, the host needs."""


class MixedDevices(RuntimeError):
    """An operation was given tensors of several devices, which torch refuses."""


class Operations(TorchDispatchMode):
    """Checks every operation, and tags its results with the device of its arguments.

    Args:
        counts: Receives transfers and waits.
    """

    supports_higher_order_operators = True

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts
        self._destination: torch.device | None = None

    @contextmanager
    def making_on(self, device: torch.device) -> Iterator[None]:
        """Make all new tensors on a device, whatever they are made from."""
        before, self._destination = self._destination, device
        try:
            yield
        finally:
            self._destination = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        if func in INDEXING and len(args) > 1:
            self._require_indices(func, args)
            _require_one_device(func, [args[0], *_tensors(args[2:])])
        elif func not in TRANSFERS and self._destination is None:
            _require_one_device(func, tensors)
        if func in WAITING and any(device_of(one) == CUDA for one in tensors):
            self.counts.wait(func._schema.name)
        if func is aten.copy_.default:
            self._count_copy(*args[:2], non_blocking=len(args) > 2 and args[2])
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        device = self._destination or _device_of_result(func, args, tensors)
        if device == CUDA:
            known = {key_of(one) for one in tensors}
            for one in _tensors(out):
                if key_of(one) not in known:
                    put(one, CUDA)
        return out

    def _require_indices(self, func: Any, args: Any) -> None:
        """Indices on the host are copied to the device; masks are counted there first, and the host waits for that."""
        for index in _tensors(args[1]):
            if device_of(args[0]) == CPU and device_of(index) == CUDA:
                raise MixedDevices(f"{func} on the host with indices on the device in {place()}")
            if device_of(args[0]) == CUDA and device_of(index) == CPU:
                self.counts.transfer("to device", index.nbytes, waits=True)
            elif device_of(index) == CUDA and index.dtype in (torch.bool, torch.uint8):
                self.counts.wait("index by a mask")

    def _count_copy(self, target: Tensor, source: Tensor, non_blocking: bool) -> None:
        if device_of(target) == device_of(source):
            return
        on_host = source if device_of(source) == CPU else target
        direction = "to host" if on_host is target else "to device"
        self.counts.transfer(direction, target.nbytes, waits=not (non_blocking and is_pinned(on_host)))


def _require_one_device(func: Any, tensors: list[Tensor]) -> None:
    """Refuse several devices; a tensor without dimensions may come from the host, unless the operation changes it."""
    sized = {device_of(one) for one in tensors if one.ndim > 0}
    if func._schema.name.endswith("_") and tensors:
        sized.add(device_of(tensors[0]))
    if len(sized) > 1 or (sized == {CPU} and any(device_of(one) == CUDA for one in tensors)):
        given = [(tuple(one.shape), str(one.dtype), str(device_of(one))) for one in tensors]
        raise MixedDevices(f"{func} got {given} in {place()}")


def _device_of_result(func: Any, args: Any, tensors: list[Tensor]) -> torch.device:
    if func is aten._to_copy.default:
        return device_of(args[0])
    deciding = [one for one in tensors if one.ndim > 0] or tensors
    return CUDA if any(device_of(one) == CUDA for one in deciding) else CPU


def _tensors(nested: Any) -> list[Tensor]:
    return [one for one in tree_leaves(nested) if isinstance(one, Tensor)]
