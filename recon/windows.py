"""Windows: the parts of a model that are recovered at once, run by the model's own code.

No forward pass is rewritten here. Three moves are enough for any decoder-only model: **replay** calls a
block with the arguments that the model itself passes, **tap** halts a block where its attention
submodule returns, **stub** runs a block with that submodule's output replaced by a recorded one. An
attention window is a tapped block, an MLP window a stubbed one (so norms, residuals and multipliers all
come from the model), a block window one or more replayed blocks. Dropout is off in all of them.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from recon.anatomy import Anatomy, Block

Hidden: TypeAlias = Float[Tensor, "batch seq dim"]
Tokens: TypeAlias = Int[Tensor, "batch seq"]

PROBE_LENGTH = 4  # tokens of the sequence on which forms and dependencies are learned
MAX_RECORDED_SHAPES = 2  # the full batch and the smaller last one
MAX_RELATIVE_ERROR = 1e-2  # of a replayed block; nondeterministic kernels stay below, lost arguments do not


class _Halt(Exception):
    """Ends a forward pass whose remaining part nobody needs."""


@dataclass(frozen=True)
class Form:
    """What a module returns: a tensor (`length` is None), or a tuple that begins with it."""

    length: int | None

    @classmethod
    def of(cls, output: Any, name: str) -> "Form":
        """Read the form off a real output of the module called `name`."""
        if isinstance(output, Tensor):
            return cls(None)
        if type(output) is tuple and output and isinstance(output[0], Tensor):
            return cls(len(output))
        raise ValueError(
            f"Blocks and attention submodules must return a tensor or a tuple that begins with one, {name} "
            f"returned {type(output).__name__}. This model is not supported."
        )

    def wrap(self, tensor: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """`tensor` in this form, None for the other elements (caches, attention weights)."""
        return tensor if self.length is None else (tensor, *[None] * (self.length - 1))


@dataclass(frozen=True, eq=False)
class Call:
    """All that the model passes to one of its blocks besides the hidden states.

    Args:
        args: Positional arguments after the hidden states.
        kwargs: Keyword arguments other than `hidden_states`.
        hidden_by_name: Whether the hidden states come as the keyword `hidden_states`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_by_name: bool

    @classmethod
    def split(cls, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple["Call", Tensor]:
        """Separate the hidden states from the rest of a call of the block called `name`."""
        hidden_by_name = not args
        hidden = kwargs.get("hidden_states") if hidden_by_name else args[0]
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            received = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ValueError(
                f"Blocks must take hidden states [batch, seq, dim] first or as `hidden_states`, {name} was "
                f"called with {received} and the keywords {sorted(kwargs)}. This model is not supported."
            )
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        if any(isinstance(value, Cache) for value in (*args, *rest.values())):
            raise ValueError(
                f"Blocks must be called without a cache when use_cache=False, {name} was given one. "
                f"This model is not supported."
            )
        return cls(tuple(args[1:]), rest, hidden_by_name), hidden

    def to(self, device: torch.device) -> "Call":
        """The same call with its tensors on `device`."""
        return Call(_to_device(self.args, device), _to_device(self.kwargs, device), self.hidden_by_name)

    def run(self, block: nn.Module, hidden: Tensor) -> Any:
        """Call `block` on `hidden` and return all that it returns."""
        if self.hidden_by_name:
            return block(hidden_states=hidden, **self.kwargs)
        return block(hidden, *self.args, **self.kwargs)


def record_calls(model: PreTrainedModel, anatomy: Anatomy, tokens: Tokens, form: Form) -> list[Call]:
    """Record how `model` calls each of its blocks, in one forward pass that computes none of them.

    Every block is replaced by the identity, and the pass halts at the last block's call. Masks, rotary
    embeddings and positions depend on the shape of `tokens` and not on their values, since recon never
    pads: all sequences have the same length.

    Args:
        model: Any model that `Anatomy` can read.
        anatomy: Its anatomy.
        tokens: Token ids of the shape to record.
        form: What the blocks return.

    Returns:
        One call a block.

    Raises:
        ValueError: If the blocks are not called one after the other, or not as `Call` requires.
    """
    calls: list[Call] = []

    def identity_of(block: Block) -> Callable[..., Any]:
        def identity(*args: Any, **kwargs: Any) -> Any:
            if block.index != len(calls):
                raise ValueError(
                    f"Blocks must be called in the order of their list, {block.name} was called in place "
                    f"of {anatomy.blocks[len(calls)].name}. This model is not supported."
                )
            call, hidden = Call.split(block.name, args, kwargs)
            calls.append(call)
            if len(calls) == len(anatomy.blocks):
                raise _Halt
            return form.wrap(hidden)

        return identity

    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        for block in anatomy.blocks:
            stack.enter_context(_forward_replaced(block.module, identity_of(block)))
        with suppress(_Halt):
            model(input_ids=tokens, use_cache=False)
    if len(calls) < len(anatomy.blocks):
        raise ValueError(
            f"The model must call all {len(anatomy.blocks)} blocks, it called only the first {len(calls)}. "
            f"Load the model without early exit or layer skipping."
        )
    return calls


class Replay:
    """Runs single blocks of a model as the model itself would.

    Calls are recorded on first use for each batch size, sequence length and device, without autocast, and
    the latest two are kept. They follow the device of the hidden states, so a block may be moved while
    the rest of the model stays behind. Grad mode and autocast are the caller's.

    A module tree can be misread in ways that only numbers show: blocks that run twice, exchange more than
    hidden states or see the tokens (Gemma 4), an attention submodule that returns more than its output
    (DBRX). So the moves are first tried on four tokens, against the model itself.

    Args:
        model: Any model that `Anatomy` can read; at this moment on one device.
        anatomy: Its anatomy.

    Raises:
        ValueError: If blocks are not called exactly once and in order, with hidden states of three
            dimensions and without a cache, or if a replayed or stubbed block gives something else than
            within the model.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy):
        self.model = model
        self.anatomy = anatomy
        self._calls: OrderedDict[tuple[Any, ...], list[Call]] = OrderedDict()
        with _recording(_embedding_weight(model).device):
            self._block_form, self._attention_form = self._learn_forms()
        self.verify()

    def embed(self, tokens: Tokens) -> Hidden:
        """The hidden states that enter block 0."""
        first = self.anatomy.blocks[0]
        entering: list[Tensor] = []

        def halt(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering.append(Call.split(first.name, args, kwargs)[1])
            raise _Halt

        with (
            _evaluating(self.model),
            first.module.register_forward_pre_hook(halt, with_kwargs=True),
            suppress(_Halt),
        ):
            self.model(input_ids=tokens, use_cache=False)
        return entering[0]

    def run(self, index: int, hidden: Hidden) -> Hidden:
        """The output of block `index` for the hidden states that enter it."""
        block = self.anatomy.blocks[index].module
        call = self._calls_for(hidden)[index]
        with _evaluating(block):
            return _first(call.run(block, hidden))

    def tap(self, index: int, hidden: Hidden) -> Hidden:
        """The output of the attention submodule of block `index`; what follows it is not computed."""
        outputs: list[Any] = []
        hook = _collect(outputs, halt=True)
        with self.anatomy.blocks[index].attention.register_forward_hook(hook), suppress(_Halt):
            self.run(index, hidden)
        return _first(outputs[0])

    def run_and_tap(self, index: int, hidden: Hidden) -> tuple[Hidden, Hidden]:
        """The outputs of the attention submodule and of block `index`, in one pass."""
        outputs: list[Any] = []
        with self.anatomy.blocks[index].attention.register_forward_hook(_collect(outputs)):
            hidden = self.run(index, hidden)
        return _first(outputs[0]), hidden

    def stub(self, index: int, hidden: Hidden, attention: Hidden) -> Hidden:
        """The output of block `index` if its attention submodule returned `attention`."""
        output = self._attention_form.wrap(attention)
        with _forward_replaced(self.anatomy.blocks[index].attention, lambda *args, **kwargs: output):
            return self.run(index, hidden)

    @torch.no_grad()
    def verify(self) -> None:
        """Check on four tokens that every block, replayed or stubbed, gives what it gives within the model.

        Done on construction; again is worth it only after the model's modules have changed.

        Raises:
            ValueError: If a block is not called exactly once, cannot be stubbed, or gives something else.
        """
        blocks = self.anatomy.blocks
        tokens = _arbitrary_tokens(self.model).flip(1)  # not the ones that calls are recorded with
        expected: list[list[Any]] = [[] for _ in blocks]
        with ExitStack() as stack:
            stack.enter_context(_evaluating(self.model))
            for block, outputs in zip(blocks, expected, strict=True):
                stack.enter_context(block.module.register_forward_hook(_collect(outputs)))
            self.model(input_ids=tokens, use_cache=False)
        hidden = self.embed(tokens)
        for block, outputs in zip(blocks, expected, strict=True):
            if len(outputs) != 1:
                raise ValueError(
                    f"The model must call each block once, {block.name} was called {len(outputs)} times. "
                    f"This model is not supported."
                )
            reference = _first(outputs[0])
            attention = self.tap(block.index, hidden)
            try:
                stubbed = self.stub(block.index, hidden, attention)
            except (AttributeError, TypeError) as error:  # it met None
                raise ValueError(
                    f"A block must need only the first output of its attention submodule, {block.name} needs "
                    f"more than the first output of {block.attention_name}. This model is not supported."
                ) from error
            hidden = self.run(block.index, hidden)
            for move, output in (("replayed", hidden), ("tapped and stubbed", stubbed)):
                error = ((output - reference).float().norm() / reference.float().norm()).item()
                if not error <= MAX_RELATIVE_ERROR:
                    raise ValueError(
                        f"A {move} block must give what it gives within the model, {block.name} differs by "
                        f"{error:.1e} of the norm. This model cannot be recovered window by window."
                    )

    def _learn_forms(self) -> tuple[Form, Form]:
        """The forms in which block 0 and its attention submodule return, from one run of that block."""
        first, tokens = self.anatomy.blocks[0], _arbitrary_tokens(self.model)
        outputs: list[Any] = []  # attention returns before the block does
        with (
            _evaluating(self.model),
            first.attention.register_forward_hook(_collect(outputs)),
            first.module.register_forward_hook(_collect(outputs, halt=True)),
            suppress(_Halt),
        ):
            self.model(input_ids=tokens, use_cache=False)
        if len(outputs) != 2:
            raise ValueError(
                f"A block must call its attention submodule once, {first.name} called {first.attention_name} "
                f"{len(outputs) - 1} times. This model is not supported."
            )
        attention, block = outputs
        return Form.of(block, first.name), Form.of(attention, first.attention_name)

    def _calls_for(self, hidden: Tensor) -> list[Call]:
        """The calls recorded for hidden states of this shape."""
        weight = _embedding_weight(self.model)
        key = (*hidden.shape[:2], hidden.device, weight.device, weight.dtype)
        if key not in self._calls:
            tokens = _arbitrary_tokens(self.model, *hidden.shape[:2])
            with _recording(weight.device):
                calls = record_calls(self.model, self.anatomy, tokens, self._block_form)
                self._calls[key] = [call.to(hidden.device) for call in calls]
            if len(self._calls) > MAX_RECORDED_SHAPES:
                self._calls.popitem(last=False)
        self._calls.move_to_end(key)
        return self._calls[key]


@dataclass(frozen=True, eq=False)
class Window(ABC):
    """A part of the model that is recovered at once.

    Args:
        name: Such as `003.attention`, `003.mlp`, `002-004`; names sort in the order of depth.
        blocks: The consecutive blocks that it lies in.
        owned: The parameters that it trains, under their names in `model.named_parameters()`.
        shared: Parameters that it depends on but leaves frozen, since the other window of its block
            depends on them too.
    """

    name: str
    blocks: list[Block]
    owned: list[str]
    shared: list[str]

    @property
    def indices(self) -> list[int]:
        """Indices of its blocks."""
        return [block.index for block in self.blocks]

    @abstractmethod
    def forward(self, replay: Replay, hidden: Hidden, attention: Hidden | None = None) -> Hidden:
        """What the window makes of its inputs.

        Args:
            replay: The model that holds the window.
            hidden: What enters its first block.
            attention: What the attention submodule returned; only an `MLPWindow` reads it.
        """


class AttentionWindow(Window):
    """One block up to the point where its attention submodule returns."""

    def forward(self, replay: Replay, hidden: Hidden, attention: Hidden | None = None) -> Hidden:
        """The output of the attention submodule."""
        return replay.tap(self.blocks[0].index, hidden)


class MLPWindow(Window):
    """One block with the output of its attention submodule given."""

    def forward(self, replay: Replay, hidden: Hidden, attention: Hidden | None = None) -> Hidden:
        """The output of the block; `attention` is required."""
        if attention is None:
            raise ValueError(
                f"Window {self.name} needs the output of {self.blocks[0].attention_name} as `attention`, got "
                f"None. Record it with `Replay.tap` or `Replay.run_and_tap`."
            )
        return replay.stub(self.blocks[0].index, hidden, attention)


class BlockWindow(Window):
    """One or more consecutive blocks."""

    def forward(self, replay: Replay, hidden: Hidden, attention: Hidden | None = None) -> Hidden:
        """The output of the last block."""
        for block in self.blocks:
            hidden = replay.run(block.index, hidden)
        return hidden


def submodule_windows(replay: Replay) -> list[Window]:
    """Attention and MLP window of every block, in the order of depth.

    The attention window owns what its output depends on, the MLP window everything else in the block.
    What both depend on (the input norm, where attention and MLP run in parallel) neither owns.
    """
    windows: list[Window] = []
    for block in replay.anatomy.blocks:
        by_attention, by_mlp = _dependencies(replay, block)
        shared = [name for name in block.parameters() if name in by_attention & by_mlp]
        attention = [name for name in block.parameters() if name in by_attention - by_mlp]
        # Not `by_mlp`: an expert to which the probe routes no token is the MLP's all the same.
        mlp = [name for name in block.parameters() if name not in by_attention]
        windows.append(AttentionWindow(f"{block.index:03d}.attention", [block], attention, shared))
        windows.append(MLPWindow(f"{block.index:03d}.mlp", [block], mlp, shared))
    return windows


def block_windows(anatomy: Anatomy, size: int) -> list[BlockWindow]:
    """Windows of `size` consecutive blocks that cover the model.

    Args:
        anatomy: The blocks.
        size: Blocks a window, at least 1. The last window is shorter if the depth is no multiple of it;
            a size beyond the depth gives one window over all blocks.
    """
    if size < 1:
        raise ValueError(f"A block window holds at least one block, got size {size}.")
    windows = []
    for start in range(0, len(anatomy.blocks), size):
        blocks = anatomy.blocks[start : start + size]
        name = "-".join(f"{index:03d}" for index in sorted({blocks[0].index, blocks[-1].index}))
        owned = [parameter for block in blocks for parameter in block.parameters()]
        windows.append(BlockWindow(name, blocks, owned, shared=[]))
    return windows


def _dependencies(replay: Replay, block: Block) -> tuple[set[str], set[str]]:
    """Names of the parameters that the tapped and the stubbed output of `block` depend on."""
    parameters = block.parameters()
    with _recording(_embedding_weight(replay.model).device):
        hidden = replay.embed(_arbitrary_tokens(replay.model))  # any input will do, the graph is the same
        with torch.enable_grad(), _requiring_grad(parameters.values()):
            attention = replay.tap(block.index, hidden)
            output = replay.stub(block.index, hidden, attention.detach())
            return _reached(attention, parameters), _reached(output, parameters)


def _reached(output: Tensor, parameters: dict[str, nn.Parameter]) -> set[str]:
    """Names of the `parameters` in the graph of `output`; `.grad` is not touched."""
    gradients = torch.autograd.grad(output.sum(), list(parameters.values()), allow_unused=True)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def _embedding_weight(model: PreTrainedModel) -> Tensor:
    return model.get_input_embeddings().get_parameter("weight")


def _arbitrary_tokens(model: PreTrainedModel, batch: int = 1, seq: int = PROBE_LENGTH) -> Tokens:
    """Token ids for passes in which only shapes count; none is padding, which some models warn about."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = torch.tensor([token for token in range(PROBE_LENGTH + 1) if token != padding])
    tokens = ids[torch.arange(seq) % len(ids)].expand(batch, seq)
    return tokens.to(_embedding_weight(model).device)


def _first(output: Any) -> Tensor:
    """The tensor that a block returns. Indexing a bare tensor would take its first sequence instead."""
    return output[0] if isinstance(output, tuple) else output


def _collect(outputs: list[Any], halt: bool = False) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that appends what the module returns to `outputs`, and ends the pass if asked to."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        if halt:
            raise _Halt

    return hook


def _to_device(value: Any, device: torch.device) -> Any:
    """`value` with all tensors in it, at any depth of tuples, lists and dicts, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_to_device(item, device) for item in value)
    return value


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Shadow `module.forward`, and give back what others (accelerate) may have set there before."""
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
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout and layer drop off, whatever mode a trainer has put the model in."""
    training = [child for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True


@contextmanager
def _recording(device: torch.device) -> Iterator[None]:
    """No gradients, but tensors that a backward pass may save; the same whoever records first."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


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
