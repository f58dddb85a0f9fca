"""What there is to compute: FLOPs by kind, and the time that they take at given rates.

FLOPs are those of matrix products and attention, counted as `recon.flops` does, but work done twice counts twice.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Literal, get_args

from recon.planner.fake.model import Rehearsal
from recon.planner.full import steps_of
from recon.planner.local import Cast, one_of_each
from recon.planner.options import Setting
from recon.planner.snapshot import SOLVER_ITERATIONS

Kind = Literal["walk", "gram", "solve", "training", "held out", "rest"]
"""Passes through dense or recovered blocks; sums of products of inputs; exact solutions; training steps; held-out
errors; in full retraining: what a step takes besides the blocks that are like others."""

KINDS: tuple[Kind, ...] = get_args(Kind)


def local_work(cast: Cast, setting: Setting) -> Counter[Kind]:
    """FLOPs of recovering all windows."""
    stored, trained = cast.stored, cast.trained
    batches = setting.num_sequences / setting.batch_size
    held_out = setting.num_validation / setting.batch_size
    walks = _walks(setting)
    work: Counter[Kind] = Counter()
    pruned = stored.prunable(setting.exclude)
    for block in stored.anatomy.blocks:
        passed = stored.passed(block, setting).flops
        work["walk"] += round(walks * (batches + held_out) * passed)
        names = list(block.weights_among(pruned))
        if setting.collects and names:
            work += _matrix_work(stored, block.index, names, setting)
        if setting.scope == "matrix" and names:
            work["held out"] += round(2 * held_out * trained.passed(block, setting).flops)
    if setting.scope != "matrix":
        for window, count in one_of_each(stored, setting).items():
            step = trained.window(window, setting, stored.dtype)
            work["training"] += round(count * setting.epochs * batches * step.flops)
            work["held out"] += round(count * (setting.epochs + 1) * held_out * step.forward_flops)
    return work


def full_work(rehearsal: Rehearsal, setting: Setting) -> Counter[Kind]:
    """FLOPs of the exact start, of training and of the held-out loss after each epoch, over all processes."""
    first, further = steps_of(rehearsal, setting)
    more = sum(count * one.flops for one, count in further)
    forward, more_forward = first.forward_flops, sum(count * one.forward_flops for one, count in further)
    if setting.loss == "distillation":  # the teacher's other blocks; `first` has those of its own
        more, more_forward = more + more_forward, 2 * more_forward
    batches = setting.num_sequences / setting.batch_size
    held_out = setting.num_validation / setting.batch_size
    work: Counter[Kind] = Counter()
    work["training"] = round(setting.epochs * batches * more)
    work["rest"] = round(setting.epochs * batches * first.flops)
    work["held out"] = round(setting.epochs * held_out * (forward + more_forward))
    if setting.solves:
        pruned = rehearsal.prunable(setting.exclude)
        for block in rehearsal.anatomy.blocks:
            if names := list(block.weights_among(pruned)):
                work["walk"] += round(batches * rehearsal.passed(block, setting).flops)
                work += _matrix_work(rehearsal, block.index, names, setting)
    return work


def seconds_of(work: Mapping[Kind, int], rates: Mapping[Kind, float], setting: Setting) -> float:
    """The time that the slowest process takes.

    Args:
        work: Of all processes.
        rates: FLOP/s of one process, for every kind of work that there is.
        setting: Says how many processes there are.
    """
    # Every process walks through the dense blocks up to its own windows, the last one through all of them.
    alone = ("walk",) if setting.is_local else ()
    return sum(
        flops / rates[kind] / (1 if kind in alone else setting.world_size) for kind, flops in work.items() if flops
    )


def _walks(setting: Setting) -> int:
    """How often the sequences pass each block while nothing is trained."""
    if setting.propagation == "dense":
        return 1
    observed = setting.collects and setting.propagation == "recovered"  # in the recovered stream, by a pass of its own
    return 2 + observed + setting.taps  # dense and recovered stream; once attention is recovered, again


def _matrix_work(rehearsal: Rehearsal, index: int, names: list[str], setting: Setting) -> Counter[Kind]:
    """Gram matrices of a block's matrices, and what is solved with them."""
    tokens = setting.num_sequences * setting.seq_len
    block = rehearsal.anatomy.blocks[index]
    products = sum(2 * rehearsal.products(name) for name in names)
    sums = 3 if setting.crosses else 1
    work: Counter[Kind] = Counter()
    work["gram"] = sums * 2 * tokens * sum(width**2 for width in rehearsal.inputs(block, names, setting))
    work["solve"] = setting.solves * SOLVER_ITERATIONS * products
    work["training"] = 3 * setting.descent_steps * products
    return work


def stated(rate: float) -> dict[Kind, float]:
    """One rate for all kinds of work."""
    return dict.fromkeys(KINDS, rate)
