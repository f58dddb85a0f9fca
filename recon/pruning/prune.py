"""Pruning of a model: the survivors of its blocks, chosen one block after another."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recon.basics.manifest import Manifest, require_unchanged
from recon.calibration.activations import Activations
from recon.calibration.statistics import InputStatistics
from recon.calibration.storage import ON_DEVICE, Storage
from recon.models.anatomy import Anatomy
from recon.models.experts import ExpertStatistics
from recon.models.matrices import Matrix, by_parameter, joined, parameters_of
from recon.models.replay import Replay
from recon.profiling.ledger import followed
from recon.pruning.criteria import Criterion
from recon.pruning.criteria.experts import ExpertCriterion
from recon.pruning.masks import Masks
from recon.pruning.options import Pruning
from recon.pruning.patterns import Counted, Experts, Pattern
from recon.pruning.recorded_pattern import recorded
from recon.pruning.refinement import Refined
from recon.pruning.removal import remove, require_of_experts, require_removable
from recon.pruning.start_weights import Sink, Start, apply, written

log = logging.getLogger("recon")

CAME_WITH_MOVED = "moved"
"""Key in the metadata of masks: path of the moved weights written with them, relative to their directory."""

FEW_ROWS = "few_rows"
"""Key in the metadata of masks: matrices of experts whose statistics had fewer rows than inputs -> rows, as JSON."""

LEFT_DENSE = "left_dense"
"""Key in the metadata of masks: parameters of blocks with two dimensions or more without a matrix -> shape, as JSON."""


def prune(
    model: PreTrainedModel,
    tokens: Tensor,
    criterion: Criterion,
    pattern: Pattern,
    options: Pruning | None = None,
    moved: Sink | None = None,
    replay: Replay | None = None,
    storage: Storage = ON_DEVICE,
) -> Masks:
    """Choose the surviving weights of `model`. The model itself stays as it was.

    Args:
        model: In evaluation mode, on the device to compute on.
        tokens: Calibration sequences, int64[num_sequences, seq_len].
        criterion: The measure of importance.
        pattern: The pattern of zeros.
        options: See `Pruning`.
        moved: Receives every weight that the criterion moved: in the parameter's layout and dtype, on its device, zero
            where pruned.
        replay: Replay of the model, if its blocks are not on the device.
        storage: Place of the hidden states.

    Returns:
        Parameter name -> mask, for all prunable matrices.

    Raises:
        ValueError: If the pattern does not fit a matrix or an option, or an exclusion matches nothing.
        FloatingPointError: If inputs or statistics are not finite.
    """
    options = options or Pruning()
    _require_compatible(criterion, pattern, options)
    replay = replay or Replay(model, Anatomy.of(model))
    replay.experts.rows = options.experts
    begin = partial(Activations, replay, tokens, options.batch_size, replay.device, storage=storage)
    if isinstance(pattern, Experts) and isinstance(criterion, ExpertCriterion):
        require_removable(replay.model, replay.anatomy, pattern)
        return remove(begin(), criterion, pattern)
    blocks = matrices_by_block(replay.anatomy, options.exclude)
    require_fit(replay.anatomy.prunable(options.exclude), pattern, options)
    patterns = block_patterns(replay, tokens, criterion, pattern, options, storage)
    if pattern.across_model:
        # Scores need no Gram matrix of a criterion whose masks are refined when all are chosen.
        scoring = criterion.criterion if isinstance(criterion, Refined) else criterion
        masks = _across_model(begin, blocks, scoring, pattern)
        return _refined(begin(), blocks, criterion, pattern, masks, moved) if isinstance(criterion, Refined) else masks
    walk, masks = begin(), Masks({})
    for index, (matrices, of_block) in enumerate(zip(blocks, patterns, strict=True)):
        statistics = walk.enter([index], matrices, criterion.needs)
        with followed("choose masks"):
            chosen, start = prune_block(matrices, statistics, criterion, of_block)
        block_masks = Masks(chosen)
        masks.add(block_masks)
        if moved is not None:
            for name, weight in start.items():
                moved(name, weight)
        if options.inputs == "pruned":
            _pass_pruned(walk, block_masks, start or None, model)
        log.info(f"prune  block {index + 1}/{len(blocks)}  {len(matrices)} matrices  {criterion}  {of_block}")
    return masks


def _across_model(
    begin: Callable[[], Activations], blocks: Sequence[dict[str, Matrix]], criterion: Criterion, pattern: Pattern
) -> Masks:
    """Choose among the weights of all blocks, in two walks that compute the same scores: none are kept."""
    competition = pattern.competition()
    assert competition is not None
    for said, take in (("score", competition.count), ("prune", competition.mark)):
        walk = begin()
        for index, matrices in enumerate(blocks):
            statistics = walk.enter([index], matrices, criterion.needs)
            for name, matrix in matrices.items():
                take(name, criterion.scores(matrix.weight, statistics[name], name))
            log.info(f"{said}  block {index + 1}/{len(blocks)}  {len(matrices)} matrices  {criterion}  {pattern}")
    matrices = {name: matrix for of_block in blocks for name, matrix in of_block.items()}
    masks = Masks({})
    for _, chosen in groupby(competition.masks(), lambda one: matrices[one[0]].parameter_name):
        masks.add(Masks(joined(matrices, dict(chosen), _all_kept_on_host)))
    return masks


def _refined(
    walk: Activations,
    blocks: Sequence[dict[str, Matrix]],
    criterion: Refined,
    pattern: Pattern,
    masks: Masks,
    moved: Sink | None,
) -> Masks:
    """Improve masks that were chosen across the model, block by block: one more walk, now with Gram matrices."""
    better = Masks({})
    for index, matrices in enumerate(blocks):
        statistics = walk.enter([index], matrices, criterion.needs)
        for group in by_parameter(matrices):
            keep, weights = {}, {}
            for name, matrix in group.items():
                weight = matrix.weight
                before = masks.of(matrix, weight.device)
                after, keep[name] = criterion.refine(weight, statistics[name], weight, before, pattern, name)
                if moved is not None:
                    weights[name] = after.to(weight.dtype).masked_fill(~keep[name], 0)
            better.add(Masks({name: one.cpu().contiguous() for name, one in joined(group, keep, _all_kept).items()}))
            if moved is not None:
                for name, weight in joined(group, weights, Tensor.clone).items():
                    moved(name, weight)
        log.info(f"refine  block {index + 1}/{len(blocks)}  {len(matrices)} matrices  {criterion}  {pattern}")
    return better


def prune_block(
    matrices: Mapping[str, Matrix],
    statistics: Mapping[str, InputStatistics],
    criterion: Criterion,
    pattern: Pattern,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Choose the survivors of the matrices of one block. The matrices themselves stay as they were.

    A matrix whose rows have different patterns is pruned under each of them, and each result gives its rows: the result
    for one row may depend on the others.

    Args:
        matrices: Name of the weight -> matrix, dense.
        statistics: Name of the weight -> statistics of its inputs.
        criterion: The measure of importance.
        pattern: The pattern of this block; none that ranks across the model.

    Returns:
        Parameter name -> mask, True = kept, and parameter name -> moved weight, zero where pruned; no weights if the
        criterion moves none. Both in the parameter's layout and on its device, weights in its dtype.

    Raises:
        ValueError: If the pattern does not fit a matrix.
    """
    keep: dict[str, Tensor] = {}
    moved: dict[str, Tensor] = {}
    for name, matrix in matrices.items():
        weight = matrix.weight
        parts = pattern.parts(name, weight.shape[0], weight.shape[1])
        results = [criterion.prune(weight, statistics[name], part, name) for _, part in parts]
        after, chosen = results[0]
        if len(parts) > 1:
            rows = [some for some, _ in parts]
            after, chosen = (
                torch.cat([result[i][some] for result, some in zip(results, rows, strict=True)]) for i in range(2)
            )
        keep[name] = chosen
        if criterion.moves_weights:
            moved[name] = after.to(weight.dtype).masked_fill(~chosen, 0)
    return joined(matrices, keep, _all_kept), joined(matrices, moved, Tensor.clone)


