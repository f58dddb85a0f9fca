"""The token mixer of a block: the outermost submodule whose output at one position depends on other positions.

It is attention, a state-space mixer, a linear recurrence, a short convolution: it is found by what it does and not by
its name. Each kind of block is run on seven tokens with synthetic numbers, and each of its submodules is run again with
another first token. The same pass shows the linear maps that are never called, the stacks of experts and the routers.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recon.basics.trees import map_tensors, tensors_in
from recon.distributed.parameters import whole_shape
from recon.models.experts import Multiplications, Stack
from recon.models.forwards import Form, Halt, first_of, forward_replaced
from recon.models.matrices import is_matrix
from recon.models.synthetic import run_synthetic

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Their kernels are trained and never pruned."""

LENGTH = 7  # tokens of the experiment; no other size of a tensor is likely to be 7
MIN_RELATIVE_CHANGE = 1e-4  # of the other tokens; rounding stays below


@dataclass(frozen=True)
class Findings:
    """What an experiment shows about a block. Names are relative to it.

    Args:
        kind: Blocks of the same kind have equal modules.
        mixers: The outermost submodules with weights that mix tokens, in the order of their calls.
        mixer: The one where the block is divided: the first, if all others read its output, it is as wide as that of
            the block, and the rest of the block has weights, too; None otherwise.
        uncalled: The linear maps that the model does not call.
        routers: The linear maps, and the modules with a matrix of their own, whose outputs choose among experts.
        stacks: Name of each parameter that holds a stack of experts -> stack.
        divided: As in `Multiplications`.
    """

    kind: str
    mixers: tuple[str, ...]
    mixer: str | None
    uncalled: frozenset[str]
    routers: frozenset[str]
    stacks: dict[str, Stack]
    divided: str | None


_findings: WeakKeyDictionary[PreTrainedModel, tuple[list[nn.Module], list[Findings]]] = WeakKeyDictionary()
"""Modules and findings of models that were examined: later, an engine may have taken their parameters away."""


def examine(model: PreTrainedModel, names: Sequence[str], blocks: Sequence[nn.Module]) -> list[Findings]:
    """Find the token mixers of the blocks of a model; of blocks with equal modules one is run.

    Args:
        model: The model; it is left as it was, and may have no numbers.
        names: Module names of the blocks, for messages.
        blocks: Its blocks, in the order of depth.

    Raises:
        ValueError: If the model cannot be run on seven tokens, or skips a block.
    """
    modules = [module for block in blocks for module in block.modules()]
    known, findings = _findings.get(model, ([], []))
    if len(known) == len(modules) and all(one is other for one, other in zip(known, modules, strict=True)):
        return findings
    # A forward of its own makes a block unlike the others.
    own = [f"{index}" * ("forward" in vars(one)) for index, one in enumerate(blocks)]
    kinds = [f"{one}{_shapes(one)}{forward}" for one, forward in zip(blocks, own, strict=True)]
    found = _experiment(model, names, blocks, kinds)
    _findings[model] = modules, [found[kind] for kind in kinds]
    return _findings[model][1]


def _shapes(block: nn.Module) -> dict[str, list[int]]:
    return {name: list(whole_shape(one)) for name, one in block.named_parameters()}


def _experiment(
    model: PreTrainedModel, names: Sequence[str], blocks: Sequence[nn.Module], kinds: list[str]
) -> dict[str, Findings]:
    found: dict[str, Findings] = {}
    outputs: dict[str, Any] = {}

    def replacing(index: int) -> Callable[..., Any]:
        block, kind, forward = blocks[index], kinds[index], blocks[index].forward

        def run(*args: Any, **kwargs: Any) -> Any:
            if kind in found:
                return Form.of(outputs[kind], names[index]).wrap(args[0] if args else kwargs["hidden_states"])
            trial = _Trial(block, forward, args, kwargs)
            found[kind], outputs[kind] = trial.findings(kind), trial.output
            if len(found) == len(set(kinds)):
                raise Halt
            return trial.output

        return run

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(forward_replaced(block, replacing(index)))
        _run(model)
    missing = [name for name, kind in zip(names, kinds, strict=True) if kind not in found]
    if missing:
        raise ValueError(
            f"The model must call all {len(blocks)} blocks, it did not call {missing[0]}. Load the model without early "
            f"exit or layer skipping."
        )
    return found


