"""The footprint of training: bytes of weights, gradients and optimizer state on this rank.

The rest of a peak (activations, communication buffers, data) comes and goes within a step; these three stay, and ZeRO
partitions them: DeepSpeed's stage 1, 2 and 3 (Rajbhandari et al., arXiv 1910.02054, section 5).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from recon.basics.trees import tensors_in

PARTITION = "ds_tensor"
"""Attribute of a parameter under ZeRO-3 that holds this rank's part."""

GRADIENTS = {
    "stage 1 and 2": ("averaged_gradients", "all_grad_tensors"),  # of one step; accumulated so far
    "stage 1 and 2, offloaded": ("accumulated_grads_in_cpu",),
    "stage 3": ("averaged_gradients", "grad_partitions_flat_buffer"),
}
"""Attributes of DeepSpeed's optimizers that hold reduced gradients, which are then no longer in `grad` (0.19.8)."""

MASTERS = "fp32_partitioned_groups_flat"
"""Attribute of ZeRO-3's optimizer with the trained weights; the optimizer that steps has them only while it steps."""


@dataclass(frozen=True)
class Footprint:
    """Live bytes on this rank, host and device together.

    Args:
        weights: Bytes of this rank's parameters, frozen ones too.
        gradients: Bytes of gradients between the backward pass and the step.
        optimizer: Bytes of the state, and of fp32 master copies of the weights.
        on_host: Part of all three in the host's memory: everything without a device, with one the offloaded part.
    """

    weights: int
    gradients: int
    optimizer: int
    on_host: int

    @property
    def total(self) -> int:
        """Bytes of all three."""
        return self.weights + self.gradients + self.optimizer


def footprint(model: nn.Module, optimizers: Iterable[Any]) -> Footprint:
    """Count the bytes of `model` and its `optimizers` now; each storage counts once and whole, with its padding.

    Args:
        model: As the strategy keeps it.
        optimizers: As the trainer has them, DeepSpeed's around those that step.
    """
    parameters = list(model.parameters())
    chains = [list(_chain(optimizer)) for optimizer in optimizers]
    stepping = [chain[-1] for chain in chains]
    trained = [parameter for one in stepping for group in one.param_groups for parameter in group["params"]]
    trained += [master for chain in chains for outer in chain for master in getattr(outer, MASTERS, [])]
    holders = {name for names in GRADIENTS.values() for name in names}

    weights = _storages([parameters, [getattr(parameter, PARTITION, None) for parameter in parameters]])
    gradients = _storages(
        [
            [parameter.grad for parameter in [*parameters, *trained]],
            [_reduced(getattr(outer, name, None)) for chain in chains for outer in chain for name in holders],
        ]
    )
    state = _storages([trained, [one.state for one in stepping]])
    state = {place: size for place, size in state.items() if place not in weights}  # trained in place: no master copy

    everything = weights | gradients | state
    return Footprint(
        weights=sum(weights.values()),
        gradients=sum(gradients.values()),
        optimizer=sum(state.values()),
        on_host=sum(size for (device, _), size in everything.items() if device.type == "cpu"),
    )


def has_state(optimizers: Iterable[Any]) -> bool:
    """Whether one of them has stepped, so that its state exists."""
    return any(len(list(_chain(optimizer))[-1].state) > 0 for optimizer in optimizers)


def _chain(optimizer: Any) -> Iterator[Any]:
    """From DeepSpeed's or Lightning's optimizer inwards to the one that steps."""
    while hasattr(optimizer, "optimizer"):
        yield optimizer
        optimizer = optimizer.optimizer
    yield optimizer


def _reduced(gradients: Any) -> Any:
    """The tensors of reduced gradients; DeepSpeed's sums in fp32 are in an object of a class of its own."""
    if not isinstance(gradients, dict):
        return gradients
    return [getattr(one, "flat_partition", one) for one in gradients.values()]


def _storages(value: Any) -> dict[tuple[torch.device, int], int]:
    """Device and address -> bytes of every storage behind the tensors in nested containers."""
    found = {}
    for tensor in tensors_in(value):
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        if storage.nbytes() > 0 and storage.device.type != "meta":
            found[storage.device, storage.data_ptr()] = storage.nbytes()
    return found
