"""Observation of each tensor that an operation makes, and of the running module.

This file alone uses an interface of torch that is not public: `torch.utils._python_dispatch`.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode


class Listener(TorchDispatchMode):
    """Reports the results of operations inside.

    It must be entered and left within the same contexts. `torch.inference_mode`, switched on or off, restores the
    dispatcher's keys when it ends: a mode that was left inside would then be half on.

    Args:
        tell: Receives each result with its operation.
    """

    supports_higher_order_operators = True

    def __init__(self, tell: Callable[[Any, Any], None]) -> None:
        super().__init__()
        self._tell = tell
        self._modules: list[nn.Module] = []

    @property
    def module(self) -> weakref.ref[nn.Module] | None:
        """The innermost running module."""
        return weakref.ref(self._modules[-1]) if self._modules else None

    def __enter__(self) -> "Listener":
        self._handles = [
            register_module_forward_pre_hook(lambda module, args: self._modules.append(module)),
            register_module_forward_hook(lambda module, args, output: self._leave(), always_call=True),
        ]
        return super().__enter__()  # pyright: ignore[reportReturnType]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self._handles:
            self._handles.pop().remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and report its result."""
        out = func(*args, **(kwargs or {}))
        self._tell(out, func)
        return out

    def _leave(self) -> None:
        if self._modules:  # not if it was entered before
            self._modules.pop()
