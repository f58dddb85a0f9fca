"""The fused experts of a model: its stacks of matrices, found by how they are multiplied.

A parameter of three dimensions may be a stack of experts or the kernel of a convolution, and a stack may hold its
matrices as out x in or in x out. The module tree tells neither. So a copy of the model without numbers is run on four
tokens: all its parameters are zeros that share a few bytes. A stack is what it multiplies with slice by slice.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from recon.basics.seeds import isolated_seed
from recon.distributed.parameters import whole_shape
from recon.models.matrices import is_matrix
from recon.models.meta import parameters_on_meta
from recon.models.products import Product, Products

NUM_TOKENS = 4
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


@dataclass
class Stack:
    """A three-dimensional parameter whose slices are matrices.

    Args:
        is_transposed: Whether slices are held as in x out.
        rows_per_token: Rows that all slices together multiply with, for each token.
    """

    is_transposed: bool
    rows_per_token: float


@dataclass
class FusedExperts:
    """What the blocks of a model hold beside plain linear maps; empty without three-dimensional parameters.

    Args:
        stacks: Full parameter name -> stack.
        routers: Full names of the linear maps whose outputs choose among as many slices.
    """

    stacks: dict[str, Stack] = field(default_factory=dict)
    routers: set[str] = field(default_factory=set)


_found: dict[Any, FusedExperts] = {}
"""Class and configuration of a model -> its experts: several models of a run have the same."""


def find_experts(model: PreTrainedModel, names: Sequence[str]) -> FusedExperts:
    """Find the stacks and routers in the blocks of a model. Its parameters may be anywhere; they are not read.

    Args:
        model: The model.
        names: Full names of its blocks.

    Raises:
        ValueError: If a copy of the model cannot be made or run.
    """
    kinds = {name: _kind(model.get_submodule(name)) for name in names}
    if not any(_stackable(kind) for kind in kinds.values()):
        return FusedExperts()
    key = type(model), model.config.to_json_string(), tuple(names)
    if key not in _found:
        try:
            with unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad():
                _found[key] = _observed(model, kinds)
        except Exception as error:  # whatever code the model comes with
            raise ValueError(
                f"recon finds fused experts by running a copy of the model on {NUM_TOKENS} tokens, got "
                f"{type(error).__name__} from {type(model).__name__}: {error}. This model is not supported."
            ) from error
    return _found[key]


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


Kind = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of the parameters of a block."""


def _kind(block: nn.Module) -> Kind:
    return tuple((name, tuple(whole_shape(one))) for name, one in block.named_parameters())


def _stackable(kind: Kind) -> list[str]:
    return [name for name, shape in kind if len(shape) == 3 and sum(size > 1 for size in shape) > 1]


def _observed(model: PreTrainedModel, kinds: Mapping[str, Kind]) -> FusedExperts:
    """Run one block of each kind, and say of all blocks what is seen in these."""
    names = list(kinds)
    first = {kinds[name]: name for name in reversed(names) if _stackable(kinds[name])}
    last = max(names.index(name) for name in first.values())
    clone = _without_numbers(model)
    if any(_kind(clone.get_submodule(name)) != kind for name, kind in kinds.items()):
        raise ValueError("its parameters are not those of its configuration")
    seen = _Seen(clone, list(first.values()))
    if last + 1 < len(names):
        clone.get_submodule(names[last + 1]).register_forward_pre_hook(_halt)
    padding = getattr(clone.config.get_text_config(), "pad_token_id", None)
    tokens = [token for token in range(NUM_TOKENS + 1) if token != padding][:NUM_TOKENS]
    with seen, suppress(_Halt):
        clone(input_ids=torch.tensor([tokens]), use_cache=False)
    found = FusedExperts()
    for name, kind in kinds.items():
        if kind in first:
            for inner in _stackable(kind):
                if stack := seen.stacks.get(f"{first[kind]}.{inner}"):
                    found.stacks[f"{name}.{inner}"] = stack
            of_kind = [one for one in seen.routers if one.startswith(f"{first[kind]}.")]
            found.routers.update(name + one.removeprefix(first[kind]) for one in of_kind)
    return found


class _Halt(Exception):
    """Ends the pass behind the last block that is needed."""


def _halt(module: nn.Module, args: Any) -> None:
    raise _Halt


def _without_numbers(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model of the same configuration whose parameters are zeros, expanded from a few numbers."""
    config = copy.deepcopy(model.config)
    config._experts_implementation = EAGER
    with torch.device("cpu"), parameters_on_meta(), isolated_seed(0):
        clone = type(model)(config).eval()
    for module in clone.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros(())
            if parameter.ndim == 3:  # slices at different offsets, rows and columns with different strides
                num, _, columns = parameter.shape
                expanded = torch.zeros(num + columns).as_strided(parameter.shape, (1, 0, 1))
            else:
                expanded = zeros.expand(parameter.shape)
            setattr(module, name, nn.Parameter(expanded, requires_grad=False))
    return clone


class _Seen(TorchFunctionMode):
    """Notes products with slices, and the linear maps whose outputs are ranked to choose among as many slices.

    Attributes:
        stacks: Full parameter name -> stack.
        routers: Full names of linear maps.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        super().__init__()
        self.stacks: dict[str, Stack] = {}
        self.routers: set[str] = set()
        blocks = {name: model.get_submodule(name) for name in names}
        stacked = {
            f"{name}.{inner}": one
            for name, block in blocks.items()
            for inner, one in block.named_parameters()
            if one.ndim == 3
        }
        self._products, self._sizes = Products(stacked, self._note), {len(one) for one in stacked.values()}
        self._linear_maps = {
            id(module.get_parameter("weight")): f"{name}.{inner}"
            for name, block in blocks.items()
            for inner, module in block.named_modules()
            if is_matrix(module)
        }
        self._latest: str | None = None  # the linear map that was computed last

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at linear maps and at choices among slices; products are seen by a mode of their own."""
        if func is F.linear:
            self._latest = self._linear_maps.get(id(args[1]))
        elif func in RANKINGS and self._latest is not None and args[0].shape[-1:].numel() in self._sizes:
            self.routers.add(self._latest)
        with self._products:
            output = func(*args, **(kwargs or {}))
        if func is F.linear and output.shape[-1] not in self._sizes:
            self._latest = None
        return output

    def _note(self, product: Product) -> None:
        rows = product.inputs.numel() // product.inputs.shape[-1] / NUM_TOKENS
        stack = self.stacks.setdefault(product.name, Stack(product.is_transposed, 0.0))
        stack.rows_per_token += rows
