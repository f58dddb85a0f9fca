"""Forward passes of modules: the form of an output, hooks that keep it, forwards that are replaced for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class Halt(Exception):
    """Ends a forward pass whose remaining part nobody needs."""


@dataclass(frozen=True)
class Form:
    """The form of a module's output: a tensor, or a tuple or list that begins with one.

    Args:
        length: Number of elements; None for a tensor.
        container: `tuple` or `list`.
    """

    length: int | None
    container: type = tuple

    @classmethod
    def of(cls, output: Any, name: str) -> "Form":
        """Read the form off a real output of the module called `name`."""
        if isinstance(output, Tensor):
            return cls(None)
        if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
            return cls(len(output), type(output))
        raise ValueError(
            f"Blocks and token mixers must return a tensor or a tuple that begins with one, {name} "
            f"returned {type(output).__name__}. This model is not supported."
        )

    def wrap(self, tensor: Tensor) -> Any:
        """Return `tensor` in this form, with None for the other elements (caches, attention weights)."""
        return tensor if self.length is None else self.container([tensor, *[None] * (self.length - 1)])


def first_of(output: Any) -> Tensor:
    """Return the tensor of a module's output. Indexing a bare tensor would take its first sequence instead."""
    return output[0] if isinstance(output, (tuple, list)) else output


def collecting(outputs: list[Any], halt: bool = False) -> Callable[[nn.Module, Any, Any], None]:
    """Make a forward hook that appends the module's output to `outputs`, and ends the pass if `halt`."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        if halt:
            raise Halt

    return hook


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Shadow `module.forward` within the context; afterwards restore a forward that others (accelerate) have set."""
    previous = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch off dropout and layer drop within the context, whatever mode a trainer has put the model in."""
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True
