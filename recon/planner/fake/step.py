"""One training step on fake tensors: what it keeps for the backward pass, what it allocates and what it computes."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recon.planner.fake.tracker import Tracker
from recon.scopes.losses import cross_entropy, distillation, next_token_logits

KEPT, GRADIENTS = "activations", "gradients"


@dataclass(frozen=True)
class Step:
    """One step, in bytes and FLOPs; weights, masks and optimizer state are not part of it.

    Args:
        kept: Saved for the backward pass when the loss is known.
        forward: Category -> bytes at the worst moment of the forward pass.
        backward: The same for the backward pass; nothing without one.
        forward_flops: Of the forward pass.
        flops: Of both.
    """

    kept: int
    forward: Counter[str]
    backward: Counter[str]
    forward_flops: int
    flops: int


def take_step(
    learning: Mapping[str, Tensor],
    pruned: Collection[str],
    loss_of: Callable[[list[Tensor]], Tensor],
    accumulates: bool,
    known: Iterable[Tensor],
) -> Step:
    """Forward and backward pass in Lightning's order: the last step's gradients go just before the backward.

    Args:
        learning: Name -> parameter that learns.
        pruned: Names of those whose gradients are masked, as `callbacks.MaskEnforcer` does.
        loss_of: The loss; puts what lives as long as the step into the list that it is given.
        accumulates: Whether the last step's gradients stay.
        known: What lived before and is counted elsewhere.
    """
    masks = {name: torch.empty(one.shape, dtype=torch.bool) for name, one in learning.items()}
    handles: list[Any] = []
    batch: list[Tensor] = []
    tracker = Tracker([*known, *learning.values(), *masks.values()])

    def masking(keep: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda gradient: torch.where(keep, gradient, 0)

    try:
        with tracker:
            for name, parameter in learning.items():
                parameter.requires_grad_(True)
                label = parameter.register_post_accumulate_grad_hook(lambda one: tracker.label(one.grad, GRADIENTS))
                handles.append(label)
                if name in pruned:
                    handles.append(parameter.register_hook(masking(masks[name])))
                parameter.grad = torch.empty_like(parameter)
                tracker.label(parameter.grad, GRADIENTS)
            tracker.reset()
            with tracker.saving(KEPT):
                loss = loss_of(batch)
            kept, forward, forward_flops = tracker.now[KEPT], tracker.peak, tracker.flops
            if not accumulates:
                for parameter in learning.values():
                    parameter.grad = None
            tracker.reset()
            loss.backward()
            return Step(kept, forward, tracker.peak, forward_flops, tracker.flops)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in learning.values():
            parameter.grad = None
            parameter.requires_grad_(False)


def checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` that keeps its inputs only; there are no random numbers to be kept."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def model_loss(logits_of: Callable[[Tensor], Tensor], tokens: Tensor, loss: str) -> Tensor:
    """Compute the loss of full retraining; the model is its own teacher."""
    own = next_token_logits(logits_of(tokens))
    if loss == "cross_entropy":
        return cross_entropy(own, tokens)
    with torch.no_grad():
        target = next_token_logits(logits_of(tokens))
    return distillation(own, target)
