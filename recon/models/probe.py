"""Learning by experiment how the blocks of a model behave, on a sequence of four tokens.

Numbers and gradients show what a module tree does not: the form in which a block returns, whether it can be run by
itself, which parameters an output depends on, where attention's output is added to the stream.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recon.models.anatomy import Anatomy, Block
from recon.models.calls import Hidden, Tokens, arbitrary_tokens, of_all_tokens
from recon.models.forwards import Form, Halt, collecting, first_of

MAX_RELATIVE_ERROR = 1e-2  # of a replayed block; nondeterministic kernels stay below, lost arguments do not
MAX_SUM_ERROR = 1e-4  # of a block that is given the sum of its input and its attention output instead of both


@runtime_checkable  # beartype checks arguments in tests
class Moves(Protocol):
    """The part of `recon.models.replay.Replay` that experiments need."""

    model: PreTrainedModel
    anatomy: Anatomy

    def embed(self, tokens: Tokens) -> Hidden:
        """See `Replay`."""
        ...

    def run(self, index: int, hidden: Hidden) -> Hidden:
        """See `Replay`."""
        ...

    def tap(self, index: int, hidden: Hidden) -> Hidden:
        """See `Replay`."""
        ...

    def stub(self, index: int, hidden: Hidden, attention: Hidden) -> Hidden:
        """See `Replay`."""
        ...

    def matrix_outputs(self, index: int, hidden: Hidden, names: Sequence[str], halt: bool) -> dict[str, list[Tensor]]:
        """See `Replay`."""
        ...

    def whole_model(self) -> AbstractContextManager[None]:
        """See `Replay`."""
        ...

    def recording(self) -> AbstractContextManager[None]:
        """See `Replay`."""
        ...


def learn_forms(replay: Moves) -> list[tuple[Form, Form | None]]:
    """Run the first block of every kind once and read the forms in which it and its token mixer return.

    Returns:
        Both forms of each block; that of the mixer is None where no mixer divides the block.

    Raises:
        ValueError: If a block does not call its mixer once, or a form is not supported.
    """
    firsts = {block.kind: block for block in reversed(replay.anatomy.blocks)}
    last = max(block.index for block in firsts.values())
    outputs: dict[str, list[Any]] = {kind: [] for kind in firsts}  # a mixer returns before its block does
    with ExitStack() as stack:
        stack.enter_context(replay.whole_model())
        for kind, block in firsts.items():
            if block.mixer is not None:
                stack.callback(block.mixer.register_forward_hook(collecting(outputs[kind])).remove)
            hook = collecting(outputs[kind], halt=block.index == last)
            stack.callback(block.module.register_forward_hook(hook).remove)
        stack.enter_context(suppress(Halt))
        replay.model(input_ids=arbitrary_tokens(replay.model), use_cache=False)
    return [_forms(firsts[block.kind], outputs[block.kind]) for block in replay.anatomy.blocks]


def _forms(block: Block, outputs: list[Any]) -> tuple[Form, Form | None]:
    if block.mixer is None:
        return Form.of(outputs[-1] if outputs else None, block.name), None
    if len(outputs) != 2:
        raise ValueError(
            f"A block must call its token mixer once, {block.name} called {block.mixer_name} "
            f"{len(outputs) - 1} times. This model is not supported."
        )
    mixer, of_block = outputs
    return Form.of(of_block, block.name), Form.of(mixer, block.mixer_name or "")


@torch.no_grad()
def verify(replay: Moves) -> None:
    """Check that every block, replayed or stubbed, gives what it gives within the model.

    Raises:
        ValueError: If a block is not called exactly once, cannot be stubbed, or gives something else.
    """
    blocks = replay.anatomy.blocks
    tokens = arbitrary_tokens(replay.model).flip(1)  # not the ones that calls are recorded with
    expected: list[list[Any]] = [[] for _ in blocks]
    with ExitStack() as stack:
        stack.enter_context(replay.whole_model())
        for block, outputs in zip(blocks, expected, strict=True):
            stack.enter_context(block.module.register_forward_hook(collecting(outputs)))
        replay.model(input_ids=tokens, use_cache=False)
    hidden = replay.embed(tokens)
    if hidden.shape[:2] != tokens.shape:
        raise ValueError(
            f"Blocks must get one hidden state a token, {blocks[0].name} got {list(hidden.shape)} for "
            f"{list(tokens.shape)} tokens. This model is not supported."
        )
    for block, outputs in zip(blocks, expected, strict=True):
        if len(outputs) != 1:
            raise ValueError(
                f"The model must call each block once, {block.name} was called {len(outputs)} times. "
                f"This model is not supported."
            )
        reference = first_of(outputs[0]).to(hidden.device)
        if not reference.isfinite().all():
            raise ValueError(
                f"A model must have finite hidden states, got NaN or infinity after {block.name}. Copy the model "
                f"again, or load it in a wider model.dtype."
            )
        moves = {"replayed": replay.run(block.index, hidden)}
        if block.mixer is not None:
            moves["tapped and stubbed"] = _stubbed(replay, block, hidden)
        hidden = moves["replayed"]
        for move, output in moves.items():
            error = ((output - reference).float().norm() / reference.float().norm()).item()
            if not error <= MAX_RELATIVE_ERROR:
                raise ValueError(
                    f"A {move} block must give what it gives within the model, {block.name} differs by "
                    f"{error:.1e} of the norm. This model cannot be recovered window by window."
                )


def _stubbed(replay: Moves, block: Block, hidden: Hidden) -> Hidden:
    attention = replay.tap(block.index, hidden)
    try:
        return replay.stub(block.index, hidden, attention)
    except (AttributeError, TypeError) as error:  # it met None
        raise ValueError(
            f"A block must need only the first output of its token mixer, {block.name} needs more than the first "
            f"output of {block.mixer_name}. This model is not supported."
        ) from error


def dependencies(replay: Moves, index: int) -> tuple[set[str], set[str]]:
    """Find the parameters of block `index` on which its tapped and its stubbed output depend.

    Returns:
        The names of both sets.
    """
    parameters = replay.anatomy.blocks[index].parameters()
    with replay.recording():
        hidden = replay.embed(arbitrary_tokens(replay.model))  # any input will do, the graph is the same
        with torch.enable_grad(), _requiring_grad(parameters.values()):
            attention = replay.tap(index, hidden)
            output = replay.stub(index, hidden, attention.detach())
            return _reached(attention, parameters), _reached(output, parameters)


def ends(replay: Moves, index: int, names: Sequence[str]) -> list[str]:
    """Find those of some matrices of block `index` whose output no other of them reads.

    Args:
        replay: The model.
        index: Which block.
        names: Full module names of matrices of this block.

    Raises:
        ValueError: If a matrix is not called once, for all tokens.
    """
    with replay.recording():
        hidden = replay.embed(arbitrary_tokens(replay.model))
        with torch.enable_grad(), _requiring_grad(replay.anatomy.blocks[index].parameters().values()):
            found = replay.matrix_outputs(index, hidden, names, halt=False)
            for name, calls in found.items():
                of_all_tokens(name, calls, hidden)
            outputs = {name: calls[0] for name, calls in found.items()}
            read = {other for name in outputs for other in _reached(outputs[name], outputs) - {name}}
    return [name for name in names if name not in read]


@torch.no_grad()
def adds_attention(replay: Moves, index: int) -> bool:
    """Tell whether block `index` depends on its input and its attention output only through their sum.

    Such a block adds attention's output to the residual stream as it is, and all that follows reads the stream. A
    block with parallel attention, a norm after attention, or a multiplier does not. The experiment takes a random
    attention output of the input's size, and allows an error of 1e-4 of what the block adds to the sum.
    """
    with replay.recording():
        hidden = replay.embed(arbitrary_tokens(replay.model))
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
        attention = noise * hidden.float().square().mean(-1, keepdim=True).sqrt().to(hidden)
        nothing = torch.zeros_like(hidden)
        output, total = replay.stub(index, hidden, attention), hidden + attention
        added = (output - total).float().norm()  # not `output`: beside a large stream an MLP may be small

        def differs(other: Hidden) -> bool:
            return not (output - other).float().norm() <= MAX_SUM_ERROR * added

        # A block that ignores one of the two, or adds nothing, shows nothing.
        reads_both = differs(replay.stub(index, hidden, nothing)) and differs(replay.stub(index, nothing, attention))
        return reads_both and not differs(replay.stub(index, total, nothing))


def _reached(output: Tensor, tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of the `tensors` in the graph of `output`, which is kept; `.grad` is not touched."""
    gradients = torch.autograd.grad(output.sum(), list(tensors.values()), retain_graph=True, allow_unused=True)
    return {name for name, gradient in zip(tensors, gradients, strict=True) if gradient is not None}


@contextmanager
def _requiring_grad(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
