"""The local scopes: what the device holds while a window is reached, solved and trained.

Follows `recon.scopes.local` in the order of time. Blocks are passed in the precision that the model is stored in, and
trained in fp32: so there are two rehearsals, which are one if the model is stored in fp32.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from recon.calibration.storage import Budget, Place
from recon.models.replay import MAX_RECORDED_SHAPES
from recon.models.windows import Window
from recon.planner.fake.model import Rehearsal
from recon.planner.options import Setting
from recon.planner.snapshot import (
    FP32,
    SOLVER_COPIES,
    Moment,
    adamw_bytes,
    adamw_temporary,
    held,
    numel,
)


@dataclass(frozen=True)
class Cast:
    """A model on which windows are rehearsed.

    Args:
        stored: In the precision in which blocks are passed.
        trained: In that in which a window is trained.
    """

    stored: Rehearsal
    trained: Rehearsal


def windows_to_recover(rehearsal: Rehearsal, setting: Setting) -> list[Window]:
    """Those that hold a pruned weight.

    Raises:
        ValueError: If nothing is pruned.
    """
    if not setting.masked:
        raise ValueError(
            f"the {setting.scope} scope recovers windows that hold pruned weights, got no pattern; give one, or plan "
            f"scopes/full"
        )
    pruned = set(rehearsal.prunable(setting.exclude))
    return [window for window in rehearsal.windows(setting) if pruned.intersection(window.owned)]


def calibration_bytes(rehearsal: Rehearsal, setting: Setting) -> Counter[Place]:
    """Where there is how much of what enters and should leave the windows, for all sequences."""
    copies = 2 + setting.taps
    if setting.scope == "block" and setting.stride is not None and setting.propagation == "dense":
        copies += -(-setting.num_blocks // setting.stride) - 1  # what enters windows that begin inside this one
    widths = [rehearsal.dim] * copies
    if setting.groups is not None:
        widths += [max(rehearsal.features(window, setting) for window in windows_to_recover(rehearsal, setting))]
    budget = Budget(setting.activations_budget, setting.activations_host_budget)
    placed: Counter[Place] = Counter()
    for width in widths:
        for number in (setting.num_sequences, setting.num_validation):
            nbytes = number * setting.seq_len * width * _kept_dtype(rehearsal, setting).itemsize
            place = budget.choose(nbytes) if setting.activations == "auto" else setting.activations
            budget.left[place] -= nbytes
            placed[place] += nbytes
    return placed


def local_moments(cast: Cast, setting: Setting) -> Iterator[Moment]:
    """The moments of one window of every kind."""
    stored = cast.stored
    given = _given(cast, setting)
    calibration = calibration_bytes(stored, setting)["device"]
    pruned = stored.prunable(setting.exclude)
    for window in one_of_each(stored, setting):
        blocks = sum(stored.block_numel(block) for block in window.blocks)
        buffers = sum(stored.block_buffers(block) for block in window.blocks)
        rest = buffers
        if setting.offload == "none":
            rest = stored.num_parameters * stored.item + stored.buffer_bytes - blocks * stored.item
        passing = held(weights=rest + blocks * stored.item, calibration=calibration, other=given)
        training = held(weights=rest + blocks * FP32, calibration=calibration, other=given)
        names = _observed(window, list(pruned), setting)
        matrices = [pruned[name].get_parameter("weight") for name in names]
        gram = _gram_bytes(stored, window, names, setting) if setting.collects else 0
        yield Moment("collect", held(passing, _passed(stored, window, names, setting), gram=gram))
        if setting.scope == "matrix":
            yield from _matrix_moments(cast, window, matrices, held(training, gram=gram), setting)
            continue
        if setting.start == "exact":
            yield from _solve_moments(stored, matrices, held(passing, gram=gram))
        yield from _training_moments(cast, window, training, setting)


def solver_bytes(numel: int, casts: bool) -> int:
    """What solving one matrix of so many weights allocates; fp32 copies of it too if they are stored in 16 bits."""
    return FP32 * numel * (SOLVER_COPIES + 2 * casts)


def _training_moments(cast: Cast, window: Window, base: Counter[str], setting: Setting) -> Iterator[Moment]:
    trained = cast.trained
    learning = list(trained.learning(window.owned, setting).values())
    batch = _batch_bytes(cast.stored, window, setting)
    # A gradient's mask is unpacked when it is first needed, and dropped when the epoch ends.
    base = held(
        base,
        weights=trained.adapter_bytes(window.owned, setting),
        masks=sum(trained.parameters[name].numel() for name in trained.masked(window.owned, setting)),
        optimizer=adamw_bytes(learning),
        other=_waiting(cast.stored, window, setting) + _is_fetched(setting) * batch,
    )
    step = trained.window(window, setting, cast.stored.dtype)
    yield Moment("forward", held(base, step.forward))
    yield Moment("backward", held(base, step.backward))
    gradients = sum(one.nbytes for one in learning)
    yield Moment("step", held(base, gradients=gradients, other=adamw_temporary(learning, setting.device) + batch))


def _solve_moments(stored: Rehearsal, matrices: Sequence[nn.Parameter], base: Counter[str]) -> Iterator[Moment]:
    """Solutions wait for their windows while the block's other matrices are solved."""
    found = 0
    for matrix in matrices:
        yield Moment("solve", held(base, other=found + solver_bytes(matrix.numel(), stored.item < FP32)))
        found += matrix.numel() * stored.item


