"""The fused experts of a model: its stacks of matrices, found by how they are multiplied.

A parameter of three dimensions may be a stack of experts or the kernel of a convolution, and a stack may hold its
matrices as out x in or in x out. The module tree tells neither. A stack is what a block multiplies with slice by slice,
when it is run with synthetic numbers: see `recon.models.mixers`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from recon.models.forwards import first_of
from recon.models.matrices import is_matrix
from recon.models.products import Product, Products, factors

EAGER = "eager"
"""The implementation of transformers that multiplies expert by expert."""

ExpertRows = Literal["routed", "all"]
"""Rows that the statistics of an expert are made from:

- `routed`: those that the router sends to it;
- `all`: all rows that enter the experts of its block, whatever the router says, so that no expert has too few.
"""

RANKINGS = {torch.topk, Tensor.topk, torch.max, Tensor.max, torch.argmax, Tensor.argmax, torch.sort, Tensor.sort}
"""Choose the highest scores."""


@dataclass
class ExpertStatistics:
    """How the statistics of experts are made, and which have little to be made of.

    Args:
        rows: Rows that they are made from.
        few: Name of each expert's matrix whose statistics had fewer rows than it has inputs -> rows.
    """

    rows: ExpertRows = "routed"
    few: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Stack:
    """A three-dimensional parameter whose slices are matrices.

    Args:
        is_transposed: Whether slices are held as in x out.
        rows_per_token: Rows that all slices together multiply with, for each token.
    """

    is_transposed: bool
    rows_per_token: float


@contextmanager
def expert_by_expert(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let modules with fused experts multiply slice by slice within the context, where they have a choice."""
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
    chosen = [(one, one._experts_implementation) for one in configs.values() if hasattr(one, "_experts_implementation")]
    try:
        for config, _ in chosen:
            config._experts_implementation = EAGER
        yield
    finally:
        for config, implementation in chosen:
            config._experts_implementation = implementation


class Multiplications(TorchFunctionMode):
    """Notes the products of a block with slices, and the modules whose outputs choose among as many slices.

    Args:
        block: With numbers in its parameters.
        num_tokens: Of all calls within the context together.

    Attributes:
        routers: Names of linear maps, and of modules that hold a matrix of their own, within the block.
        divided: Name of the first two-dimensional parameter that multiplies in parts, each a view of it; None if
            there is none. Experts that lie side by side in one matrix are no matrices of their own.
    """

    def __init__(self, block: nn.Module, num_tokens: int) -> None:
        super().__init__()
        self.routers: set[str] = set()
        self.divided: str | None = None
        self._num_tokens = num_tokens
        self._rows: Counter[tuple[str, bool]] = Counter()  # of each parameter, and whether its slices are in x out
        numbers = dict(block.named_parameters())
        stacked = {name: one for name, one in numbers.items() if one.ndim == 3}
        self._products, self._sizes = Products(stacked, self._note), {len(one) for one in stacked.values()}
        self._linear_maps = {name: module for name, module in block.named_modules() if is_matrix(module)}
        mapped = {f"{name}.weight" for name in self._linear_maps}
        self._others = {name: one for name, one in numbers.items() if one.ndim == 2 and name not in mapped}
        self._by_weight = {id(numbers[f"{name}.weight"]): name for name in self._linear_maps}
        owners = {name.rpartition(".")[0] for name, one in self._others.items() if self._sizes & {*one.shape}}
        self._owners = {
            name: block.get_submodule(name)
            for name in owners
            if name and not any(stack.startswith(f"{name}.") for stack in stacked)
        }
        self._inside: str | None = None  # the outermost module with a matrix of its own that is being computed
        self._latest: str | None = None  # the linear map, or module with a matrix of its own, that was computed last
        self._hooks = ExitStack()

    def __enter__(self) -> "Multiplications":
        """Watch linear maps, too."""
        for name, module in self._linear_maps.items():
            self._hooks.callback(module.register_forward_hook(partial(self._computed, name)).remove)
        for name, module in self._owners.items():
            self._hooks.callback(module.register_forward_pre_hook(partial(self._entered, name)).remove)
            self._hooks.callback(module.register_forward_hook(partial(self._left, name)).remove)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        """Stop to watch."""
        self._hooks.close()
        super().__exit__(*raised)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at linear maps and at choices among slices; products are seen by a mode of their own."""
        if func in RANKINGS and args[0].shape[-1:].numel() in self._sizes:
            self.routers.update(name for name in (self._inside or self._latest,) if name is not None)
        for _, factor in factors(func, (*args, *(kwargs or {}).values())):
            parts = [name for name, one in self._others.items() if _is_part(factor, one)]
            self.divided = self.divided or next(iter(parts), None)
        with self._products:
            output = func(*args, **(kwargs or {}))
        if func is F.linear:
            self._computed(self._by_weight.get(id(args[1])), None, args, output)
        return output

    @property
    def stacks(self) -> dict[str, Stack]:
        """Name of the parameter within the block -> stack."""
        return {name: Stack(turned, rows / self._num_tokens) for (name, turned), rows in self._rows.items()}

    def _computed(self, name: str | None, module: nn.Module | None, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):  # a router of its own kind may return its choice, too
            self._latest = name if output.shape[-1] in self._sizes else None

    def _entered(self, name: str, module: nn.Module, args: Any) -> None:
        self._inside = self._inside or name

    def _left(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._inside == name:
            self._inside = None
            self._computed(name, module, args, first_of(output))

    def _note(self, product: Product) -> None:
        self._rows[product.name, product.is_transposed] += product.inputs.numel() // product.inputs.shape[-1]


def _is_part(factor: Tensor, parameter: Tensor) -> bool:
    return factor.untyped_storage()._cdata == parameter.untyped_storage()._cdata and factor.numel() < parameter.numel()
