"""Full retraining: bytes on the device of each process under every strategy.

Activations are those of the model with one block, and the addition of each further block. Partitions follow arXiv
1910.02054, section 5; `tests/profiling/test_footprint.py` checks them against DeepSpeed and FSDP2.
"""

import math
from collections import Counter
from collections.abc import Iterator
from functools import partial

from torch import Tensor

from recon.models.matrices import parameters_of
from recon.planner.fake.model import FakeModel
from recon.planner.fake.step import GRADIENTS, KEPT, Step
from recon.planner.local import solver_bytes
from recon.planner.options import PlanOptions
from recon.planner.snapshot import (
    FP32,
    Snapshot,
    adamw_bytes,
    adamw_temporary,
    held,
    numel,
)

BUCKET = 200_000_000
"""Elements of DeepSpeed's buffer for the reduction of gradients, as Lightning sets it; ZeRO-1 and -2 have two."""

MAX_LIVE = 1_000_000_000
"""Elements of gathered weights that ZeRO-3 may keep, as Lightning sets it."""


def learning(fake: FakeModel, options: PlanOptions) -> list[Tensor]:
    """Select the parameters that learn."""
    names = [name for block in fake.anatomy.blocks for name in block.parameters()]
    if options.train == "all":
        names = list(fake.parameters)
    return list(fake.learning(names, options).values())


def optimizer_bytes(fake: FakeModel, options: PlanOptions) -> int:
    """AdamW's state over all processes, with DeepSpeed's fp32 master copy."""
    trained = learning(fake, options)
    if options.gathers_half:
        return 2 * FP32 * numel(trained) + FP32 * len(trained)
    return 3 * FP32 * numel(trained) if options.is_zero else adamw_bytes(trained)


def held_on_host(fake: FakeModel, options: PlanOptions) -> Counter[str]:
    """Category -> bytes that ZeRO offload keeps in the host's memory, for each process."""
    found: Counter[str] = Counter()
    item, trained = fake.dtype.itemsize, numel(learning(fake, options))
    if options.offload_optimizer:
        found["optimizer"] = optimizer_bytes(fake, options) // options.world_size
        # Summed up, by ZeRO-1 as trained, then copied to fp32; where ZeRO-2 casts, it sums up on the device.
        sums = 0 if _sums_on_device(options, item) else item if options.sharding == "zero1" else FP32
        found["gradients"] = (sums + FP32) * trained // options.world_size
    if options.offload_parameters:
        found["weights"] = item * fake.num_parameters // options.world_size
    return found


def _sums_on_device(options: PlanOptions, item: int) -> bool:
    return options.sharding == "zero2" and item < FP32


def full_snapshots(fake: FakeModel, options: PlanOptions) -> Iterator[Snapshot]:
    """Yield the snapshots of the exact start, if there is one, and of a training step."""
    if options.solves:
        yield from _start_snapshots(fake, options)
    base, own_gradients = _held_all_along(fake, options)
    first, further = steps_of(fake, options)
    kept = sum(count * step.kept for step, count in further)
    gradients = sum(count * step.forward[GRADIENTS] for step, count in further)
    forward, backward = first.forward.copy(), first.backward.copy()
    forward.update({KEPT: kept, GRADIENTS: gradients})
    # In the backward pass activations shrink while gradients grow; accumulated gradients are there all along.
    backward.update({KEPT: kept} if kept >= gradients or options.accumulate > 1 else {})
    backward.update({GRADIENTS: gradients} if kept < gradients or options.accumulate > 1 else {})
    if not own_gradients:
        del forward[GRADIENTS], backward[GRADIENTS]
    yield Snapshot("forward", held(base, forward))
    yield Snapshot("backward", held(base, backward))
    trained = learning(fake, options)
    if options.is_zero or options.sharding == "fsdp2":
        in_place = options.offload_optimizer or (options.sharding == "fsdp2" and options.device == "cuda")
        temporary = 0 if in_place else FP32 * numel(trained) // options.world_size
        yield Snapshot("step", held(base, other=temporary))
    else:
        whole = sum(one.numel() * one.element_size() for one in trained)
        temporary = 0 if options.device == "cuda" else adamw_temporary(trained, options.device)  # fused there
        yield Snapshot("step", held(base, gradients=whole, other=temporary))