def _matrix_moments(
    cast: Cast, window: Window, matrices: Sequence[nn.Parameter], base: Counter[str], setting: Setting
) -> Iterator[Moment]:
    """Each matrix in turn, or all at once by descent; their dense weights are there from the beginning."""
    dense = FP32 * numel(matrices)
    held_out = held(cast.trained.passed(window.blocks[0], setting).forward, other=_loaded_bytes(cast, setting))
    yield Moment("held-out error", held(base, held_out, other=dense))
    if not setting.descent_steps:
        yield Moment("solve", held(base, other=dense + solver_bytes(max(one.numel() for one in matrices), False)))
        return
    # The dense weights and their targets stay; saved are the difference from the weights and its product.
    base = held(base, masks=numel(matrices), optimizer=2 * dense + FP32 * len(matrices), other=2 * dense)
    yield Moment("backward", held(base, gradients=dense, activations=2 * dense))
    yield Moment("held-out error", held(base, held_out, gradients=dense))


def _passed(stored: Rehearsal, window: Window, names: Sequence[str], setting: Setting) -> Counter[str]:
    """One batch on its way through the blocks, whose inputs are observed."""
    worst = max((stored.passed(block, setting).forward for block in window.blocks), key=Counter.total)
    other = 0
    if _is_copied(stored, setting):
        other += (1 + _is_fetched(setting)) * _one_copy(stored, setting) * stored.item
    if setting.collects:
        tokens = setting.batch_size * setting.seq_len
        widths = [width for block in window.blocks for width in stored.inputs(block, names, setting)]
        if stored.item < FP32:
            other += FP32 * tokens * max(widths)  # of one input at a time
        if setting.crosses:
            other += stored.item * tokens * sum(widths)  # dense ones, until the recovered ones of the same block come
    return held(worst, other=other)


def _given(cast: Cast, setting: Setting) -> int:
    """What the blocks are given beside hidden states, for the full batch and the smaller last ones."""
    sizes = {setting.batch_size}
    sizes |= {number % setting.batch_size for number in (setting.num_sequences, setting.num_validation)} - {0}
    rehearsals = {id(one): one for one in (cast.stored, cast.trained)}.values()
    found = [one.given(replace(setting, batch_size=size)) for one in rehearsals for size in sizes]
    return sum(sorted(found)[-MAX_RECORDED_SHAPES:])


def _loaded_bytes(cast: Cast, setting: Setting) -> int:
    """Inputs and target of a block on held-out sequences, and the inputs in the precision of training."""
    loaded = 2 * cast.stored.item * _is_copied(cast.stored, setting)
    return _one_copy(cast.stored, setting) * (loaded + cast.trained.item * (cast.trained is not cast.stored))


def _batch_bytes(stored: Rehearsal, window: Window, setting: Setting) -> int:
    """Inputs and target of a training step, as they are loaded."""
    tokens = setting.batch_size * setting.seq_len
    width = stored.dim * (1 + window.takes_attention) + stored.features(window, setting)
    return tokens * width * stored.item


def _waiting(stored: Rehearsal, window: Window, setting: Setting) -> int:
    """Solutions of the block's later windows; for groups the dense weights, and those recovered that stepped aside."""
    of_block = [one for one in windows_to_recover(stored, setting) if one.blocks == window.blocks]
    at = of_block.index(window)
    pruned = stored.prunable(setting.exclude)
    known = [one for one in of_block[at + 1 :] if setting.propagation == "dense" or not one.takes_attention]
    later = [name for one in known for name in one.owned if name in pruned]
    total = numel(stored.parameters[name] for name in later) if setting.start == "exact" else 0
    if window.needs_dense_block:
        total += numel(stored.parameters[name] for one in of_block[: at + 1] for name in one.owned)
    return stored.item * total


def _gram_bytes(rehearsal: Rehearsal, window: Window, names: Sequence[str], setting: Setting) -> int:
    widths = [width for block in window.blocks for width in rehearsal.inputs(block, names, setting)]
    return (3 if setting.crosses else 1) * FP32 * sum(width**2 for width in widths)


def _one_copy(rehearsal: Rehearsal, setting: Setting) -> int:
    """Elements of the hidden states of one batch."""
    return setting.batch_size * setting.seq_len * rehearsal.dim


def _is_copied(stored: Rehearsal, setting: Setting) -> bool:
    """Whether a batch of what is kept is another tensor than what is kept."""
    return _kept_dtype(stored, setting) != stored.dtype or _is_fetched(setting)


def _is_fetched(setting: Setting) -> bool:
    """Whether batches are copied to another device, one ahead of the one in use."""
    return setting.activations != "device" and setting.device != "cpu"


def _kept_dtype(stored: Rehearsal, setting: Setting) -> torch.dtype:
    return setting.activations_dtype or stored.dtype


def one_of_each(rehearsal: Rehearsal, setting: Setting) -> dict[Window, int]:
    """A window of every kind, and how many there are of it."""
    kinds: dict[Any, list[Window]] = {}
    pruned = list(rehearsal.prunable(setting.exclude))
    for window in windows_to_recover(rehearsal, setting):
        offset = len(window.blocks[0].name)
        observed = tuple(name[offset:] for name in _observed(window, pruned, setting))
        kinds.setdefault((rehearsal.kind(window, setting), observed), []).append(window)
    return {windows[0]: len(windows) for windows in kinds.values()}


def _observed(window: Window, pruned: Sequence[str], setting: Setting) -> list[str]:
    """The pruned matrices whose inputs are observed for a window: all of its blocks, unless attention goes first."""
    if setting.taps and setting.propagation != "dense":
        return [name for name in pruned if name in window.owned]
    matrices = {f"{name}.weight" for block in window.blocks for name in block.matrices}
    return [name for name in pruned if name in matrices]
