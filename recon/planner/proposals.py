"""Options that fit in a given memory: the cheapest of each kind of change, least time first, then least change."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

import torch

from recon.planner.options import PlanOptions, Sharding
from recon.planner.prediction import Prediction, Shape, peak_of, predict

PRECISIONS = ("bf16-mixed", "bf16-true")
"""Precisions tried in place of fp32; the less exact one is later, and for full retraining alone."""

STRATEGIES: tuple[dict[str, Any], ...] = (
    {"sharding": "zero1"},
    {"sharding": "zero2"},
    {"sharding": "zero3"},
    {"sharding": "fsdp2"},
    {"sharding": "zero2", "offload_optimizer": True},
    {"sharding": "zero3", "offload_optimizer": True, "offload_parameters": True},
)

PLACES = (("host", "device"), ("host", "host"), ("disk", "disk"))
"""Other places of the model and the activations of a local scope; the slower ones are later."""

SHARDINGS = get_args(Sharding)

MAX_PROCESSES = 64

LOGARITHMIC = {"batch_size", "num_blocks", "world_size"}
"""Options whose change counts by its logarithm."""

ARGUMENTS = {
    "world_size": "trainer.devices",
    "batch_size": "{part}.batch_size",
    "accumulate": "trainer.accumulate_grad_batches",
    "num_blocks": "model.num_blocks",
    "precision": "trainer.precision",
    "dtype": "model.dtype",
    "start": "model.start",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "offload": "model.offload",
    "activations": "model.activations",
    "baselines": "baselines",
    "drift": "drift",
}
"""Option of a plan -> that of `recon fit`; `part` is model in local scopes, else data."""


@dataclass(frozen=True)
class Proposal:
    """Options that fit.

    Args:
        kind: Kind of the change: `the same device`, `offload` or `more devices`.
        arguments: The change, as arguments of `recon fit`.
        prediction: Prediction with these options.
        cost: FLOPs of all processes, then number and size of the changes: less is cheaper. FLOPs saved by a start from
            the pruned weights do not count, for further epochs make up for them.
    """

    kind: str
    arguments: list[str]
    prediction: Prediction
    cost: tuple[int, int, float]


def fits(prediction: Prediction, device_memory: int) -> bool:
    """Whether the peak stays within `device_memory` bytes."""
    return prediction.peak.total <= device_memory


def propose(shape: Shape, asked: PlanOptions, device_memory: int) -> list[Proposal]:
    """Find the cheapest options of each kind that fit, least time first.

    The number of sequences in an optimizer step stays in full retraining; local scopes take smaller steps with smaller
    batches. Time is that of all processes together.

    Args:
        shape: The model.
        asked: The options to change.
        device_memory: Bytes of one device.

    Returns:
        Proposals; none if `asked` fits itself or nothing does.
    """
    prediction = predict(shape, asked)
    if fits(prediction, device_memory):
        return []
    flops = prediction.flops
    found: dict[str, Proposal] = {}
    for kind, smaller in _measured_less(asked, _of_local(asked, shape) if asked.is_local else _of_full(asked)):
        for options in _with_batches(asked, smaller):
            if peak_of(shape, options).total > device_memory:
                break  # smallest batch first: larger ones need more
            prediction = predict(shape, options)
            cost = (max(prediction.flops, flops), *_changes(asked, options))
            if kind not in found or cost < found[kind].cost:
                found[kind] = Proposal(kind, _arguments(asked, options), prediction, cost)
    return sorted(found.values(), key=lambda proposal: proposal.cost)


def _measured_less(asked: PlanOptions, changed: Iterable[tuple[str, PlanOptions]]) -> Iterator[tuple[str, PlanOptions]]:
    """Follow each change by the same without the evaluations that a run can leave out, if it has any."""
    for kind, options in changed:
        yield kind, options
        if asked.evaluates and (asked.baselines or asked.drift):
            yield kind, replace(options, baselines=False, drift=False)


def _of_local(asked: PlanOptions, shape: Shape) -> Iterator[tuple[str, PlanOptions]]:
    """Combine all changes that make a local scope smaller."""
    given = asked.offload, asked.activations
    like = asked.offload, "host" if asked.activations == "auto" else asked.activations
    slower = PLACES if asked.offload == "none" else PLACES[PLACES.index(like) + 1 :] if like in PLACES else ()
    places = [given, *(place for place in slower if place[1] != "device" or like[1] == "device")]
    starts = dict.fromkeys([asked.start, "pruned" if asked.start == "exact" else asked.start])
    blocks = _halved(asked.num_blocks) if asked.stride is None else [asked.num_blocks]
    precisions = dict.fromkeys([asked.precision, "bf16-mixed" if asked.half is None else asked.precision])
    narrow = asked.dtype is None and asked.half is None and shape.stored == torch.float32
    dtypes = [asked.dtype, *[torch.bfloat16] * narrow]
    for place, start, num_blocks, precision, dtype in product(places, starts, blocks, precisions, dtypes):
        changed = replace(asked, start=start, num_blocks=num_blocks, precision=precision, dtype=dtype)
        kind = "the same device" if place == given else "offload"
        yield kind, replace(changed, offload=place[0], activations=place[1])


def _of_full(asked: PlanOptions) -> Iterator[tuple[str, PlanOptions]]:
    """Combine all changes that make full retraining smaller."""
    worlds = [2**power for power in range(1 + int(math.log2(MAX_PROCESSES)))]
    worlds = [world for world in worlds if world >= asked.world_size]
    for precision in (asked.precision, *(PRECISIONS if asked.precision == "32-true" else ())):
        for checkpointing in sorted({asked.gradient_checkpointing, True}):
            again = replace(asked, precision=precision, gradient_checkpointing=checkpointing)
            yield "the same device", again
            if precision == "bf16-true":  # DeepSpeed has its own copies, and FSDP2 is not run so
                continue
            for strategy, world in product(STRATEGIES, worlds):
                if "offload_optimizer" in strategy and world == asked.world_size:
                    yield "offload", replace(again, world_size=world, **strategy)
                elif world > 1:
                    kind = "more devices" if world > asked.world_size else "the same device"
                    yield kind, replace(again, world_size=world, **strategy)


def _with_batches(asked: PlanOptions, options: PlanOptions) -> Iterator[PlanOptions]:
    """Give `options` every batch size that divides the one of `asked`, the smallest first."""
    together = asked.batch_size * asked.accumulate * asked.world_size
    for batch_size in reversed(_halved(asked.batch_size)):
        if asked.is_local:
            yield replace(options, batch_size=batch_size)
        elif together % (batch_size * options.world_size) == 0:
            accumulate = together // (batch_size * options.world_size)
            yield replace(options, batch_size=batch_size, accumulate=accumulate)


def _halved(number: int) -> list[int]:
    """Halve `number` until 1 is reached."""
    return [number] if number == 1 else [number, *_halved(number // 2)]


def _changes(asked: PlanOptions, options: PlanOptions) -> tuple[int, float]:
    """Number and size of the changes."""
    changed = {name for name, value in vars(options).items() if getattr(asked, name) != value} - {"accumulate"}
    size = sum(abs(math.log2(getattr(options, name) / getattr(asked, name))) for name in changed & LOGARITHMIC)
    size += (options.precision != asked.precision) * (1 + (options.precision == "bf16-true"))
    return len(changed), size + (options.offload == "disk") + 0.1 * SHARDINGS.index(options.sharding)


def _arguments(asked: PlanOptions, options: PlanOptions) -> list[str]:
    """The changes as arguments of `recon fit`."""
    arguments: list[str] = []
    if (options.sharding, options.offload_optimizer) != (asked.sharding, asked.offload_optimizer):
        arguments.append(f"-c strategies/{options.sharding}{'_offload' if options.offload_optimizer else ''}")
    part = "model" if options.is_local else "data"
    for name, argument in ARGUMENTS.items():
        value = getattr(options, name)
        if value != getattr(asked, name):
            arguments.append(f"--{argument.format(part=part)} {str(value).lower().removeprefix('torch.')}")
    return arguments
