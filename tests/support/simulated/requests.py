"""Requests by device: `.device`, `.to`, `device=` and the like are answered by tags."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.support.simulated.operations import Operations
from tests.support.simulated.tags import CPU, CUDA, device_of, is_pinned, key_of, normalised, pin, put

FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}
"""Functions that make their values on the host, and copy them to a device."""


class Requests(TorchFunctionMode):
    """Answers where tensors are, and moves them.

    Args:
        operations: The mode below, which tags what is made.
    """

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.operations, self.counts = operations, operations.counts
        self._answers = {
            Tensor.get_device: lambda x: 0 if device_of(x) == CUDA else -1,
            Tensor.cpu: lambda x: self.move(x, CPU),
            Tensor.cuda: lambda x, *args, **kwargs: self.move(x, CUDA),
            Tensor.is_pinned: lambda x, *args: is_pinned(x),
            Tensor.pin_memory: lambda x, *args: pin(x.clone()),
            Tensor.record_stream: lambda x, stream: None,
            Tensor.to: self._to,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer one call."""
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") == "__get__":
            return self._attribute(func, args)
        if func in self._answers:
            return self._answers[func](*args, **kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and device_of(args[0]) == CUDA:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        device = kwargs.get("device")
        if device is not None and not isinstance(device, Tensor):
            device = normalised(device)
            if device in (CPU, CUDA):
                return self._made(func, device, args, kwargs)
        if kwargs.pop("pin_memory", None):
            return pin(func(*args, **kwargs))
        return func(*args, **kwargs)

    def move(self, x: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        """A copy on another device; `x` itself if it is there."""
        if device.type == device_of(x).type:
            return x
        if x.requires_grad and torch.is_grad_enabled():
            return _Moved.apply(x, device, self)
        return self.copy_to(x, device, non_blocking)

    def copy_to(self, x: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        """A copy on another device, without gradient."""
        to_host = device == CPU
        self.counts.transfer(
            "to host" if to_host else "to device",
            x.nbytes,
            waits=not (non_blocking and (to_host or is_pinned(x))),  # torch makes pinned memory for what it returns
        )
        with self.operations.making_on(device), torch._C.DisableTorchFunction():
            return x.detach().clone()

    def _attribute(self, func: Any, args: Any) -> Any:
        attribute = getattr(func, "__self__", None)
        if attribute is Tensor.device:
            real = func(*args)
            return device_of(args[0]) if real.type == "cpu" else real
        if attribute is Tensor.is_cuda:
            return device_of(args[0]) == CUDA
        if attribute is Tensor.is_cpu:
            return func(*args) and device_of(args[0]) == CPU
        return func(*args)

    def _to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to`, in all its forms."""
        rest = list(args)
        if rest and isinstance(rest[0], Tensor):
            kwargs["other"] = rest.pop(0)
        elif rest and (rest[0] is None or isinstance(rest[0], str | int | torch.device)):
            kwargs["device"] = rest.pop(0)
        for name in ("dtype", "non_blocking", "copy"):
            if rest and (name != "dtype" or rest[0] is None or isinstance(rest[0], torch.dtype)):
                kwargs[name] = rest.pop(0)
        device, dtype = normalised(kwargs.pop("device", None)), kwargs.pop("dtype", None)
        if (other := kwargs.pop("other", None)) is not None:
            device, dtype = device_of(other), other.dtype
        copy, non_blocking = kwargs.pop("copy", False), kwargs.pop("non_blocking", False)
        if dtype is not None:
            kwargs["dtype"] = dtype
        if device is not None and device.type == "meta":
            return Tensor.to(x, device, **kwargs)
        moved = x if device is None else self.move(x, device, bool(non_blocking))
        if (dtype is not None and dtype != moved.dtype) or kwargs.get("memory_format") is not None:
            moved = Tensor.to(moved, **kwargs)
        return moved.clone() if copy and moved is x else moved

    def _made(self, func: Any, device: torch.device, args: Any, kwargs: dict[str, Any]) -> Any:
        """What a function makes on a device; its values are made on the CPU."""
        pinned = kwargs.pop("pin_memory", None)
        kwargs["device"] = CPU
        with self.operations.making_on(device):
            out = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            return out
        sources = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        if device == CUDA and func in FROM_DATA:
            if sources and device_of(sources[0]) == CUDA:
                return out
            self.counts.transfer("to device", out.nbytes, waits=True)
        if key_of(out) in {key_of(one) for one in sources}:
            out = out.clone()
        put(out, device)
        return pin(out) if pinned else out


class _Moved(torch.autograd.Function):
    """A move whose gradient moves back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: torch.device, requests: Requests) -> Tensor:
        """Move."""
        ctx.source, ctx.requests = device_of(x), requests
        return requests.copy_to(x, device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Move back."""
        return ctx.requests.move(gradients[0], ctx.source), None, None
