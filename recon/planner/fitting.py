"""Settings that fit in a given memory: the cheapest of each kind of change, least time first, then least change."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

from recon.planner.memory import Prediction, Shape, peak_of, predict
from recon.planner.setting import Setting, Sharding

PRECISIONS = ("bf16-mixed", "bf16-true")
"""Tried in place of fp32, the less exact one later."""

STRATEGIES: tuple[dict[str, Any], ...] = (
    {"sharding": "zero1"},
    {"sharding": "zero2"},
    {"sharding": "zero3"},
    {"sharding": "fsdp2"},
    {"sharding": "zero2", "offload_optimizer": True},
    {"sharding": "zero3", "offload_optimizer": True, "offload_parameters": True},
)

SHARDINGS = get_args(Sharding)

MAX_PROCESSES = 64


@dataclass(frozen=True)
class Proposal:
    """A setting that fits.

    Args:
        kind: What it takes: `the same device`, `offload` or `more devices`.
        options: As `recon fit` takes them.
        prediction: Of that setting.
        changes: How many options differ, and by how many halvings.
    """

    kind: str
    options: list[str]
    prediction: Prediction
    changes: tuple[int, float]

    @property
    def cost(self) -> tuple[int, int, float]:
        """FLOPs of all processes, then changes: less is cheaper."""
        return (self.prediction.flops, *self.changes)


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
    if peak_of(shape, setting).total <= device_memory:
        return []
    found: dict[str, Proposal] = {}
    for kind, smaller in _variants(setting):
        for one in _with_batches(setting, smaller):
            if peak_of(shape, one).total > device_memory:
                break  # smallest batch first: larger ones need more
            proposal = Proposal(kind, _options(setting, one), predict(shape, one), _changes(setting, one))
            if kind not in found or proposal.cost < found[kind].cost:
                found[kind] = proposal
    return sorted(found.values(), key=lambda proposal: proposal.cost)


def _variants(setting: Setting) -> Iterator[tuple[str, Setting]]:
    precisions = (setting.precision, *(PRECISIONS if setting.precision == "32-true" else ()))
    for precision in precisions:
        base = replace(setting, precision=precision)
        if setting.is_local:
            for num_blocks in _halved(setting.num_blocks) if setting.stride is None else [setting.num_blocks]:
                yield "the same device", replace(base, num_blocks=num_blocks)
            for offload in ("host", "disk") if setting.offload == "none" else ():
                yield "offload", replace(base, offload=offload)
            continue
        for checkpointing in sorted({setting.gradient_checkpointing, True}):
            again = replace(base, gradient_checkpointing=checkpointing)
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
    count, amount = 0, 0.0
    for name in ("batch_size", "num_blocks", "world_size"):
        before, after = getattr(asked, name), getattr(setting, name)
        count, amount = count + (before != after), amount + abs(math.log2(after / before))
    for name in ("precision", "gradient_checkpointing", "sharding", "offload_optimizer", "offload"):
        count += getattr(asked, name) != getattr(setting, name)
    amount += (setting.precision != asked.precision) * (1 + (setting.precision == "bf16-true"))
    return count, amount + (setting.offload == "disk") + 0.1 * SHARDINGS.index(setting.sharding)


def _options(asked: Setting, setting: Setting) -> list[str]:
    """What to add to the command."""
    options: list[str] = []
    if (setting.sharding, setting.offload_optimizer) != (asked.sharding, asked.offload_optimizer):
        options.append(f"-c strategies/{setting.sharding}{'_offload' if setting.offload_optimizer else ''}")
    if setting.world_size != asked.world_size:
        options.append(f"--trainer.devices {setting.world_size}")
    if setting.batch_size != asked.batch_size:
        options.append(f"--{'model' if setting.is_local else 'data'}.batch_size {setting.batch_size}")
    if setting.accumulate != asked.accumulate:
        options.append(f"--trainer.accumulate_grad_batches {setting.accumulate}")
    if setting.num_blocks != asked.num_blocks:
        options.append(f"--model.num_blocks {setting.num_blocks}")
    if setting.precision != asked.precision:
        options.append(f"--trainer.precision {setting.precision}")
    if setting.gradient_checkpointing != asked.gradient_checkpointing:
        options.append("--model.gradient_checkpointing true")
    if setting.offload != asked.offload:
        options.append(f"--model.offload {setting.offload}")
    return options
