"""Changes to the model while a window is recovered: withheld weights, fp32 precision, gradients, compiled code."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from recon.models.anatomy import Block
from recon.models.forwards import forward_replaced
from recon.models.offload.transfers import copies_on_host
from recon.models.windows import Window


class WithheldWeights:
    """Recovered weights that the model gets only when its whole block is recovered.

    Until then the model has the dense weights in their place, for windows that `needs_dense_block`. Other windows pass
    through unchanged.

    Args:
        model: The model that holds the windows.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._dense: dict[str, Tensor] = {}
        self._withheld: dict[str, Tensor] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._withheld

    def keep_dense(self, window: Window) -> None:
        """Copy the weights of `window`, still dense, before it is pruned or loaded."""
        if window.needs_dense_block:
            self._dense = {name: self.model.get_parameter(name).detach().clone() for name in window.owned}

    @torch.no_grad()
    def withhold(self, window: Window) -> None:
        """Exchange the recovered weights of `window` for the dense ones."""
        if not window.needs_dense_block:
            return
        for name in window.owned:
            parameter = self.model.get_parameter(name)
            self._withheld[name] = parameter.detach().clone()
            parameter.copy_(self._dense.pop(name))

    def hand_over(self) -> None:
        """Give the model all recovered weights."""
        give(self.model, self._withheld)
        self._withheld.clear()


class StartCopies:
    """Copies on the host of the weights that a window begins with, as long as it may have to return to them.

    Args:
        model: The model that holds the windows.

    Attributes:
        weights: Name -> copy; empty between two windows.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights: dict[str, Tensor] = {}

    def keep(self, names: Iterable[str]) -> None:
        """Copy these parameters, in the precision that they have now, in place of the last ones."""
        self.drop()
        weights = {name: self.model.get_parameter(name).detach() for name in names}
        for device in {weight.device for weight in weights.values()}:
            there = {name: weight for name, weight in weights.items() if weight.device == device}
            self.weights |= zip(there, copies_on_host(list(there.values()), device), strict=True)

    def restore(self) -> None:
        """Give the model the weights that the window began with."""
        give(self.model, self.weights)

    def drop(self) -> None:
        """Free the copies."""
        self.weights.clear()


@torch.no_grad()
def give(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the parameters of the same names."""
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)


class Upcast:
    """The fp32 precision of the blocks that are trained, in a model of any other precision."""

    def __init__(self) -> None:
        self._own: list[tuple[nn.Parameter, torch.dtype]] = []

    def upcast(self, blocks: Sequence[Block]) -> None:
        """Convert all parameters of these blocks to fp32 until `restore`; fp64 stays as it is."""
        self._own = [(parameter, parameter.dtype) for block in blocks for parameter in block.parameters().values()]
        for parameter, dtype in self._own:
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))

    def restore(self) -> None:
        """Round to the model's own precision, in which a window is written and the following windows see it."""
        for parameter, dtype in self._own:
            parameter.data = parameter.data.to(dtype)
        self._own.clear()


def freeze(optimizer: torch.optim.Optimizer) -> None:
    """Freeze the parameters of an optimizer; drop their gradients and its state, so memory does not grow with depth."""
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.requires_grad_(False)
        parameter.grad = None
        increment_version(parameter)  # fused optimizers do not, and an offloaded model keeps what has changed
    optimizer.state.clear()


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
