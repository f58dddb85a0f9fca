"""The head of a language model: whether logits are its output and nothing else, and its call with another forward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Same = Callable[[Tensor, Tensor], bool]
"""Compares two tensors."""


def head_of(model: PreTrainedModel) -> Any:
    """The head, as the model has it, or None."""
    return model.get_output_embeddings()


@contextmanager
def answering(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `head` compute `forward` of what enters it.

    The head is still called as a module, so a strategy that shards its weight gathers it for the call.
    """
    before = vars(head).get("forward")
    head.forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


@torch.no_grad()
def objection_to_chunks(model: PreTrainedModel, tokens: Tensor, same: Same = torch.equal) -> str | None:
    """Say why a loss of `model` needs whole logits; None if its logits are the output of a linear head as it is.

    Args:
        model: Where it computes; all processes of a strategy that shards it call this.
        tokens: A few token ids, int64[batch, seq], for a trial.
        same: Compares logits with the head's output.
    """
    head = head_of(model)
    if type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        return f"its head is {type(head).__name__}, not a plain nn.Linear"
    seen: list[tuple[Tensor, Tensor]] = []
    handle = head.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0][0].shape[:-1] != tokens.shape or not same(logits, seen[0][1]):
        return "its logits are not the output of its head alone, such as under a cap or a scale"
    answer = torch.ones((), device=tokens.device)
    with answering(head, lambda hidden: answer):
        try:
            passed = model(input_ids=tokens, use_cache=False).logits
        except (IndexError, RuntimeError) as error:
            return f"its code needs the whole output of its head: {error}"
    return None if passed.shape == () and same(passed, answer) else "its code changes the output of its head"
