"""The weights that best reproduce every matrix by itself, as a start for the scopes that train.

A start is solved as far as training makes use of it: each row until an iteration improves its objective by less than
1 %, with products in TF32 where the device has it. The matrix scope solves the same problems to fp32's limit.
"""

import logging

from torch import Tensor

from recon.calibration.activations import Activations
from recon.calibration.statistics import InputStatistics
from recon.calibration.storage import ON_DEVICE, Storage
from recon.models.matrices import Matrix, by_parameter, joined
from recon.models.replay import Replay
from recon.profiling.ledger import followed
from recon.pruning.masks import Masks
from recon.pruning.start_weights import Sink
from recon.solvers import ConjugateGradients, LeastSquares, Solution, Solver

log = logging.getLogger("recon")

START_SOLVER = ConjugateGradients(improvement=1e-2, products="tf32")
"""On the bundled model, training ends where it does from a start as exact as fp32 allows (README of the solvers)."""


def solve(
    matrix: Matrix,
    statistics: InputStatistics,
    keep: Tensor,
    solver: Solver = START_SOLVER,
) -> Solution:
    """Solve one matrix, still dense, for a start.

    Args:
        matrix: The matrix.
        statistics: Of its inputs, with the Gram matrix; those of pairs pose the problem with dense targets.
        keep: Its mask, out x in.
        solver: Conjugate gradients for a start by default.

    Raises:
        ValueError: If numbers are not finite.
    """
    dense = matrix.weight
    return solver.solve(LeastSquares.of(statistics, dense), keep.to(dense.device), dense, matrix.weight_name)


def solve_all(
    replay: Replay,
    tokens: Tensor,
    masks: Masks,
    sink: Sink,
    batch_size: int = 8,
    storage: Storage = ON_DEVICE,
) -> None:
    """Solve every pruned matrix of a dense model on its dense inputs, block by block. The model is left as it was.

    Args:
        replay: The model, on the device to compute on.
        tokens: Calibration sequences, int64[num_sequences, seq_len].
        masks: Which weights survive.
        sink: Is given each solution, in the parameter's layout, dtype and on its device.
        batch_size: Sequences per forward pass.
        storage: Place of the hidden states.

    Raises:
        ValueError: If a mask is not that of a linear map in a block, or numbers are not finite.
        FloatingPointError: If hidden states are no numbers.
    """
    anatomy = replay.anatomy
    by_block = [block.weights_among(masks) for block in anatomy.blocks]
    orphans = masks.keys() - {one.parameter_name for matrices in by_block for one in matrices.values()}
    if orphans:
        raise ValueError(
            f"model.start: exact needs every pruned weight to be that of a linear map in a block, got {len(orphans)} "
            f"that belong to none, {min(orphans)} the first; exclude them with `pruning.exclude` or choose "
            f"model.start: pruned"
        )
    walk = Activations(replay, tokens, batch_size, replay.device, storage=storage)
    for block, matrices in zip(anatomy.blocks, by_block, strict=True):
        if not matrices:
            continue
        statistics = walk.enter([block.index], matrices, "start gram")
        gradients = []
        with followed("solve"):
            for group in by_parameter(matrices):
                solved = {}
                for name, matrix in group.items():
                    solution = solve(matrix, statistics[name], masks.of(matrix, matrix.parameter.device))
                    gradients.append(solution.projected_gradient)
                    solved[name] = solution.weight.to(matrix.parameter.dtype)
                for name, weight in joined(group, solved, Tensor.clone).items():
                    sink(name, weight)
        log.info(
            f"start  block {block.index + 1}/{len(anatomy.blocks)}  {len(matrices)} matrices solved  "
            f"projected gradient at most {max(gradients):.1e}"
        )