def _all_kept(parameter: Tensor) -> Tensor:
    return torch.ones_like(parameter, dtype=torch.bool)


def _all_kept_on_host(parameter: Tensor) -> Tensor:
    return torch.ones(parameter.shape, dtype=torch.bool)


def block_patterns(
    replay: Replay,
    tokens: Tensor,
    criterion: Criterion,
    pattern: Pattern,
    options: Pruning,
    storage: Storage = ON_DEVICE,
) -> list[Pattern]:
    """Find the pattern of every block: `pattern` itself, or one of the allocation's.

    Args:
        replay: The dense model; with an allocation it is walked once.
        tokens: Calibration sequences, int64[num_sequences, seq_len].
        criterion: The measure of importance.
        pattern: The pattern of the whole model.
        options: See `Pruning`.
        storage: Place of the hidden states.

    Raises:
        ValueError: If blocks cannot differ under `pattern`, or the allocation's options do not suit it.
    """
    blocks = matrices_by_block(replay.anatomy, options.exclude)
    if dense := {name: one for block in replay.anatomy.blocks for name, one in block.left_dense().items()}:
        log.info(f"left dense, trained if in a window  {'  '.join(f'{name} {shape}' for name, shape in dense.items())}")
    if options.allocation is None:
        return [pattern] * len(blocks)
    walk = Activations(replay, tokens, options.batch_size, replay.device, storage=storage)
    patterns = options.allocation.patterns(walk, blocks, criterion, pattern)
    log.info(f"allocate  {options.allocation}  densities {' '.join(f'{one.density:.3f}' for one in patterns)}")
    return list(patterns)


