"""All rows that enter the experts of a block, as inputs of each of them, whatever the router says."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recon.models.matrices import Matrix


@contextmanager
def visiting_all_experts(slices: Sequence[Matrix], watch: Callable[[bool], None]) -> Iterator[None]:
    """Send all rows through every expert before each call within the context.

    Args:
        slices: Matrices of the experts.
        watch: Is told whether the products that follow are those of all rows.

    Raises:
        ValueError: At a call, if the module does not take the choice of experts as an argument.
    """
    owners = {id(one.module): one for one in slices}
    watch(False)
    with ExitStack() as stack:
        for one in owners.values():
            hook = _visiting(one, watch)
            stack.callback(one.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _visiting(matrix: Matrix, watch: Callable[[bool], None]) -> Callable[..., None]:
    """Make the forward pre-hook of a module with experts: it calls the module once more for each of them."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        choice = next((one for one in given if isinstance(one, Tensor) and _is_choice(one)), None)
        if choice is None:
            raise ValueError(
                f"pruning.experts: all sends all rows through every expert, which needs a module that takes the "
                f"choice of experts as whole numbers [token, choice], got {type(module).__name__} with "
                f"`{matrix.parameter_name}`; choose pruning.experts: routed"
            )
        watch(True)
        for expert in range(len(matrix.parameter)):

            def with_all_rows(one: Any, expert: int = expert) -> Any:
                if not isinstance(one, Tensor) or one.shape != choice.shape:
                    return one
                return torch.full_like(one[:, :1], expert) if one is choice else torch.ones_like(one[:, :1])

            module.forward(*map(with_all_rows, args), **{name: with_all_rows(one) for name, one in kwargs.items()})
        watch(False)

    return hook


def _is_choice(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and not tensor.is_floating_point() and tensor.dtype != torch.bool
