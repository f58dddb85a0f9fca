"""What a window changes while it is under way: parked weights, fp32 precision, compiled code."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from recon.models.anatomy import Block
from recon.models.calls import forward_replaced
from recon.models.windows import Window


class Parking:
    """Holds the recovered weights of finished groups while the model has dense ones in their place.

    Args:
        model: Holds the windows.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._dense: dict[str, Tensor] = {}
        self._parked: dict[str, Tensor] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._parked

    def keep_dense(self, window: Window) -> None:
        """Copy the weights of `window`, still dense."""
        self._dense = {name: self.model.get_parameter(name).detach().clone() for name in window.owned}

    @torch.no_grad()
    def park(self, window: Window) -> None:
        """Exchange the weights of `window` for the dense ones."""
        for name in window.owned:
            parameter = self.model.get_parameter(name)
            self._parked[name] = parameter.detach().clone()
            parameter.copy_(self._dense.pop(name))

    @torch.no_grad()
    def clear(self) -> None:
        """Give the model all recovered weights."""
        for name, weight in self._parked.items():
            self.model.get_parameter(name).copy_(weight)
        self._parked.clear()


class Widened:
    """Parameters that are wider than the model's own precision for a while."""

    def __init__(self) -> None:
        self._own: list[tuple[nn.Parameter, torch.dtype]] = []

    def widen(self, blocks: Sequence[Block]) -> None:
        """Have all parameters of these blocks in fp32 until `narrow`."""
        self._own = [(parameter, parameter.dtype) for block in blocks for parameter in block.parameters().values()]
        for parameter, dtype in self._own:
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))

    def narrow(self) -> None:
        """Round to the model's own precision, in which a window is written and what follows sees it."""
        for parameter, dtype in self._own:
            parameter.data = parameter.data.to(dtype)
        self._own.clear()


def compiled(blocks: Sequence[Block]) -> ExitStack:
    """Run the submodules of these blocks compiled, until the stack is closed; hooks inside them may be left out.

    A block itself is not compiled, for attention is tapped and replaced between its submodules. Blocks of one kind
    share what was compiled for the first, since weights are inputs of the compiled code.
    """
    stack = ExitStack()
    for block in blocks:
        for module in block.module.children():
            stack.enter_context(forward_replaced(module, torch.compile(module.forward)))
    return stack
