"""The local scopes: bytes on the device while a window is reached, solved and trained.

Follows `recon.scopes.local` in the order of time. Blocks are passed in the stored precision of the model and trained
in fp32, so there are two fake models; they are one if the model is stored in fp32.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recon.calibration.storage import Budget, Place
from recon.models.matrices import Matrix, parameters_of
from recon.models.replay import MAX_RECORDED_SHAPES
from recon.models.windows import Window
from recon.planner.fake.model import FakeModel
from recon.planner.options import PlanOptions
from recon.planner.snapshot import (
    FP32,
    SOLVER_COPIES,
    Snapshot,
    adamw_bytes,
    adamw_temporary,
    held,
    numel,
)


@dataclass(frozen=True)
class FakeModels:
    """One fake model in the two precisions of a local scope.

    Args:
        stored: In the precision in which blocks are passed.
        trained: In the precision in which a window is trained.
    """

    stored: FakeModel
    trained: FakeModel


def windows_to_recover(fake: FakeModel, options: PlanOptions) -> list[Window]:
    """Select the windows that hold a pruned weight.

    Raises:
        ValueError: If nothing is pruned.
    """
    if not options.masked:
        raise ValueError(
            f"the {options.scope} scope recovers windows that hold pruned weights, got no pattern; give one, or plan "
            f"scopes/full"
        )
    pruned = set(parameters_of(fake.prunable(options.exclude).values()))
    return [window for window in fake.windows(options) if pruned.intersection(window.owned)]


def calibration_bytes(fake: FakeModel, options: PlanOptions) -> Counter[Place]:
    """Place -> bytes of the inputs and targets of windows, for all sequences."""
    copies = 2 + options.taps
    if options.scope == "block" and options.stride is not None and options.propagation == "dense":
        copies += -(-options.num_blocks // options.stride) - 1  # inputs of windows that begin inside this one
    widths = [fake.dim] * copies
    if options.groups is not None:
        widths += [max(fake.features(window, options) for window in windows_to_recover(fake, options))]
    budget = Budget(options.activations_budget, options.activations_host_budget)
    placed: Counter[Place] = Counter()
    for width in widths:
        for number in (options.num_sequences, options.num_validation):
            nbytes = number * options.seq_len * width * _kept_dtype(fake, options).itemsize
            place = budget.choose(nbytes) if options.activations == "auto" else options.activations
            budget.left[place] -= nbytes
            placed[place] += nbytes
    return placed


def start_bytes(fake: FakeModel, options: PlanOptions) -> int:
    """Bytes on the host of the weights that a window begins with, while it trains; the most of all windows."""
    copies = 1 + options.chooses_start
    return copies * max(
        fake.item * numel(_trained(fake, window, options)) for window in windows_to_recover(fake, options)
    )


def _trained(fake: FakeModel, window: Window, options: PlanOptions) -> list[Tensor]:
    """Select the weights that recovery changes: adapters are merged into the pruned matrices."""
    if options.scope == "matrix" or options.parameters == "lora":
        return [fake.parameters[name] for name in fake.masked(window.owned, options)]
    return list(fake.learning(window.owned, options).values())


def local_snapshots(fakes: FakeModels, options: PlanOptions) -> Iterator[Snapshot]:
    """Yield the snapshots of one window of every kind."""
    stored = fakes.stored
    given = _given(fakes, options)
    calibration = calibration_bytes(stored, options)["device"]
    pruned = stored.prunable(options.exclude)
    for window in one_of_each(stored, options):
        blocks = sum(stored.block_numel(block) for block in window.blocks)
        buffers = sum(stored.block_buffers(block) for block in window.blocks)
        rest = buffers
        if options.offload == "none":
            rest = stored.num_parameters * stored.item + stored.buffer_bytes - blocks * stored.item
        passing = held(weights=rest + blocks * stored.item, calibration=calibration, other=given)
        training = held(weights=rest + blocks * FP32, calibration=calibration, other=given)
        names = _observed(window, pruned, options)
        matrices = [math.prod(pruned[name].shape) for name in names]
        gram = _gram_bytes(stored, window, names, options) if options.collects else 0
        yield Snapshot("collect", held(passing, _passed(stored, window, names, options), gram=gram))
        if options.scope == "matrix":
            yield from _matrix_snapshots(fakes, window, matrices, held(training, gram=gram), options)
            continue
        if options.start == "exact":
            yield from _solve_snapshots(stored, matrices, held(passing, gram=gram))
        yield from _training_snapshots(fakes, window, training, options)


def solver_bytes(numel: int, casts: bool) -> int:
    """Count the bytes that a solve allocates.

    Args:
        numel: Weights of the matrix.
        casts: Whether the matrix is stored in 16 bits, so that fp32 copies come on top.
    """
    return FP32 * numel * (SOLVER_COPIES + 2 * casts)


def _training_snapshots(
    fakes: FakeModels, window: Window, base: Counter[str], options: PlanOptions
) -> Iterator[Snapshot]:
    trained = fakes.trained
    learning = list(trained.learning(window.owned, options).values())
    batch = _batch_bytes(fakes.stored, window, options)
    # The mask of a gradient is unpacked at its first use, and dropped when the epoch ends.
    base = held(
        base,
        weights=trained.adapter_bytes(window.owned, options),
        masks=sum(trained.parameters[name].numel() for name in trained.masked(window.owned, options)),
        optimizer=adamw_bytes(learning),
        other=_waiting(fakes.stored, window, options) + _is_fetched(options) * batch,
    )
    step = trained.window(window, options, fakes.stored.dtype)
    yield Snapshot("forward", held(base, step.forward))
    yield Snapshot("backward", held(base, step.backward))
    gradients = sum(one.nbytes for one in learning)
    yield Snapshot("step", held(base, gradients=gradients, other=adamw_temporary(learning, options.device) + batch))


def _solve_snapshots(stored: FakeModel, matrices: Sequence[int], base: Counter[str]) -> Iterator[Snapshot]:
    """Solutions wait for their windows while the block's other matrices are solved."""
    found = 0
    for matrix in matrices:
        yield Snapshot("solve", held(base, other=found + solver_bytes(matrix, stored.item < FP32)))
        found += matrix * stored.item


