"""Running single blocks of a model by the model's own code: replay, tap and stub.

**Replay** calls a block with the arguments that the model itself passes, **tap** halts a block where its
attention submodule returns, **stub** runs a block with that submodule's output replaced by a recorded one.
A block can be halted after some of its matrices, too. Dropout is off in all of them.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from recon.models.anatomy import Anatomy
from recon.models.calls import Call, Conversion, Form, Halt, Hidden, Tokens, evaluating, forward_replaced, record_calls
from recon.models.offload.blocks import Residence

Outputs: TypeAlias = Float[Tensor, "batch seq _"]  # of any width, as matrices return them
Logits: TypeAlias = Float[Tensor, "batch seq vocabulary"]

PROBE_LENGTH = 4  # tokens of the sequence on which forms and dependencies are learned
MAX_RECORDED_SHAPES = 4  # the full batch and the smaller last one, in the model's dtype and in fp32
MAX_RELATIVE_ERROR = 1e-2  # of a replayed block; nondeterministic kernels stay below, lost arguments do not
MAX_SUM_ERROR = 1e-4  # of a block that is given the sum of its input and its attention output instead of both


class Replay:
    """Runs single blocks of a model as the model itself would.

    Calls are recorded on first use for each batch size, sequence length, device and dtype, without autocast, and
    the latest four are kept. They follow device and dtype of the hidden states, so a block may be moved, or trained
    in another precision, while the rest of the model stays behind. Grad mode and autocast are the caller's.

    A module tree can be misread in ways that only numbers show: blocks that run twice, exchange more than
    hidden states or see the tokens (Gemma 4), an attention submodule that returns more than its output
    (DBRX). So the moves are first tried on four tokens, against the model itself.

    Args:
        model: Any model that `Anatomy` can read; at this moment on one device.
        anatomy: Its anatomy.
        residence: Brings each block to the device when it is run, if they are elsewhere.

    Raises:
        ValueError: If blocks are not called exactly once and in order, with hidden states of three
            dimensions and without a cache, or if a replayed or stubbed block gives something else than
            within the model.
    """

    residence: Residence | None = None

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, residence: Residence | None = None):
        self.model = model
        self.anatomy = anatomy
        self.residence = residence
        self._calls: OrderedDict[tuple[Any, ...], list[Call]] = OrderedDict()
        with self._recording():
            self._block_form, self._attention_form = self._learn_forms()
        self.verify()

    @classmethod
    def within(cls, residence: Residence) -> "Replay":
        """The replay of a model whose blocks are elsewhere."""
        return cls(residence.model, residence.anatomy, residence)

    @property
    def device(self) -> torch.device:
        """Where blocks are run."""
        return self.residence.device if self.residence is not None else _embedding_weight(self.model).device

    def keep(self, indices: Iterable[int]) -> None:
        """Let these blocks stay on the device once they are run there, and no others."""
        if self.residence is not None:
            self.residence.keep(indices)

    def hold(self, indices: Iterable[int]) -> None:
        """Have these blocks on the device, and no others."""
        if self.residence is not None:
            self.residence.hold(indices)

    @contextmanager
    def around(self) -> Iterator[None]:
        """Within, what lies outside the blocks is where blocks are run."""
        with self.residence.around() if self.residence is not None else nullcontext():
            yield

    def embed(self, tokens: Tokens) -> Hidden:
        """The hidden states that enter block 0, where blocks are run."""
        first = self.anatomy.blocks[0]
        entering: list[Tensor] = []

        def halt(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering.append(Call.split(first.name, args, kwargs)[1])
            raise Halt

        with (
            evaluating(self.model),
            first.module.register_forward_pre_hook(halt, with_kwargs=True),
            suppress(Halt),
        ):
            self.model(input_ids=tokens.to(_embedding_weight(self.model).device), use_cache=False)
        return entering[0].to(self.device)

    def head(self, tokens: Tokens, hidden: Hidden) -> Logits:
        """The logits if the last block returned `hidden` for `tokens`; no block is run."""
        form = self._block_form
        last = self.anatomy.blocks[-1]

        def pass_on(*args: Any, **kwargs: Any) -> Any:
            return form.wrap(Call.split(last.name, args, kwargs)[1])

        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            for block in self.anatomy.blocks[:-1]:
                stack.enter_context(forward_replaced(block.module, pass_on))
            stack.enter_context(forward_replaced(last.module, lambda *args, **kwargs: form.wrap(hidden)))
            weight = _embedding_weight(self.model)
            return self.model(input_ids=tokens.to(weight.device), use_cache=False).logits

    def run(self, index: int, hidden: Hidden) -> Hidden:
        """The output of block `index` for the hidden states that enter it."""
        block = self.anatomy.blocks[index].module
        if self.residence is not None:
            self.residence.visit(index)
        call = self._calls_for(hidden)[index]
        with evaluating(block):
            return _first(call.run(block, hidden))

    def tap(self, index: int, hidden: Hidden) -> Hidden:
        """The output of the attention submodule of block `index`; what follows it is not computed."""
        outputs: list[Any] = []
        hook = _collect(outputs, halt=True)
        with self.anatomy.blocks[index].attention.register_forward_hook(hook), suppress(Halt):
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
        with forward_replaced(self.anatomy.blocks[index].attention, lambda *args, **kwargs: output):
            return self.run(index, hidden)

    def outputs(self, index: int, hidden: Hidden, names: Sequence[str]) -> list[Outputs]:
        """What some matrices of block `index` return, one tensor a name; what follows the last is not computed.

        Args:
            index: Which block.
            hidden: The hidden states that enter it.
            names: Full module names of matrices of this block.

        Raises:
            ValueError: If a matrix is not called for all tokens at once, such as an expert.
        """
        found = self._matrix_outputs(index, hidden, names, halt=True)
        return [_of_all_tokens(name, calls, hidden) for name, calls in found.items()]

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
            stack.enter_context(self._whole_model())
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
            reference = _first(outputs[0]).to(hidden.device)
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

    def dependencies(self, index: int) -> tuple[set[str], set[str]]:
        """Names of the parameters of block `index` that its tapped and its stubbed output depend on."""
        parameters = self.anatomy.blocks[index].parameters()
        with self._recording():
            hidden = self.embed(_arbitrary_tokens(self.model))  # any input will do, the graph is the same
            with torch.enable_grad(), _requiring_grad(parameters.values()):
                attention = self.tap(index, hidden)
                output = self.stub(index, hidden, attention.detach())
                return _reached(attention, parameters), _reached(output, parameters)

    def ends(self, index: int, names: Sequence[str]) -> list[str]:
        """Those of some matrices of block `index` on whose output no other of them depends.

        Args:
            index: Which block.
            names: Full module names of matrices of this block.

        Raises:
            ValueError: If a matrix is not called once, for all tokens.
        """
        with self._recording():
            hidden = self.embed(_arbitrary_tokens(self.model))
            with torch.enable_grad(), _requiring_grad(self.anatomy.blocks[index].parameters().values()):
                found = self._matrix_outputs(index, hidden, names, halt=False)
                for name, calls in found.items():
                    _of_all_tokens(name, calls, hidden)
                outputs = {name: calls[0] for name, calls in found.items()}
                read = {other for name in outputs for other in _reached(outputs[name], outputs) - {name}}
        return [name for name in names if name not in read]

    @torch.no_grad()
    def adds_attention(self, index: int) -> bool:
        """Whether block `index` depends on its input and its attention output only through their sum.

        So it is where attention's output is added to the residual stream as it is, and all that follows reads
        the stream; not with parallel attention, a norm after attention, or a multiplier. Tried on four tokens
        with a random attention output of the input's size, to 1e-4 of what the block adds to the sum.
        """
        with self._recording():
            hidden = self.embed(_arbitrary_tokens(self.model))
            noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
            attention = noise * hidden.float().square().mean(-1, keepdim=True).sqrt().to(hidden)
            nothing = torch.zeros_like(hidden)
            output, total = self.stub(index, hidden, attention), hidden + attention
            added = (output - total).float().norm()  # not `output`: beside a large stream an MLP may be small

            def differs(other: Hidden) -> bool:
                return not (output - other).float().norm() <= MAX_SUM_ERROR * added

            # A block that ignores one of the two, or adds nothing, shows nothing.
            reads_both = differs(self.stub(index, hidden, nothing)) and differs(self.stub(index, nothing, attention))
            return reads_both and not differs(self.stub(index, total, nothing))

    def _matrix_outputs(self, index: int, hidden: Hidden, names: Sequence[str], halt: bool) -> dict[str, list[Tensor]]:
        """All that some matrices of a block return; `halt` ends the pass when each has returned once."""
        block = self.anatomy.blocks[index]
        outputs: dict[str, list[Tensor]] = {name: [] for name in names}

        def collect(calls: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                calls.append(output)
                if halt and all(outputs.values()):
                    raise Halt
                return output.clone()  # the block goes on with its own: Falcon adds to it in place

            return hook

        with ExitStack() as stack:
            for name, calls in outputs.items():
                stack.enter_context(block.matrices[name].register_forward_hook(collect(calls)))
            stack.enter_context(suppress(Halt))
            self.run(index, hidden)
        return outputs

    def _learn_forms(self) -> tuple[Form, Form]:
        """The forms in which block 0 and its attention submodule return, from one run of that block."""
        first, tokens = self.anatomy.blocks[0], _arbitrary_tokens(self.model)
        outputs: list[Any] = []  # attention returns before the block does
        with (
            self._whole_model(),
            first.attention.register_forward_hook(_collect(outputs)),
            first.module.register_forward_hook(_collect(outputs, halt=True)),
            suppress(Halt),
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
        key = (*hidden.shape[:2], hidden.device, hidden.dtype, weight.device, weight.dtype)
        if key not in self._calls:
            tokens = _arbitrary_tokens(self.model, *hidden.shape[:2])
            with self._recording():
                calls = record_calls(self.model, self.anatomy, tokens, self._block_form)
                convert = Conversion(hidden.device, weight.dtype, torch.promote_types(weight.dtype, hidden.dtype))
                self._calls[key] = [call.to(convert) for call in calls]
            if len(self._calls) > MAX_RECORDED_SHAPES:
                self._calls.popitem(last=False)
        self._calls.move_to_end(key)
        return self._calls[key]

    @contextmanager
    def _whole_model(self) -> Iterator[None]:
        """Run the whole model within, wherever its blocks are."""
        with evaluating(self.model), self.residence.serving() if self.residence is not None else nullcontext():
            yield

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """No gradients, but tensors that a backward pass may save; the same whoever records first."""
        kinds = {_embedding_weight(self.model).device.type, self.device.type}
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for kind in sorted(kinds):
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield


def _reached(output: Tensor, tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of the `tensors` in the graph of `output`, which is kept; `.grad` is not touched."""
    gradients = torch.autograd.grad(output.sum(), list(tensors.values()), retain_graph=True, allow_unused=True)
    return {name for name, gradient in zip(tensors, gradients, strict=True) if gradient is not None}


def _of_all_tokens(name: str, calls: list[Tensor], hidden: Hidden) -> Outputs:
    """The one output of a matrix as [batch, seq, dim]; many MLPs with experts see [batch * seq, dim].

    Raises:
        ValueError: If there is not one output, or not one row a token.
    """
    batch, seq, _ = hidden.shape
    shapes = [list(output.shape) for output in calls]
    if len(calls) != 1 or tuple(shapes[0][:-1]) not in ((batch, seq), (batch * seq,)):
        raise ValueError(
            f"The matrices of a group must be called once, for all tokens, {name} returned {shapes or 'nothing'} for "
            f"hidden states {list(hidden.shape)}, as experts do. Leave it out of the groups and exclude it from "
            f"pruning, or choose scopes/submodule or scopes/block."
        )
    return calls[0].reshape(batch, seq, -1)


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
            raise Halt

    return hook


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
