"""Running single blocks of a model by the model's own code: replay, tap and stub.

**Replay** calls a block with the arguments that the model itself passes. **Tap** halts a block where its token
mixer returns. **Stub** runs a block with that submodule's output replaced by a recorded one. A block can be halted
after some of its matrices, too. Dropout is off in all of them.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from recon.models import probe
from recon.models.anatomy import Anatomy, Block
from recon.models.calls import (
    Call,
    Conversion,
    Hidden,
    Outputs,
    Tokens,
    arbitrary_tokens,
    embedding_weight,
    of_all_tokens,
    record_calls,
)
from recon.models.experts import ExpertStatistics, expert_by_expert
from recon.models.forwards import Form, Halt, collecting, evaluating, first_of, forward_replaced
from recon.models.offload.blocks import OffloadedBlocks

Forms: TypeAlias = list[tuple[Form, Form | None]]
"""Of each block: the form in which it returns, and that of its token mixer, if one divides it."""

Logits: TypeAlias = Float[Tensor, "batch seq vocabulary"]

MAX_RECORDED_SHAPES = 4  # the full batch and the smaller last one, in the model's dtype and in fp32


class Replay:
    """Runs single blocks of a model as the model itself would.

    Calls are recorded on first use for each batch size, sequence length, device and dtype, without autocast, and
    the latest four are kept. They follow device and dtype of the hidden states, so a block may be moved, or trained
    in another precision, while the rest of the model stays behind. Grad mode and autocast are the caller's.

    A module tree can be misread in ways that only numbers show: blocks that run twice, exchange more than hidden states
    or see the tokens (Gemma 4), an token mixer that returns more than its output (DBRX). So the moves are first
    tried on four tokens, against the model itself: see `recon.models.probe`.

    Args:
        model: Any model that `Anatomy` can read; at this moment on one device.
        anatomy: Its anatomy.
        offloaded: Onloads each block when it is run, if the blocks are offloaded.
        forms: Those of a replay of the same architecture, whose moves were tried; tried on this model if None.

    Attributes:
        experts: How the statistics of experts are made.

    Raises:
        ValueError: If blocks are not called exactly once and in order, with hidden states of three
            dimensions and without a cache, or if a replayed or stubbed block gives something else than
            within the model.
    """

    offloaded: OffloadedBlocks | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        offloaded: OffloadedBlocks | None = None,
        forms: Forms | None = None,
    ):
        self.model = model
        self.anatomy = anatomy
        self.offloaded = offloaded
        self.experts = ExpertStatistics()
        self._calls: OrderedDict[tuple[Any, ...], list[Call]] = OrderedDict()
        if forms is not None:
            self.forms = forms
            return
        with self.recording():
            self.forms = probe.learn_forms(self)
        self.verify()

    @classmethod
    def within(cls, offloaded: OffloadedBlocks, forms: Forms | None = None) -> "Replay":
        """Make the replay of a model whose blocks are offloaded."""
        return cls(offloaded.model, offloaded.anatomy, offloaded, forms)

    @property
    def device(self) -> torch.device:
        """Device that blocks are run on."""
        return self.offloaded.device if self.offloaded is not None else embedding_weight(self.model).device

    def keep(self, indices: Iterable[int]) -> None:
        """Let these blocks stay on the device once they are run there; offload all others."""
        if self.offloaded is not None:
            self.offloaded.keep(indices)

    def hold(self, indices: Iterable[int]) -> None:
        """Onload these blocks and offload all others."""
        if self.offloaded is not None:
            self.offloaded.hold(indices)

    @contextmanager
    def rest_onloaded(self) -> Iterator[None]:
        """Keep the embeddings, the head and all else outside the blocks on the device within the context."""
        with self.offloaded.rest_onloaded() if self.offloaded is not None else nullcontext():
            yield

    @contextmanager
    def expert_by_expert(self) -> Iterator[None]:
        """Multiply the slices of stacks one by one within the context, so that their inputs can be seen."""
        with expert_by_expert([module for block in self.anatomy.blocks for module in block.experts]):
            yield

    def embed(self, tokens: Tokens) -> Float[Tensor, "_ _ _"]:
        """Compute the hidden states that enter block 0, on the device that blocks are run on.

        Batch, tokens and width, unless the model has another order or more positions: `verify` refuses such a one.
        """
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
            self.model(input_ids=tokens.to(embedding_weight(self.model).device), use_cache=False)
        return entering[0].to(self.device)

    def head(self, tokens: Tokens, hidden: Hidden) -> Logits:
        """Compute the logits that follow if the last block returns `hidden` for `tokens`; no block is run."""
        last = self.anatomy.blocks[-1]

        def passing_on(block: Block) -> Callable[..., Any]:
            form = self.forms[block.index][0]
            return lambda *args, **kwargs: form.wrap(Call.split(block.name, args, kwargs)[1])

        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            for block in self.anatomy.blocks[:-1]:
                stack.enter_context(forward_replaced(block.module, passing_on(block)))
            form = self.forms[last.index][0]
            stack.enter_context(forward_replaced(last.module, lambda *args, **kwargs: form.wrap(hidden)))
            weight = embedding_weight(self.model)
            return self.model(input_ids=tokens.to(weight.device), use_cache=False).logits

    def run(self, index: int, hidden: Hidden) -> Hidden:
        """Compute the output of block `index` for the hidden states that enter it."""
        block = self.anatomy.blocks[index].module
        if self.offloaded is not None:
            self.offloaded.onload(index)
        call = self._calls_for(hidden)[index]
        with evaluating(block):
            return first_of(call.run(block, hidden))

    def tap(self, index: int, hidden: Hidden) -> Hidden:
        """Compute the output of the token mixer of block `index`, and nothing that follows it."""
        outputs: list[Any] = []
        hook = collecting(outputs, halt=True)
        with self._mixer(index).register_forward_hook(hook), suppress(Halt):
            self.run(index, hidden)
        return first_of(outputs[0])

    def run_and_tap(self, index: int, hidden: Hidden) -> tuple[Hidden, Hidden]:
        """Compute the outputs of the token mixer and of block `index`, in one pass."""
        outputs: list[Any] = []
        with self._mixer(index).register_forward_hook(collecting(outputs)):
            hidden = self.run(index, hidden)
        return first_of(outputs[0]), hidden

    def stub(self, index: int, hidden: Hidden, attention: Hidden) -> Hidden:
        """Compute the output of block `index` with `attention` as the output of its token mixer."""
        form = self.forms[index][1]
        assert form is not None
        output = form.wrap(attention)
        with forward_replaced(self._mixer(index), lambda *args, **kwargs: output):
            return self.run(index, hidden)

    def outputs(self, index: int, hidden: Hidden, names: Sequence[str]) -> list[Outputs]:
        """Compute the outputs of some matrices of block `index`, one tensor a name, and nothing behind the last.

        Args:
            index: Which block.
            hidden: The hidden states that enter it.
            names: Full module names of matrices of this block.

        Raises:
            ValueError: If a matrix is not called for all tokens at once, such as an expert.
        """
        found = self.matrix_outputs(index, hidden, names, halt=True)
        return [of_all_tokens(name, calls, hidden) for name, calls in found.items()]

    def verify(self) -> None:
        """Check the moves against the model, as on construction; for a model whose modules have changed.

        Raises:
            ValueError: If a block is not called exactly once, cannot be stubbed, or gives something else.
        """
        probe.verify(self)

    def dependencies(self, index: int) -> tuple[set[str], set[str]]:
        """Find the parameters of block `index` on which its tapped and its stubbed output depend."""
        return probe.dependencies(self, index)

    def ends(self, index: int, names: Sequence[str]) -> list[str]:
        """Find those of some matrices of block `index` whose output no other of them reads.

        Raises:
            ValueError: If a matrix is not called once, for all tokens.
        """
        return probe.ends(self, index, names)

    def adds_attention(self, index: int) -> bool:
        """Tell whether block `index` depends on its input and its attention output only through their sum."""
        return probe.adds_attention(self, index)

    def matrix_outputs(self, index: int, hidden: Hidden, names: Sequence[str], halt: bool) -> dict[str, list[Tensor]]:
        """Collect all outputs of some matrices of a block; `halt` ends the pass when each has returned once."""
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
                if block.matrices[name].index is None:  # no module returns the outputs of a slice
                    stack.enter_context(block.matrices[name].module.register_forward_hook(collect(calls)))
            stack.enter_context(suppress(Halt))
            self.run(index, hidden)
        return outputs

    def _mixer(self, index: int) -> nn.Module:
        mixer = self.anatomy.blocks[index].mixer
        assert mixer is not None, f"no token mixer divides block {index}"
        return mixer

    def _calls_for(self, hidden: Tensor) -> list[Call]:
        """Find or record the calls for hidden states of this shape."""
        weight = embedding_weight(self.model)
        key = (*hidden.shape[:2], hidden.device, hidden.dtype, weight.device, weight.dtype)
        if key not in self._calls:
            tokens = arbitrary_tokens(self.model, *hidden.shape[:2])
            with self.recording():
                calls = record_calls(self.model, self.anatomy, tokens, [form for form, _ in self.forms])
                convert = Conversion(hidden.device, weight.dtype, torch.promote_types(weight.dtype, hidden.dtype))
                self._calls[key] = [call.to(convert) for call in calls]
            if len(self._calls) > MAX_RECORDED_SHAPES:
                self._calls.popitem(last=False)
        self._calls.move_to_end(key)
        return self._calls[key]

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Make the whole model runnable within the context, wherever its blocks are."""
        onloading = self.offloaded.onloaded_when_called() if self.offloaded is not None else nullcontext()
        with evaluating(self.model), onloading:
            yield

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Compute without gradients and autocast within the context, whatever the caller has set.

        Inference mode is off, too: a backward pass may save recorded tensors.
        """
        kinds = {embedding_weight(self.model).device.type, self.device.type}
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for kind in sorted(kinds):
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