def _matrix_snapshots(
    fakes: FakeModels, window: Window, matrices: Sequence[int], base: Counter[str], options: PlanOptions
) -> Iterator[Snapshot]:
    """Yield those of each matrix in turn, or of all at once by descent; dense weights are there from the beginning."""
    dense = FP32 * sum(matrices)
    held_out = held(fakes.trained.passed(window.blocks[0], options).forward, other=_loaded_bytes(fakes, options))
    yield Snapshot("held-out error", held(base, held_out, other=dense))
    if not options.descent_steps:
        yield Snapshot("solve", held(base, other=dense + solver_bytes(max(matrices), False)))
        return
    # The dense weights and their targets stay; saved are the difference from the weights and its product.
    base = held(base, masks=sum(matrices), optimizer=2 * dense + FP32 * len(matrices), other=2 * dense)
    yield Snapshot("backward", held(base, gradients=dense, activations=2 * dense))
    yield Snapshot("held-out error", held(base, held_out, gradients=dense))


def _passed(stored: FakeModel, window: Window, names: Sequence[str], options: PlanOptions) -> Counter[str]:
    """Bytes of one batch on its way through the blocks while their inputs are observed."""
    worst = max((stored.passed(block, options).forward for block in window.blocks), key=Counter.total)
    other = 0
    if _is_copied(stored, options):
        other += (1 + _is_fetched(options)) * _one_copy(stored, options) * stored.item
    if options.collects:
        tokens = options.batch_size * options.seq_len
        widths = [one.width for block in window.blocks for one in stored.inputs(block, names, options)]
        if stored.item < FP32:
            other += FP32 * tokens * max(widths)  # of one input at a time
        if options.crosses:
            other += stored.item * tokens * sum(widths)  # dense ones, until the recovered ones of the same block come
    return held(worst, other=other)