def entered_first(model: PreTrainedModel, lists: Mapping[str, nn.ModuleList]) -> str | None:
    """Return the name of the list whose first item the model calls before those of the others; None if it calls none.

    Raises:
        ValueError: If the model cannot be run on seven tokens.
    """
    entered: list[str] = []

    def entering(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            entered.append(name)
            raise Halt

        return hook

    with ExitStack() as stack:
        for name, one in lists.items():
            stack.callback(one[0].register_forward_pre_hook(entering(name)).remove)
        _run(model)
    return entered[0] if entered else None


def _run(model: PreTrainedModel) -> None:
    """Run the model on seven tokens, up to a `Halt`.

    Raises:
        ValueError: If it cannot be run.
    """
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    tokens = [token for token in range(1, LENGTH + 2) if token != padding][:LENGTH]
    try:
        with suppress(Halt):
            run_synthetic(model, tokens)
    except Exception as error:  # the model's own code may raise anything
        raise ValueError(
            f"A model must run on {LENGTH} tokens on a CPU with synthetic numbers, by which recon finds token mixers "
            f"and experts, {type(model).__name__} raised {type(error).__name__}: {error}"
        ) from error


class _Trial:
    """One run of a block with its calls of submodules noted.

    Args:
        block: The block.
        forward: Its forward.
        args: Positional arguments of its call.
        kwargs: Keyword arguments of its call.

    Attributes:
        output: What it returns.
        called: Names of all submodules that it calls.
        calls: Name -> arguments of the first call, for submodules called by no other one, in the order of calls.
        multiplications: Its products with experts.
    """

    def __init__(self, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.block, self.forward = block, forward
        self.args, self.kwargs = _copied((args, kwargs))
        self.called: set[str] = set()
        self.calls: dict[str, Any] = {}
        with Multiplications(block, LENGTH) as self.multiplications:
            self.output = self._run(self.calls, self.called)

    def _run(self, calls: dict[str, Any], called: set[str]) -> Any:
        inside: list[str] = []

        def entering(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                called.add(name)
                if not inside:
                    calls.setdefault(name, _copied((args, kwargs)))
                inside.append(name)

            return hook

        with ExitStack() as stack:
            for name, module in self.block.named_modules():
                if name:
                    handles = (
                        module.register_forward_pre_hook(entering(name), with_kwargs=True),
                        module.register_forward_hook(lambda *_: inside.pop() and None),
                    )
                    stack.callback(lambda both=handles: [handle.remove() for handle in both])
            args, kwargs = _copied((self.args, self.kwargs))
            return self.forward(*args, **kwargs)

    def findings(self, kind: str) -> Findings:
        """Run the submodules again."""
        weights = {
            f"{name}.{inner}"
            for name, module in self.block.named_modules()
            for inner, one in module.named_parameters(recurse=False)
            if one.ndim > 1 and not isinstance(module, CONVOLUTIONS)
        }
        mixers = [name for name in self.calls if _within(weights, name) and self._mixes(name)]
        has_rest = mixers and len(_within(weights, mixers[0])) < len(weights)
        divides = has_rest and self._returns_hidden(mixers[0]) and self._all_read(mixers)
        matrices = {name for name, module in self.block.named_modules() if is_matrix(module)}
        kinds = {_without_numbers(name) for name in self.called}
        uncalled = frozenset(name for name in matrices if _without_numbers(name) not in kinds)
        return Findings(
            kind,
            tuple(mixers),
            mixers[0] if divides else None,
            uncalled,
            frozenset(self.multiplications.routers),
            self.multiplications.stacks,
            self.multiplications.divided,
        )

    def _mixes(self, name: str) -> bool:
        """Tell whether the other tokens change when the first one does."""
        module, (args, kwargs) = self.block.get_submodule(name), self.calls[name]
        outputs = []
        for change in (_same, _first_changed):
            given, named = map_tensors(_copied((args, kwargs)), change)
            outputs.append(first_of(module(*given, **named)))
        if not all(isinstance(one, Tensor) and LENGTH in one.shape for one in outputs):
            return False
        before, after = (one.narrow(one.shape.index(LENGTH), 1, LENGTH - 1).float() for one in outputs)
        return bool((after - before).norm() > MIN_RELATIVE_CHANGE * before.norm())

    def _returns_hidden(self, name: str) -> bool:
        """Tell whether the output is as wide as that of the block, which may hold several streams side by side."""
        args, kwargs = _copied(self.calls[name])
        output = self.block.get_submodule(name)(*args, **kwargs)
        return first_of(output).shape[-1] == first_of(self.output).shape[-1]

    def _all_read(self, mixers: list[str]) -> bool:
        """Tell whether the input of each mixer changes when the output of the first one does."""
        calls: dict[str, Any] = {}

        def changed(module: nn.Module, args: Any, output: Any) -> Any:
            return map_tensors(output, lambda one: one + one.abs().mean() if one.is_floating_point() else one)

        handle = self.block.get_submodule(mixers[0]).register_forward_hook(changed)
        try:
            self._run(calls, set())
        finally:
            handle.remove()
        pairs = [(tensors_in(self.calls[name]), tensors_in(calls[name])) for name in mixers[1:]]
        return not any(all(torch.equal(*both) for both in zip(*pair, strict=True)) for pair in pairs)


def _copied(calls: Any) -> Any:
    """Copy the tensors of arguments, which a module may change in place."""
    return map_tensors(calls, torch.clone)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _first_changed(tensor: Tensor) -> Tensor:
    """Change what belongs to the first token: of hidden states, and of their angles and masks."""
    if tensor.is_floating_point() and tensor.ndim > 1 and LENGTH in tensor.shape:
        first = tensor.select(tensor.shape.index(LENGTH), 0)
        noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(1))
        first.add_(noise.to(first) * (first.abs().mean() + 1))
    return tensor


def _within(names: set[str], module: str) -> set[str]:
    return {name for name in names if name.startswith(f"{module}.")}


def _without_numbers(name: str) -> str:
    """The name that an expert shares with the others of its list, of which a few tokens reach only some."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
