"""Full retraining: what each process holds on its device under every strategy.

Activations are those of the model with one block and what each further block adds. What is partitioned follows
arXiv 1910.02054, section 5, and is checked against DeepSpeed and FSDP2 by `tests/test_footprint.py`.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn

from recon.planner.fake.model import Rehearsal
from recon.planner.fake.step import GRADIENTS, KEPT, Step
from recon.planner.local import solver_bytes
from recon.planner.options import Setting
from recon.planner.snapshot import (
    FP32,
    Moment,
    adamw_bytes,
    adamw_temporary,
    held,
    numel,
)

BUCKET = 200_000_000
"""Elements of a buffer in which DeepSpeed reduces gradients, as Lightning sets it; stages 1 and 2 have two."""

MAX_LIVE = 1_000_000_000
"""Elements of gathered weights that ZeRO-3 may keep, as Lightning sets it."""


def learning(rehearsal: Rehearsal, setting: Setting) -> list[Tensor]:
    """What learns."""
    names = [name for block in rehearsal.anatomy.blocks for name in block.parameters()]
    if setting.train == "all":
        names = list(rehearsal.parameters)
    return list(rehearsal.learning(names, setting).values())


def optimizer_bytes(rehearsal: Rehearsal, setting: Setting) -> int:
    """AdamW's state over all processes, with DeepSpeed's fp32 master copy."""
    trained = learning(rehearsal, setting)
    return 3 * FP32 * numel(trained) if setting.is_zero else adamw_bytes(trained)


def held_on_host(rehearsal: Rehearsal, setting: Setting) -> Counter[str]:
    """What ZeRO offload keeps in the host's memory, for each process."""
    found: Counter[str] = Counter()
    item, trained = rehearsal.dtype.itemsize, numel(learning(rehearsal, setting))
    if setting.offload_optimizer:
        found["optimizer"] = optimizer_bytes(rehearsal, setting) // setting.world_size
        found["gradients"] = (item + FP32) * trained // setting.world_size  # summed up as trained, then in fp32
    if setting.offload_parameters:
        found["weights"] = item * rehearsal.num_parameters // setting.world_size
    return found


def full_moments(rehearsal: Rehearsal, setting: Setting) -> Iterator[Moment]:
    """The exact start, if there is one, and a training step."""
    if setting.solves:
        yield from _start_moments(rehearsal, setting)
    base, own_gradients = _held_all_along(rehearsal, setting)
    first, further = steps_of(rehearsal, setting)
    kept = sum(count * step.kept for step, count in further)
    gradients = sum(count * step.forward[GRADIENTS] for step, count in further)
    forward, backward = first.forward.copy(), first.backward.copy()
    forward.update({KEPT: kept, GRADIENTS: gradients})
    # Going backward, what is kept becomes less while gradients become more; accumulated ones are there all along.
    backward.update({KEPT: kept} if kept >= gradients or setting.accumulate > 1 else {})
    backward.update({GRADIENTS: gradients} if kept < gradients or setting.accumulate > 1 else {})
    if not own_gradients:
        del forward[GRADIENTS], backward[GRADIENTS]
    yield Moment("forward", held(base, forward))
    yield Moment("backward", held(base, backward))
    trained = learning(rehearsal, setting)
    if setting.is_zero or setting.sharding == "fsdp2":
        temporary = 0 if setting.offload_optimizer else FP32 * numel(trained) // setting.world_size
        yield Moment("step", held(base, other=temporary))
    else:
        whole = sum(one.numel() * one.element_size() for one in trained)
        yield Moment("step", held(base, gradients=whole, other=adamw_temporary(trained, setting.device)))


def _held_all_along(rehearsal: Rehearsal, setting: Setting) -> tuple[Counter[str], bool]:
    """What stays on the device during training, and whether gradients are whole there, as the rehearsal has them."""
    item, world = rehearsal.dtype.itemsize, setting.world_size
    num, trained = rehearsal.num_parameters, numel(learning(rehearsal, setting))
    pruned = rehearsal.prunable(setting.exclude).values() if setting.masked else []
    masks = numel(module.get_parameter("weight") for module in pruned)  # unpacked, a byte each
    shares = partial(_share, world=world)
    copies = 2 if setting.loss == "distillation" else 1
    optimizer = optimizer_bytes(rehearsal, setting)
    base: Counter[str] = Counter(weights=copies * item * num, masks=masks, optimizer=optimizer)
    if setting.sharding == "ddp":
        base["other"] = item * trained  # buckets in which gradients are reduced
    if setting.is_zero:
        base["optimizer"] = 0 if setting.offload_optimizer else shares(optimizer)
        base["gradients"] = item * (trained if setting.sharding == "zero1" else shares(trained))
        base["other"] = (2 if setting.sharding != "zero3" else 1) * item * BUCKET
        if setting.offload_optimizer and setting.sharding != "zero1":
            base["gradients"] = 0
    if setting.sharding == "zero3":
        base["weights"] = 0 if setting.offload_parameters else copies * item * shares(num)
        base["masks"] = 0  # unpacked for one gradient at a time
        base["other"] += copies * item * min(num, MAX_LIVE)
    if setting.sharding == "fsdp2":
        blocks = [item * numel(block.parameters().values()) for block in rehearsal.anatomy.blocks]
        base["weights"] = copies * item * shares(num)
        base["masks"], base["optimizer"] = shares(masks), shares(optimizer)
        base["gradients"] = item * shares(trained)
        # Embeddings and head stay gathered, and beside the block under way the next one.
        base["other"] = item * num - sum(blocks) + sum(sorted(blocks)[-2:])
    base["weights"] += copies * rehearsal.buffer_bytes  # whole in every process
    adapters = rehearsal.adapter_bytes(list(rehearsal.parameters), setting)
    base["weights"] += shares(adapters) if setting.sharding in ("zero3", "fsdp2") else adapters
    return base, setting.sharding in ("none", "ddp")


def steps_of(rehearsal: Rehearsal, setting: Setting) -> tuple[Step, list[tuple[Step, int]]]:
    """A step with the first block only, and of every other kind of block what one adds, and how many there are."""
    others = rehearsal.anatomy.blocks[1:]
    kinds = {rehearsal.block_kind(block, setting): block for block in others}
    counts = Counter(rehearsal.block_kind(block, setting) for block in others)
    return rehearsal.head(setting), [(rehearsal.block(block, setting), counts[kind]) for kind, block in kinds.items()]


def _start_moments(rehearsal: Rehearsal, setting: Setting) -> Iterator[Moment]:
    pruned = rehearsal.prunable(setting.exclude)
    weights = rehearsal.num_parameters * rehearsal.item + rehearsal.buffer_bytes
    tokens = setting.num_sequences * setting.seq_len
    calibration = 2 * tokens * rehearsal.dim * rehearsal.dtype.itemsize
    for block in rehearsal.anatomy.blocks:
        names = list(block.weights_among(pruned))
        if not names:
            continue
        gram = FP32 * sum(width**2 for width in rehearsal.inputs(block, names, setting))
        largest = max((pruned[name].get_parameter("weight") for name in names), key=nn.Parameter.numel)
        base = held(weights=weights, calibration=calibration, gram=gram)
        yield Moment("collect", held(base, rehearsal.passed(block, setting).forward))
        yield Moment("solve", held(base, other=solver_bytes(largest.numel(), rehearsal.item < FP32)))


def _share(amount: int, world: int) -> int:
    return -(-amount // world)
