"""FLOPs of a run by kind, and the time that they take at given speeds.

FLOPs of matrix products and attention count, as in `callbacks.flops`, but a product computed twice counts twice.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Literal, get_args

from recon.calibration import gram
from recon.planner.fake.model import FakeModel
from recon.planner.full import steps_of
from recon.planner.local import FakeModels, one_of_each, windows_to_recover
from recon.planner.options import PlanOptions
from recon.planner.snapshot import SOLVER_ITERATIONS, START_ITERATIONS, START_RESIDUALS
from recon.scopes.local.rate_search import HELD_OUT, Budget, representatives

Kind = Literal["walk", "gram", "solve", "start", "training", "held out", "rest"]
"""- `walk`: passes through dense or recovered blocks;
- `gram`: sums of products of inputs;
- `solve`: solutions in full fp32, and the first and last residual of a start;
- `start`: iterations of starts;
- `training`: training steps;
- `held out`: held-out errors;
- `rest`: in full retraining, the parts of a step outside the further blocks.
"""

KINDS: tuple[Kind, ...] = get_args(Kind)

PREPARATION: tuple[Kind, ...] = ("walk", "gram", "solve", "start")
"""All that a local scope computes before it trains a window."""


def local_flops(fakes: FakeModels, options: PlanOptions) -> Counter[Kind]:
    """Count the FLOPs of the recovery of all windows."""
    stored, trained = fakes.stored, fakes.trained
    batches = options.num_sequences / options.batch_size
    held_out = options.num_validation / options.batch_size
    walks = _walks(options)
    flops: Counter[Kind] = Counter()
    pruned = stored.prunable(options.exclude)
    for block in stored.anatomy.blocks:
        passed = stored.passed(block, options).flops
        flops["walk"] += round(walks * (batches + held_out) * passed)
        names = list(block.weights_among(pruned))
        if options.collects and names:
            flops += _matrix_flops(stored, block.index, names, options)
        if options.scope == "matrix" and names:
            flops["held out"] += round(2 * held_out * trained.passed(block, options).flops)
    if options.scope != "matrix":
        for window, count in one_of_each(stored, options).items():
            step = trained.window(window, options, stored.dtype)
            flops["training"] += round(count * options.epochs * batches * step.flops)
            flops["held out"] += round(count * (options.epochs + 1) * held_out * step.forward_flops)
    if options.searches_rate:
        flops += _search_flops(fakes, options)
    return flops


def _search_flops(fakes: FakeModels, options: PlanOptions) -> Counter[Kind]:
    """Count the FLOPs of all trials that a search for learning rates may make."""
    windows = windows_to_recover(fakes.stored, options)
    tried = representatives(windows)
    size, reach = max(len(one.blocks) for one in tried), max(one.indices[-1] for one in tried) + 1
    of_step, num_held_out = options.batch_size * options.accumulate, min(HELD_OUT, options.num_validation)
    budget = Budget.of(
        steps=options.epochs * math.ceil(options.num_sequences / of_step),
        num_blocks=sum(len(window.blocks) for window in windows) / len(tried),
        size=size,
        reach=reach,
        of_step=of_step,
        num_held_out=num_held_out,
    )
    batches, held_out = budget.steps * options.accumulate, num_held_out / options.batch_size
    flops: Counter[Kind] = Counter()
    for block in fakes.stored.anatomy.blocks[:reach]:
        flops["walk"] += round((batches + held_out) * fakes.stored.passed(block, options).flops)
    for window in tried:
        step = fakes.trained.window(window, options, fakes.stored.dtype)
        flops["training"] += round(budget.trials * batches * step.flops)
        flops["held out"] += round(budget.trials * held_out * step.forward_flops)
    return flops


def full_flops(fake: FakeModel, options: PlanOptions) -> Counter[Kind]:
    """Count the FLOPs of the exact start, of training and of the held-out loss after each epoch, over all processes."""
    first, further = steps_of(fake, options)
    more = sum(count * one.flops for one, count in further)
    forward, more_forward = first.forward_flops, sum(count * one.forward_flops for one, count in further)
    if options.loss == "distillation":  # the teacher's other blocks; `first` has those of its own
        more, more_forward = more + more_forward, 2 * more_forward
    batches = options.num_sequences / options.batch_size
    trained = options.trained_epochs * options.trained_sequences / options.batch_size
    held_out = options.num_validation / options.batch_size
    flops: Counter[Kind] = Counter()
    flops["training"] = round(trained * more)
    flops["rest"] = round(trained * first.flops)
    flops["held out"] = round(math.ceil(options.trained_epochs) * held_out * (forward + more_forward))
    if options.solves:
        pruned = fake.prunable(options.exclude)
        for block in fake.anatomy.blocks:
            if names := list(block.weights_among(pruned)):
                flops["walk"] += round(batches * fake.passed(block, options).flops)
                flops += _matrix_flops(fake, block.index, names, options)
    return flops


def seconds_of(flops: Mapping[Kind, int], speeds: Mapping[Kind, float], options: PlanOptions) -> float:
    """Compute the time of the slowest process.

    Args:
        flops: FLOPs of all processes together, by kind.
        speeds: FLOP/s of one process, for every kind that occurs.
        options: Their `world_size` divides the FLOPs.
    """
    # Every process walks through the dense blocks up to its own windows, the last one through all of them.
    undivided = ("walk",) if options.is_local else ()
    parts = {kind: 1 if kind in undivided else options.world_size for kind in flops}
    return sum((number / speeds[kind] / parts[kind] for kind, number in flops.items() if number), 0.0)


def uniform(speed: float) -> dict[Kind, float]:
    """Assign one speed to all kinds."""
    return dict.fromkeys(KINDS, speed)


def _walks(options: PlanOptions) -> int:
    """Count the passes of the sequences through each block outside training."""
    if options.propagation == "dense":
        return 1
    observed = options.collects and options.propagation == "recovered"  # in the recovered stream, by a pass of its own
    return 2 + observed + options.taps  # dense and recovered stream; once attention is recovered, again


def _matrix_flops(fake: FakeModel, index: int, names: list[str], options: PlanOptions) -> Counter[Kind]:
    """Count the FLOPs of the Gram matrices of a block and of the solves with them."""
    tokens = options.num_sequences * options.seq_len
    block = fake.anatomy.blocks[index]
    products = sum(2 * fake.products(name) for name in names)
    inputs = fake.inputs(block, names, options)
    flops: Counter[Kind] = Counter()
    if options.collects_for_starts:
        flops["gram"] = round(2 * tokens * sum(one.rows_per_token * gram.products(one.width) for one in inputs))
    else:
        sums = 3 if options.crosses else 1
        flops["gram"] = round(sums * 2 * tokens * sum(one.rows_per_token * one.width**2 for one in inputs))
    if options.starts_exact:
        flops["solve"], flops["start"] = START_RESIDUALS * products, START_ITERATIONS * products
    else:
        flops["solve"] = options.solves * SOLVER_ITERATIONS * products
    flops["training"] = 3 * options.descent_steps * products
    return flops
