"""Pruning of a model: the survivors of its blocks, chosen one block after another."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recon.basics.manifest import Manifest, require_unchanged
from recon.calibration.activations import Activations
from recon.calibration.collection import collect
from recon.calibration.statistics import InputStatistics
from recon.calibration.storage import ON_DEVICE, Storage
from recon.models.anatomy import Anatomy
from recon.models.linear import as_out_in, is_transposed, weight_out_in
from recon.models.replay import Replay
from recon.profiling.ledger import followed
from recon.pruning.allocation import Allocation
from recon.pruning.criteria import Criterion
from recon.pruning.masks import Masks
from recon.pruning.patterns import Counted, Pattern
from recon.pruning.recorded_pattern import recorded
from recon.pruning.refinement import Refined
from recon.pruning.start_weights import Sink, Start, apply, written

log = logging.getLogger("recon")

CAME_WITH_MOVED = "moved"
"""Key in the metadata of masks: path of the moved weights written with them, relative to their directory."""


@dataclass
class Pruning:
    """Options of pruning beside criterion and pattern.

    Args:
        exclude: Names of modules that stay dense; shell patterns such as `*.down_proj`.
        inputs: Source of a block's statistics: the outputs of the dense blocks before it ("dense"), of the pruned
            ones ("pruned") or of the recovered ones ("recovered"). With the first two all masks are chosen upfront;
            with the last the masks of a block are chosen when recovery gets there, which needs a local scope with
            model.propagation recovered or recovered_local.
        batch_size: Sequences per forward pass.
        allocation: Densities of the blocks; the pattern's everywhere if null. It is measured on the dense model,
            whatever `inputs` is.
    """

    exclude: list[str] = field(default_factory=list)
    inputs: Literal["dense", "pruned", "recovered"] = "dense"
    batch_size: int = 8
    allocation: Allocation | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"pruning.batch_size must be at least 1, got {self.batch_size}; 8 is the default")

    def describe(self, pattern: Pattern) -> str:
        """Name `pattern` for reports, with the allocation if there is one: `60% per row, owl`."""
        return str(pattern) if self.allocation is None else f"{pattern}, {self.allocation}"


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
    blocks = matrices_by_block(replay.anatomy, options.exclude)
    require_fit(replay.anatomy.prunable(options.exclude), pattern, options)
    patterns = block_patterns(replay, tokens, criterion, pattern, options, storage)
    begin = partial(Activations, replay, tokens, options.batch_size, replay.device, storage=storage)
    if pattern.across_model:
        # Scores need no Gram matrix of a criterion whose masks are refined when all are chosen.
        scoring = criterion.criterion if isinstance(criterion, Refined) else criterion
        masks = _across_model(begin, blocks, scoring, pattern)
        return _refined(begin(), blocks, criterion, pattern, masks, moved) if isinstance(criterion, Refined) else masks
    walk, masks = begin(), Masks({})
    for index, (matrices, of_block) in enumerate(zip(blocks, patterns, strict=True)):
        with collect(matrices, need=criterion.needs) as statistics:
            walk.enter([index])
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
    begin: Callable[[], Activations], blocks: Sequence[dict[str, nn.Module]], criterion: Criterion, pattern: Pattern
) -> Masks:
    """Choose among the weights of all blocks, in two walks that compute the same scores: none are kept."""
    competition = pattern.competition()
    assert competition is not None
    for said, take in (("score", competition.count), ("prune", competition.mark)):
        walk = begin()
        for index, matrices in enumerate(blocks):
            with collect(matrices, need=criterion.needs) as statistics:
                walk.enter([index])
            for name, module in matrices.items():
                take(name, criterion.scores(weight_out_in(module), statistics[name], name))
            log.info(f"{said}  block {index + 1}/{len(blocks)}  {len(matrices)} matrices  {criterion}  {pattern}")
    modules = {name: module for matrices in blocks for name, module in matrices.items()}
    masks = Masks({})
    for name, keep in competition.masks():
        masks.add(Masks({name: as_out_in(modules[name], keep)}))
    return masks


def _refined(
    walk: Activations,
    blocks: Sequence[dict[str, nn.Module]],
    criterion: Refined,
    pattern: Pattern,
    masks: Masks,
    moved: Sink | None,
) -> Masks:
    """Improve masks that were chosen across the model, block by block: one more walk, now with Gram matrices."""
    better = Masks({})
    for index, matrices in enumerate(blocks):
        with collect(matrices, need=criterion.needs) as statistics:
            walk.enter([index])
        for name, module in matrices.items():
            weight = weight_out_in(module)
            keep = as_out_in(module, masks[name]).to(weight.device)
            after, chosen = criterion.refine(weight, statistics[name], weight, keep, pattern, name)
            better.add(Masks({name: as_out_in(module, chosen).cpu().contiguous()}))
            if moved is not None:
                moved(name, as_out_in(module, after.to(weight.dtype).masked_fill(~chosen, 0)))
        log.info(f"refine  block {index + 1}/{len(blocks)}  {len(matrices)} matrices  {criterion}  {pattern}")
    return better


def prune_block(
    matrices: Mapping[str, nn.Module],
    statistics: Mapping[str, InputStatistics],
    criterion: Criterion,
    pattern: Pattern,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Choose the survivors of the matrices of one block. The matrices themselves stay as they were.

    A matrix whose rows have different patterns is pruned under each of them, and each result gives its rows: the result
    for one row may depend on the others.

    Args:
        matrices: Parameter name -> linear map, dense.
        statistics: Parameter name -> statistics of its inputs.
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
    for name, module in matrices.items():
        weight = weight_out_in(module)
        parts = pattern.parts(name, weight.shape[0], weight.shape[1])
        results = [criterion.prune(weight, statistics[name], part, name) for _, part in parts]
        after, chosen = results[0]
        if len(parts) > 1:
            rows = [some for some, _ in parts]
            after, chosen = (
                torch.cat([result[i][some] for result, some in zip(results, rows, strict=True)]) for i in range(2)
            )
        keep[name] = as_out_in(module, chosen)
        if criterion.moves_weights:
            moved[name] = as_out_in(module, after.to(weight.dtype).masked_fill(~chosen, 0))
    return keep, moved


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
    if dense := replay.anatomy.dense:
        log.info(f"left dense, trained if in a window  {'  '.join(f'{name} {shape}' for name, shape in dense.items())}")
    if options.allocation is None:
        return [pattern] * len(blocks)
    walk = Activations(replay, tokens, options.batch_size, replay.device, storage=storage)
    patterns = options.allocation.patterns(walk, blocks, criterion, pattern)
    log.info(f"allocate  {options.allocation}  densities {' '.join(f'{one.density:.3f}' for one in patterns)}")
    return list(patterns)


def matrices_by_block(anatomy: Anatomy, exclude: Sequence[str] = ()) -> list[dict[str, nn.Module]]:
    """List for each block: parameter name -> linear map to prune; none where all are excluded.

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
    writing, moved_with_them = Manifest(masks_file.parent).writing, {}
    prunable = Anatomy.of(model).prunable(options.exclude)
    if criterion.moves_weights and moved_file is not None:
        weights = {name: module.get_parameter("weight") for name, module in prunable.items()}
        with written(moved_file, weights, writing) as moved:
            masks = prune(model, tokens, criterion, pattern, options, moved, replay, storage)
        moved_with_them = {CAME_WITH_MOVED: moved_file.name}
    else:
        masks = prune(model, tokens, criterion, pattern, options, None, replay, storage)
    masks.save(masks_file, made_by(criterion, pattern, options, masks, prunable) | moved_with_them, writing)
    return masks