def _given(fakes: FakeModels, options: PlanOptions) -> int:
    """Bytes of the blocks' inputs beside hidden states, for the full batch and the smaller last ones."""
    sizes = {options.batch_size}
    sizes |= {number % options.batch_size for number in (options.num_sequences, options.num_validation)} - {0}
    models = {id(one): one for one in (fakes.stored, fakes.trained)}.values()
    found = [one.given(replace(options, batch_size=size)) for one in models for size in sizes]
    return sum(sorted(found)[-MAX_RECORDED_SHAPES:])


def _loaded_bytes(fakes: FakeModels, options: PlanOptions) -> int:
    """Bytes of a block's inputs and target on held-out sequences, and of the inputs in the precision of training."""
    loaded = 2 * fakes.stored.item * _is_copied(fakes.stored, options)
    return _one_copy(fakes.stored, options) * (loaded + fakes.trained.item * (fakes.trained is not fakes.stored))


def _batch_bytes(stored: FakeModel, window: Window, options: PlanOptions) -> int:
    """Bytes of inputs and target of a training step, as loaded."""
    tokens = options.batch_size * options.seq_len
    width = stored.dim * (1 + window.takes_attention) + stored.features(window, options)
    return tokens * width * stored.item


def _waiting(stored: FakeModel, window: Window, options: PlanOptions) -> int:
    """Bytes of solutions for later windows of the block; for groups, of dense weights and of parked recovered ones."""
    of_block = [one for one in windows_to_recover(stored, options) if one.blocks == window.blocks]
    at = of_block.index(window)
    pruned = stored.prunable(options.exclude)
    known = [one for one in of_block[at + 1 :] if options.propagation == "dense" or not one.takes_attention]
    later = [name for one in known for name in one.owned if name in pruned]
    total = numel(stored.parameters[name] for name in later) if options.start == "exact" else 0
    if window.needs_dense_block:
        total += numel(stored.parameters[name] for one in of_block[: at + 1] for name in one.owned)
    return stored.item * total


def _gram_bytes(fake: FakeModel, window: Window, names: Sequence[str], options: PlanOptions) -> int:
    inputs = [one for block in window.blocks for one in fake.inputs(block, names, options)]
    return (3 if options.crosses else 1) * FP32 * sum(one.width**2 for one in inputs)


def _one_copy(fake: FakeModel, options: PlanOptions) -> int:
    """Elements of the hidden states of one batch."""
    return options.batch_size * options.seq_len * fake.dim


def _is_copied(stored: FakeModel, options: PlanOptions) -> bool:
    """Whether a batch of kept hidden states is a copy of them."""
    return _kept_dtype(stored, options) != stored.dtype or _is_fetched(options)


def _is_fetched(options: PlanOptions) -> bool:
    """Whether batches are copied to another device, one ahead of the batch in use."""
    return options.activations != "device" and options.device != "cpu"


def _kept_dtype(stored: FakeModel, options: PlanOptions) -> torch.dtype:
    return options.activations_dtype or stored.dtype


def one_of_each(fake: FakeModel, options: PlanOptions) -> dict[Window, int]:
    """Pick one window of every kind, with the number of windows of this kind."""
    kinds: dict[Any, list[Window]] = {}
    pruned = fake.prunable(options.exclude)
    for window in windows_to_recover(fake, options):
        offset = len(window.blocks[0].name)
        observed = tuple(name[offset:] for name in _observed(window, pruned, options))
        kinds.setdefault((fake.kind(window, options), observed), []).append(window)
    return {windows[0]: len(windows) for windows in kinds.values()}


def _observed(window: Window, pruned: Mapping[str, Matrix], options: PlanOptions) -> list[str]:
    """Select the pruned matrices that are observed for a window: all of its blocks, unless attention goes first."""
    if options.taps and options.propagation != "dense":
        owned = set(window.owned)
        return [name for name, one in pruned.items() if one.parameter_name in owned]
    matrices = {one.weight_name for block in window.blocks for one in block.matrices.values()}
    return [name for name in pruned if name in matrices]
