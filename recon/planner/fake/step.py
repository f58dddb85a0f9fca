"""One training step on fake tensors: kept activations, allocated bytes and FLOPs."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recon.planner.fake.tracker import Tracker

KEPT, GRADIENTS = "activations", "gradients"


class Input(NamedTuple):
    """An input of matrices.

    Args:
        width: Number of features.
        rows_per_token: Rows for each token; of an expert a fraction on average.
    """

    width: int
    rows_per_token: float


@dataclass(frozen=True)
class Step:
    """Bytes and FLOPs of one step, without weights, masks and optimizer state.

    Args:
        kept: Bytes saved for the backward pass when the loss is known.
        forward: Category -> bytes at the largest moment of the forward pass.
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
    """Take forward and backward pass in Lightning's order: it frees the last gradients just before the backward pass.

    Args:
        learning: Name -> parameter that learns.
        pruned: Names of parameters whose gradients are masked, as `callbacks.MaskEnforcer` does.
        loss_of: Computes the loss; adds tensors that live as long as the step to the list that it gets.
        accumulates: Whether the last step's gradients stay.
        known: Tensors that lived before and are counted elsewhere.
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
    """Wrap `forward` so that it keeps its inputs only; there is no random state to keep."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