def matrices_by_block(anatomy: Anatomy, exclude: Sequence[str] = ()) -> list[dict[str, Matrix]]:
    """List for each block: name of the weight -> matrix to prune; none where all are excluded.

    Raises:
        ValueError: If an exclusion matches nothing or nothing is left to prune.
    """
    prunable = anatomy.prunable(exclude)
    return [block.weights_among(prunable) for block in anatomy.blocks]


def prune_to(
    masks_file: Path,
    model: PreTrainedModel,
    tokens: Tensor,
    criterion: Criterion,
    pattern: Pattern,
    options: Pruning | None = None,
    moved_file: Path | None = None,
    replay: Replay | None = None,
    storage: Storage = ON_DEVICE,
) -> Masks:
    """As `prune`, and write the masks, recorded in the manifest of their directory.

    Args:
        masks_file: File of the masks.
        model: As in `prune`.
        tokens: As in `prune`.
        criterion: As in `prune`.
        pattern: As in `prune`.
        options: As in `prune`.
        moved_file: File of the moved weights, in the same directory, written before the masks; None drops them.
        replay: As in `prune`.
        storage: As in `prune`.
    """
    options = options or Pruning()
    replay = replay or Replay(model, Anatomy.of(model))
    writing, moved_with_them = Manifest(masks_file.parent).writing, {}
    prunable = replay.anatomy.prunable(options.exclude)
    if criterion.moves_weights and moved_file is not None:
        with written(moved_file, parameters_of(prunable.values()), writing) as moved:
            masks = prune(model, tokens, criterion, pattern, options, moved, replay, storage)
        moved_with_them = {CAME_WITH_MOVED: moved_file.name}
    else:
        masks = prune(model, tokens, criterion, pattern, options, None, replay, storage)
    known = made_by(criterion, pattern, options, masks, replay.anatomy, replay.experts) | moved_with_them
    masks.save(masks_file, known, writing)
    return masks


def made_by(
    criterion: Criterion,
    pattern: Pattern,
    options: Pruning,
    masks: Masks,
    anatomy: Anatomy,
    experts: ExpertStatistics,
) -> dict[str, str]:
    """The metadata of masks: their criterion, and their pattern for people and for the check when they are loaded.

    Args:
        criterion: It chose them.
        pattern: As it was asked for.
        options: With an allocation, the zeros of each matrix are recorded.
        masks: All of them.
        anatomy: The blocks of the model.
        experts: How the statistics of experts were made; those with few rows are recorded.
    """
    held, prunable = pattern, anatomy.prunable(options.exclude)
    if options.allocation is not None:
        zeros = {name: masks.num_pruned_of(matrix) for name, matrix in prunable.items()}
        num_weights = sum(math.prod(matrix.shape) for matrix in prunable.values())
        held = Counted(zeros, num_weights, options.allocation.require(pattern).per)  # pyright: ignore[reportArgumentType]
    known = {"criterion": str(criterion), "pattern": options.describe(pattern), **recorded(held, prunable.values())}
    lists = {FEW_ROWS: experts.few, LEFT_DENSE: anatomy.left_dense()}
    return known | {key: json.dumps(found) for key, found in lists.items() if found}


