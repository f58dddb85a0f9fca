"""The calls that a model makes to its blocks: their arguments besides hidden states, and the form of their outputs.

Everything is learned by running the model once, cheaply, without knowledge of any architecture.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from recon.basics.trees import map_tensors
from recon.models.anatomy import Anatomy, Block
from recon.models.forwards import Form, Halt, evaluating, forward_replaced

Hidden: TypeAlias = Float[Tensor, "batch seq dim"]
Outputs: TypeAlias = Float[Tensor, "batch seq _"]  # of any width, as matrices return them
Tokens: TypeAlias = Int[Tensor, "batch seq"]

PROBE_LENGTH = 4  # tokens of the sequence on which forms and dependencies are learned


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments that the model passes to one of its blocks besides the hidden states.

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

    def to(self, convert: Callable[[Tensor], Tensor]) -> "Call":
        """Return the same call with its tensors converted."""
        return Call(map_tensors(self.args, convert), map_tensors(self.kwargs, convert), self.hidden_by_name)

    def run(self, block: nn.Module, hidden: Tensor) -> Any:
        """Call `block` on `hidden` and return all that it returns."""
        if self.hidden_by_name:
            return block(hidden_states=hidden, **self.kwargs)
        return block(hidden, *self.args, **self.kwargs)


def record_calls(model: PreTrainedModel, anatomy: Anatomy, tokens: Tokens, forms: Sequence[Form]) -> list[Call]:
    """Record how `model` calls each of its blocks, in one forward pass that computes none of them.

    Every block is replaced by the identity, and the pass halts at the last block's call. Masks, rotary
    embeddings and positions depend on the shape of `tokens` and not on their values, since recon never
    pads: all sequences have the same length.

    Args:
        model: Any model that `Anatomy` can read.
        anatomy: Its anatomy.
        tokens: Token ids of the shape to record.
        forms: Form of each block's output.

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
                raise Halt
            return forms[block.index].wrap(hidden)

        return identity

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for block in anatomy.blocks:
            stack.enter_context(forward_replaced(block.module, identity_of(block)))
        with suppress(Halt):
            model(input_ids=tokens, use_cache=False)
    if len(calls) < len(anatomy.blocks):
        raise ValueError(
            f"The model must call all {len(anatomy.blocks)} blocks, it called only the first {len(calls)}. "
            f"Load the model without early exit or layer skipping."
        )
    return calls


class Conversion:
    """Moves tensors to a device and casts those of one dtype; a tensor that several calls share stays shared.

    Blocks are passed the same mask and rotary embeddings. Otherwise each of them would get a copy.

    Args:
        device: Device that tensors are moved to.
        before: Dtype of the hidden states when the calls were recorded; tensors of this dtype are cast.
        after: Dtype that they are cast to.
    """

    def __init__(self, device: torch.device, before: torch.dtype, after: torch.dtype) -> None:
        self.device, self.before, self.after = device, before, after
        self._done: dict[int, tuple[Tensor, Tensor]] = {}  # the tensor too, so that its id is not used again

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the converted `tensor`, the same for every call with it."""
        if id(tensor) not in self._done:
            dtype = self.after if tensor.dtype == self.before else tensor.dtype
            self._done[id(tensor)] = tensor, tensor.to(self.device, dtype)
        return self._done[id(tensor)][1]


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """Return the weight of the input embeddings, whose device is the one that token ids must be on."""
    return model.get_input_embeddings().get_parameter("weight")


def arbitrary_tokens(model: PreTrainedModel, batch: int = 1, seq: int = PROBE_LENGTH) -> Tokens:
    """Make token ids for passes in which only shapes count; none is padding, which some models warn about."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = torch.tensor([token for token in range(PROBE_LENGTH + 1) if token != padding])
    tokens = ids[torch.arange(seq) % len(ids)].expand(batch, seq)
    return tokens.to(embedding_weight(model).device)


def of_all_tokens(name: str, calls: list[Tensor], hidden: Hidden) -> Outputs:
    """Return the one output of a matrix as [batch, seq, dim]; many MLPs with experts see [batch * seq, dim].

    Args:
        name: Name of the matrix, for the message.
        calls: All its outputs.
        hidden: The hidden states that entered the block.

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
