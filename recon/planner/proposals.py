"""Settings that fit in a given memory: the cheapest of each kind of change, least time first, then least change."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

import torch

from recon.planner.options import Setting, Sharding
from recon.planner.prediction import Prediction, Shape, peak_of, predict

PRECISIONS = ("bf16-mixed", "bf16-true")
"""Tried in place of fp32, the less exact one later and in full retraining alone."""

STRATEGIES: tuple[dict[str, Any], ...] = (
    {"sharding": "zero1"},
    {"sharding": "zero2"},
    {"sharding": "zero3"},
    {"sharding": "fsdp2"},
    {"sharding": "zero2", "offload_optimizer": True},
    {"sharding": "zero3", "offload_optimizer": True, "offload_parameters": True},
)

PLACES = (("host", "device"), ("host", "host"), ("disk", "disk"))
"""Where the model and the activations of a local scope may be instead, the slower ones later."""

SHARDINGS = get_args(Sharding)

MAX_PROCESSES = 64


@dataclass(frozen=True)
class Proposal:
    """A setting that fits.

    Args:
        kind: What it takes: `the same device`, `offload` or `more devices`.
        options: As `recon fit` takes them.
        prediction: Of that setting.
        cost: FLOPs of all processes, then how many options differ, and by how much: less is cheaper. That a start from
            the pruned weights saves FLOPs does not count, for it is made up for by epochs.
    """

    kind: str
    options: list[str]
    prediction: Prediction
    cost: tuple[int, int, float]


def fits(prediction: Prediction, device_memory: int) -> bool:
    """Whether the peak stays within `device_memory` bytes."""
    return prediction.peak.total <= device_memory


def propose(shape: Shape, setting: Setting, device_memory: int) -> list[Proposal]:
    """The cheapest setting of each kind that fits, least time first; none if `setting` itself does or nothing can.

    The number of sequences in an optimizer step stays in full retraining; local scopes take smaller steps with smaller
    batches. Time is that of all processes together.

    Args:
        shape: The model.
        setting: What was asked for.
        device_memory: Bytes of one device.
    """
    asked = predict(shape, setting)
    if fits(asked, device_memory):
        return []
    found: dict[str, Proposal] = {}
    for kind, smaller in _of_local(setting, shape) if setting.is_local else _of_full(setting):
        for one in _with_batches(setting, smaller):
            if peak_of(shape, one).total > device_memory:
                break  # smallest batch first: larger ones need more
            prediction = predict(shape, one)
            cost = (max(prediction.flops, asked.flops), *_changes(setting, one))
            if kind not in found or cost < found[kind].cost:
                found[kind] = Proposal(kind, _options(setting, one), prediction, cost)
    return sorted(found.values(), key=lambda proposal: proposal.cost)


def _of_local(setting: Setting, shape: Shape) -> Iterator[tuple[str, Setting]]:
    """All combinations of what makes a local scope smaller."""
    given = setting.offload, setting.activations
    places = [given, *(place for place in PLACES if given in (("none", "device"), *PLACES[: PLACES.index(place)]))]
    starts = dict.fromkeys([setting.start, "pruned" if setting.start == "exact" else setting.start])
    blocks = _halved(setting.num_blocks) if setting.stride is None else [setting.num_blocks]
    precisions = dict.fromkeys([setting.precision, "bf16-mixed" if setting.half is None else setting.precision])
    narrow = setting.dtype is None and setting.half is None and shape.stored == torch.float32
    dtypes = [setting.dtype, *[torch.bfloat16] * narrow]
    for place, start, num_blocks, precision, dtype in product(places, starts, blocks, precisions, dtypes):
        changed = replace(setting, start=start, num_blocks=num_blocks, precision=precision, dtype=dtype)
        kind = "the same device" if place == given else "offload"
        yield kind, replace(changed, offload=place[0], activations=place[1])


def _of_full(setting: Setting) -> Iterator[tuple[str, Setting]]:
    for precision in (setting.precision, *(PRECISIONS if setting.precision == "32-true" else ())):
        for checkpointing in sorted({setting.gradient_checkpointing, True}):
            again = replace(setting, precision=precision, gradient_checkpointing=checkpointing)
            yield "the same device", again
            for strategy in STRATEGIES:
                if precision == "bf16-true":  # DeepSpeed has its own copies, and FSDP2 is not run so
                    continue
                worlds = [2**power for power in range(1 + int(math.log2(MAX_PROCESSES)))]
                for world in (world for world in worlds if world >= setting.world_size):
                    offloads = "offload_optimizer" in strategy
                    if offloads and world == setting.world_size:
                        yield "offload", replace(again, world_size=world, **strategy)
                    elif world > 1:
                        kind = "more devices" if world > setting.world_size else "the same device"
                        yield kind, replace(again, world_size=world, **strategy)


def _with_batches(asked: Setting, setting: Setting) -> Iterator[Setting]:
    """`setting` with every batch size that goes into what was asked for, the smallest first."""
    together = asked.batch_size * asked.accumulate * asked.world_size
    for batch_size in reversed(_halved(asked.batch_size)):
        if asked.is_local:
            yield replace(setting, batch_size=batch_size)
        elif together % (batch_size * setting.world_size) == 0:
            accumulate = together // (batch_size * setting.world_size)
            yield replace(setting, batch_size=batch_size, accumulate=accumulate)


def _halved(number: int) -> list[int]:
    """`number`, half of it, and so on down to 1."""
    return [number] if number == 1 else [number, *_halved(number // 2)]


def _changes(asked: Setting, setting: Setting) -> tuple[int, float]:
    """How many options differ, and how far."""
    changed = {name for name, value in vars(setting).items() if getattr(asked, name) != value} - {"accumulate"}
    amount = sum(abs(math.log2(getattr(setting, name) / getattr(asked, name))) for name in changed & _NUMBERS)
    amount += (setting.precision != asked.precision) * (1 + (setting.precision == "bf16-true"))
    return len(changed), amount + (setting.offload == "disk") + 0.1 * SHARDINGS.index(setting.sharding)


_NUMBERS = {"batch_size", "num_blocks", "world_size"}


def _options(asked: Setting, setting: Setting) -> list[str]:
    """What to add to the command."""
    names = {
        "world_size": "trainer.devices",
        "batch_size": f"{'model' if setting.is_local else 'data'}.batch_size",
        "accumulate": "trainer.accumulate_grad_batches",
        "num_blocks": "model.num_blocks",
        "precision": "trainer.precision",
        "dtype": "model.dtype",
        "start": "model.start",
        "gradient_checkpointing": "model.gradient_checkpointing",
        "offload": "model.offload",
        "activations": "model.activations",
    }
    options: list[str] = []
    if (setting.sharding, setting.offload_optimizer) != (asked.sharding, asked.offload_optimizer):
        options.append(f"-c strategies/{setting.sharding}{'_offload' if setting.offload_optimizer else ''}")
    for name, option in names.items():
        value = getattr(setting, name)
        if value != getattr(asked, name):
            options.append(f"--{option} {str(value).lower().removeprefix('torch.')}")
    return options