def noted(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Read what the metadata of masks list beside criterion and pattern: `FEW_ROWS` and `LEFT_DENSE`."""
    return {key: json.loads(metadata.get(key, "{}")) for key in (FEW_ROWS, LEFT_DENSE)}


def moved_with(masks_file: Path, masks: Masks) -> Start | None:
    """Open the moved weights that were written with the masks in `masks_file`; None if their criterion moves none.

    Raises:
        ValueError: If the file is missing, damaged, or belongs to other masks.
    """
    known = Masks.read_metadata(masks_file)
    if CAME_WITH_MOVED not in known:
        return None
    path = masks_file.parent / known[CAME_WITH_MOVED]
    if not path.exists():
        raise ValueError(
            f"the masks in {masks_file} are those of {known.get('criterion', 'a criterion')}, which moves weights, "
            f"and need {path}, which does not exist; copy it there, or prune again"
        )
    require_unchanged(path, "copy it again, or prune again")
    return Start(path, masks)


def metadata_at(masks_file: Path) -> dict[str, str]:
    """The metadata of masks for a copy of them elsewhere: it finds the moved weights that came with them."""
    known = Masks.read_metadata(masks_file)
    if CAME_WITH_MOVED in known:
        known[CAME_WITH_MOVED] = str((masks_file.parent / known[CAME_WITH_MOVED]).resolve())
    return known


def require_fit(matrices: Mapping[str, Matrix], pattern: Pattern, options: Pruning) -> None:
    """Refuse matrices that the pattern does not fit, before the first is scored.

    Args:
        matrices: Name of the weight -> matrix to prune.
        pattern: The pattern of the whole model.
        options: With an allocation the pattern differs from block to block, and is not checked here.

    Raises:
        ValueError: Naming the first matrix.
    """
    if options.allocation is None:
        for name, matrix in matrices.items():
            pattern.require(name, *matrix.shape)


def _require_compatible(criterion: Criterion, pattern: Pattern, options: Pruning) -> None:
    require_of_experts(criterion, pattern, options)
    if options.inputs == "recovered":
        raise ValueError(
            "pruning.inputs: recovered chooses the masks of a block when recovery gets there and needs a local scope "
            "with model.propagation recovered or recovered_local, got a run that chooses all masks upfront; choose "
            "pruning.inputs: dense or pruned, or recover with such a scope and without --masks"
        )
    if pattern.across_model and options.inputs == "pruned":
        raise ValueError(
            f"pruning.inputs: pruned needs masks block by block, got a pattern that chooses across the model "
            f"({pattern}); choose pruning.inputs: dense or a pattern per row or per matrix"
        )
    scoring = criterion.criterion if isinstance(criterion, Refined) else criterion
    if pattern.across_model and type(scoring).prune is not Criterion.prune:
        raise ValueError(
            f"{criterion} chooses within one matrix, where it also sees what the other weights can make up for, and "
            f"{pattern} across the model; choose a pattern per row or per matrix, or a criterion that only scores"
        )
    if options.allocation is not None:
        options.allocation.require(pattern)


def _pass_pruned(walk: Activations, masks: Masks, start: Mapping[str, Tensor] | None, model: nn.Module) -> None:
    """Replace the walk's output of its current block by the pruned block's, then restore the block's weights."""
    dense = {name: model.get_parameter(name).detach().clone() for name in masks}
    try:
        apply(model, masks, start)
        walk.compute()
    finally:
        with torch.no_grad():
            for name, weight in dense.items():
                model.get_parameter(name).copy_(weight)