def _held_all_along(fake: FakeModel, options: PlanOptions) -> tuple[Counter[str], bool]:
    """Bytes that stay on the device during training, and whether gradients are whole there, as in the fake model."""
    item, world = fake.dtype.itemsize, options.world_size
    num, trained = fake.num_parameters, numel(learning(fake, options))
    pruned = fake.prunable(options.exclude).values() if options.masked else []
    masks = numel(parameters_of(pruned).values())  # unpacked, a byte each
    shares = partial(_share, world=world)
    copies = 2 if options.loss == "distillation" else 1
    optimizer = optimizer_bytes(fake, options)
    base: Counter[str] = Counter(weights=copies * item * num, masks=masks, optimizer=optimizer)
    if options.sharding == "ddp":
        base["other"] = item * trained  # buckets in which gradients are reduced
    if options.is_zero:
        base["optimizer"] = 0 if options.offload_optimizer else shares(optimizer)
        # Reduced in fp32, and summed up in fp32 except by ZeRO-1.
        base["gradients"] = item * trained if options.sharding == "zero1" else FP32 * shares(trained)
        base["other"] = (2 if options.sharding != "zero3" else 1) * item * BUCKET
        base["other"] += FP32 * BUCKET if item < FP32 else 0
        if options.offload_optimizer and options.sharding != "zero1" and not _sums_on_device(options, item):
            base["gradients"] = 0
    if options.sharding == "zero3":
        base["weights"] = 0 if options.offload_parameters else copies * item * shares(num)
        base["masks"] = 0  # unpacked for one gradient at a time
        base["other"] += copies * item * min(num, MAX_LIVE)
    if options.sharding == "fsdp2":
        blocks = [item * numel(block.parameters().values()) for block in fake.anatomy.blocks]
        stored = FP32 if options.gathers_half else item
        base["weights"] = copies * stored * shares(num)
        base["masks"], base["optimizer"] = shares(masks), shares(optimizer)
        summed_whole = options.accumulate > 1 and not options.reduce_each_batch
        base["gradients"] = stored * (trained if summed_whole else shares(trained))
        # Embeddings and head stay gathered, and beside the block under way the next one.
        base["other"] = item * num - sum(blocks) + sum(sorted(blocks)[-2:])
    base["weights"] += copies * fake.buffer_bytes  # whole in every process
    adapters = fake.adapter_bytes(list(fake.parameters), options)
    base["weights"] += shares(adapters) if options.sharding in ("zero3", "fsdp2") else adapters
    return base, options.sharding in ("none", "ddp")


def steps_of(fake: FakeModel, options: PlanOptions) -> tuple[Step, list[tuple[Step, int]]]:
    """Take the step of a model with its first block only, and those that other blocks add.

    Returns:
        The first step, and for every kind of further block the step that one adds, with their number.
    """
    others = fake.anatomy.blocks[1:]
    kinds = {fake.block_kind(block, options): block for block in others}
    counts = Counter(fake.block_kind(block, options) for block in others)
    return fake.head(options), [(fake.block(block, options), counts[kind]) for kind, block in kinds.items()]


def _start_snapshots(fake: FakeModel, options: PlanOptions) -> Iterator[Snapshot]:
    pruned = fake.prunable(options.exclude)
    weights = fake.num_parameters * fake.item + fake.buffer_bytes
    tokens = options.num_sequences * options.seq_len
    calibration = 2 * tokens * fake.dim * fake.dtype.itemsize if options.activations == "device" else 0
    for block in fake.anatomy.blocks:
        if options.offload != "none":
            weights = fake.block_numel(block) * fake.item
        names = list(block.weights_among(pruned))
        if not names:
            continue
        gram = FP32 * sum(one.width**2 for one in fake.inputs(block, names, options))
        largest = max(math.prod(pruned[name].shape) for name in names)
        base = held(weights=weights, calibration=calibration, gram=gram)
        yield Snapshot("collect", held(base, fake.passed(block, options).forward))
        yield Snapshot("solve", held(base, other=solver_bytes(largest, fake.item < FP32)))


def _share(amount: int, world: int) -> int:
    return -(-amount // world)