def made_by(
    criterion: Criterion, pattern: Pattern, options: Pruning, masks: Masks, prunable: Mapping[str, nn.Module]
) -> dict[str, str]:
    """The metadata of masks: their criterion, and their pattern for people and for the check when they are loaded.

    Args:
        criterion: It chose them.
        pattern: As it was asked for.
        options: With an allocation, the zeros of each matrix are recorded.
        masks: All of them.
        prunable: Parameter name -> linear map.
    """
    held = pattern
    if options.allocation is not None:
        zeros = {name: masks.subset([name]).num_pruned for name in masks}
        held = Counted(zeros, sum(map(math.prod, masks.shapes.values())), options.allocation.require(pattern).per)  # pyright: ignore[reportArgumentType]
    transposed = [name for name in masks if is_transposed(prunable[name])]
    return {"criterion": str(criterion), "pattern": options.describe(pattern), **recorded(held, transposed)}


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


def require_fit(matrices: Mapping[str, nn.Module], pattern: Pattern, options: Pruning) -> None:
    """Refuse matrices that the pattern does not fit, before the first is scored.

    Args:
        matrices: Parameter name -> linear map to prune.
        pattern: The pattern of the whole model.
        options: With an allocation the pattern differs from block to block, and is not checked here.

    Raises:
        ValueError: Naming the first matrix.
    """
    if options.allocation is None:
        for name, module in matrices.items():
            pattern.require(name, *weight_out_in(module).shape)


def _require_compatible(criterion: Criterion, pattern: Pattern, options: Pruning) -> None:
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
