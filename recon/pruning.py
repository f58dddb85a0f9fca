"""Pruning a model: which weights survive, found by walking its blocks from the first to the last."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recon.activations import Activations
from recon.anatomy import Anatomy
from recon.criteria import Criterion
from recon.masks import Masks
from recon.patterns import Pattern
from recon.replay import Replay
from recon.shapes import as_out_in, weight_out_in
from recon.start import MOVED, Sink, Start, apply, written
from recon.statistics import collect

CAME_WITH_MOVED = "moved"
"""Key in the metadata of masks: where the moved weights are that were written with them, seen from their directory."""


@dataclass
class Pruning:
    """How a model is pruned, besides criterion and pattern.

    Args:
        exclude: Names of modules that stay dense; shell patterns such as `*.down_proj`.
        inputs: Whether a block's statistics come from what the dense blocks before it produce, or from
            what the pruned ones do.
        batch_size: Sequences per forward pass.
    """

    exclude: list[str] = field(default_factory=list)
    inputs: Literal["dense", "pruned"] = "dense"
    batch_size: int = 8


def prune(
    model: PreTrainedModel,
    tokens: Tensor,
    criterion: Criterion,
    pattern: Pattern,
    options: Pruning | None = None,
    progress: Callable[[str], None] = lambda line: None,
    moved: Sink | None = None,
) -> Masks:
    """Choose the weights of `model` that survive. The model itself is left as it was.

    Args:
        model: In evaluation mode, on the device to compute on.
        tokens: Calibration sequences, int64[num_sequences, seq_len].
        criterion: How much a weight matters.
        pattern: Which zeros are allowed.
        options: See `Pruning`.
        progress: Is told each block, in a line.
        moved: Is given every weight as a criterion that moves weights leaves it: in the parameter's layout and
            dtype, on its device, zero where pruned.

    Raises:
        ValueError: If the pattern does not fit a matrix or an exclusion matches nothing.
        FloatingPointError: If inputs or statistics are no numbers.
    """
    options = options or Pruning()
    if pattern.across_model and options.inputs == "pruned":
        raise ValueError(
            f"pruning.inputs: pruned needs masks block by block, got a pattern that chooses across the model "
            f"({pattern}); choose pruning.inputs: dense or a pattern per row or per matrix"
        )
    if pattern.across_model and type(criterion).prune is not Criterion.prune:
        raise ValueError(
            f"{criterion} chooses within one matrix, where it also sees what the other weights can make up for, and "
            f"{pattern} across the model; choose a pattern per row or per matrix, or a criterion that only scores"
        )
    anatomy = Anatomy.of(model)
    prunable = anatomy.prunable(options.exclude)
    replay = Replay(model, anatomy)
    walk = Activations(replay, tokens, options.batch_size, next(model.parameters()).device)
    scores: dict[str, Tensor] = {}
    keep: dict[str, Tensor] = {}
    for block in anatomy.blocks:
        matrices = {name: module for name, module in prunable.items() if name.removesuffix(".weight") in block.matrices}
        with collect(matrices, need=criterion.needs) as statistics:
            walk.enter([block.index])
        start: dict[str, Tensor] = {}
        for name, module in matrices.items():
            weight = weight_out_in(module)
            if pattern.across_model:
                scores[name] = criterion.scores(weight, statistics[name], name)
                continue
            after, chosen = criterion.prune(weight, statistics[name], pattern, name)
            keep[name] = as_out_in(module, chosen)
            if criterion.moves_weights:
                start[name] = as_out_in(module, after.to(weight.dtype).masked_fill(~chosen, 0))
                if moved is not None:
                    moved(name, start[name])
        if options.inputs == "pruned":
            _pass_pruned(walk, Masks({name: keep[name] for name in matrices}), start or None, model)
        progress(
            f"prune  block {block.index + 1}/{len(anatomy.blocks)}  {len(matrices)} matrices  {criterion}  {pattern}"
        )
    if pattern.across_model:
        keep = {name: as_out_in(prunable[name], chosen) for name, chosen in pattern.select_all(scores).items()}
    return Masks({name: chosen.cpu().contiguous() for name, chosen in keep.items()})


def prune_to(
    masks_file: Path,
    model: PreTrainedModel,
    tokens: Tensor,
    criterion: Criterion,
    pattern: Pattern,
    options: Pruning | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Masks:
    """As `prune`, and write the masks; before them, and beside, what a criterion that moves weights makes of these."""
    made_by = {"criterion": str(criterion), "pattern": str(pattern)}
    if criterion.moves_weights:
        prunable = Anatomy.of(model).prunable((options or Pruning()).exclude)
        weights = {name: module.get_parameter("weight") for name, module in prunable.items()}
        with written(masks_file.with_name(MOVED), like=weights) as moved:
            masks = prune(model, tokens, criterion, pattern, options, progress, moved)
        made_by[CAME_WITH_MOVED] = MOVED
    else:
        masks = prune(model, tokens, criterion, pattern, options, progress)
    masks.save(masks_file, made_by)
    return masks


def moved_with(masks_file: Path, masks: Masks) -> Start | None:
    """The moved weights that were written with the masks in `masks_file`; None if their criterion moves none.

    Raises:
        ValueError: If they are no longer there, or are those of other masks.
    """
    made_by = Masks.read_metadata(masks_file)
    if CAME_WITH_MOVED not in made_by:
        return None
    path = masks_file.parent / made_by[CAME_WITH_MOVED]
    if not path.exists():
        raise ValueError(
            f"the masks in {masks_file} are those of {made_by['criterion']}, which moves weights, and need {path}, "
            f"which does not exist; copy it there, or prune again"
        )
    return Start(path, masks)


def _pass_pruned(walk: Activations, masks: Masks, start: Mapping[str, Tensor] | None, model: nn.Module) -> None:
    """Replace the walk's output of its current block by that of the pruned block, then restore the block's weights."""
    dense = {name: model.get_parameter(name).detach().clone() for name in masks}
    try:
        apply(model, masks, start)
        walk.compute()
    finally:
        with torch.no_grad():
            for name, weight in dense.items():
                model.get_parameter(name).copy_(weight)
