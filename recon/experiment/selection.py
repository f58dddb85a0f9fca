"""The masks of a run: from its directory, from a file or from memory, by pruning now, or block by block on the way."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from recon.basics.locks import locked
from recon.basics.manifest import require_unchanged
from recon.experiment.job import Job
from recon.profiling.phases import PhaseName
from recon.pruning.interleaved import Interleaved
from recon.pruning.masks import Masks
from recon.pruning.prune import block_patterns, metadata_at, moved_with, prune_to
from recon.pruning.start_weights import Start
from recon.pruning.whole_slices import removes_slices

GIVEN = {"criterion": "given masks", "pattern": "given masks"}
"""The origin of masks in memory, which do not tell theirs."""


@dataclass(frozen=True)
class Selection:
    """The weights that survive.

    Args:
        masks: All masks; none where nothing is pruned, and none yet where they are chosen along with recovery.
        moved: The weights as the criterion moved them, where they are needed and there are any.
        interleaved: Chooses the masks of each block along with recovery; None where they are known.
        start: The weights that recovery starts from, where a criterion has moved them or another run has them.
    """

    masks: Masks = field(default_factory=lambda: Masks({}))
    moved: Start | None = None
    interleaved: Interleaved | None = None
    start: Mapping[str, Tensor] | None = None


def select(job: Job) -> Selection:
    """Choose the survivors in the dense model, which the scope has loaded.

    Raises:
        ValueError: If the masks are not those of the model, or cannot be had.
    """
    if not job.options.prunes:
        return Selection()
    job.scope.phases.enter(PhaseName.PRUNE)
    if job.options.interleaves:
        return Selection(interleaved=_interleaved(job))
    with locked(job.run.path / ".masks.lock") if job.options.part is not None else nullcontext():
        masks = _masks(job)
    origin, start = job.options.origin, job.scope.start
    if origin is not None and removes_slices(masks):
        raise ValueError(
            f"{origin.option} needs a run whose model has the shape of the dense one, got {origin.path}, which has "
            f"lost whole experts; repeat its command with the other options, or take the smaller model as the "
            f"dense one: --model.name {origin.run.model}"
        )
    needed = bool(masks) and (job.measures_baselines or start == "moved")
    moved = moved_with(job.run.masks, masks) if needed else None
    return Selection(masks, moved, start=moved if origin is None else origin.weights(job.scope.model))


def _masks(job: Job) -> Masks:
    given, ours = job.options.masks, job.run.masks
    if job.options.origin is not None:
        given = job.options.origin.run.masks
    if job.run.has_masks:
        return _from_file(job, ours)
    if isinstance(given, Masks):
        given.validate_for(job.scope.model)
        given.save(ours, GIVEN, job.run.manifest.writing)
        return given
    if given is not None:
        return _from_file(job, given)
    return _pruned(job)


def _from_file(job: Job, file: Path) -> Masks:
    """The masks in `file`, copied to the run's directory with the place of the moved weights that came with them."""
    if not file.exists():
        raise ValueError(f"--masks needs a file that `recon prune` wrote, got {file}, which does not exist")
    require_unchanged(file, "copy it again, or make it again with `recon prune`")
    masks = Masks.load(file)
    masks.validate_for(job.scope.model)
    if file != job.run.masks:
        masks.save(job.run.masks, metadata_at(file), job.run.manifest.writing)
    return masks


def _pruned(job: Job) -> Masks:
    scope, options = job.scope, job.options
    assert options.criterion is not None
    assert options.pattern is not None
    replay, tokens = scope.to(job.device).open_replay(), job.data.tokens("train")
    return prune_to(
        job.run.masks,
        scope.model,
        tokens,
        options.criterion,
        options.pattern,
        options.pruning,
        job.run.moved,
        replay,
        scope.storage,
    )


def _interleaved(job: Job) -> Interleaved:
    """How the scope is to choose the masks; an allocation is settled now, on the dense model."""
    scope, options = job.scope, job.options
    assert options.criterion is not None
    assert options.pattern is not None
    replay, tokens = scope.to(job.device).open_replay(), job.data.tokens("train")
    prunable = replay.anatomy.prunable(options.pruning.exclude)
    patterns = block_patterns(replay, tokens, options.criterion, options.pattern, options.pruning, scope.storage)
    return Interleaved(options.criterion, patterns, prunable, job.run.block_masks)
