"""What a recovery needs of its options, asked before anything is loaded or, where the model decides, before pruning."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from recon.basics.units import readable
from recon.distributed.part import Share
from recon.experiment.checkpoints import Checkpoints
from recon.experiment.job import Job
from recon.experiment.origin import Origin, require_masks_of
from recon.experiment.tasks import require_scorable
from recon.models.anatomy import Anatomy
from recon.models.matrices import Matrix
from recon.pruning.patterns import Experts
from recon.pruning.prune import require_fit
from recon.pruning.removal import require_of_experts, require_removable
from recon.scopes.base import Scope
from recon.scopes.local.module import LocalScope
from recon.scopes.local.schedule import require_recovered_inputs
from recon.scopes.lora import require_linear_maps
from recon.scopes.removal import require_recoverable
from recon.scopes.starts import NO_MOVED, NO_RUN

CLEARLY = 0.9
"""Share of the predicted bytes below which a disk is refused: a prediction may be a little too high."""


def require_feasible(job: Job) -> None:
    """Refuse options that do not go together.

    Raises:
        ValueError: With the options that would.
    """
    scope, options = job.scope, job.options
    scope.require_trainer(job.trainer)
    if job.data.max_tokens is not None and scope.by_window:
        raise ValueError(
            f"data.max_tokens is for full retraining, got {job.data.max_tokens} with the {scope.scope} scope, which "
            f"recovers on the calibration sequences; leave it out and give data.num_sequences, or choose scopes/full"
        )
    job.data.require_tokenizer(scope.source.load_tokenizer)
    if options.interleaves:
        require_interleavable(job)
    if options.part is not None:
        _require_divisible(job, options.part)
    require_origin(job)
    if not scope.loads_whole and (job.measures_baselines or not _has_masks(job)):
        raise ValueError(
            "model.partitioned needs masks made before, since pruning takes the whole model, and no baselines; choose "
            "model.offload: disk, or give --masks <masks.safetensors of recon prune> and --baselines false"
        )
    if scope.start == "moved" and options.masks is None and not options.moves_weights:
        raise ValueError(NO_MOVED.format(f"and {options.criterion or 'no criterion'} moves none"))
    require_room(job)
    if job.is_first and options.part is None:
        require_scorable(options.suite, scope.offload, scope.loads_whole)


def require_origin(job: Job) -> None:
    """Refuse a run to start from that is not whole, has other masks or another dense model, or is not wanted.

    Raises:
        ValueError: Naming the run, with the cure.
    """
    origin, options = job.options.origin, job.options
    if origin is None:
        if job.scope.start == "run":
            raise ValueError(NO_RUN)
        return
    origin.require()
    if options.interleaves or not options.prunes:
        got = "pruning.inputs: recovered" if options.interleaves else "--criterion null"
        raise ValueError(
            f"{origin.option} {origin.path} recovers under the masks of that run, got {got}; leave it out, or leave "
            f"out {origin.option}"
        )
    require_masks_of(origin, options.masks)
    origin.require_same_model(Origin(job.run.path).dense())


def _has_masks(job: Job) -> bool:
    return job.run.masks.exists() or job.options.masks is not None or job.options.origin is not None


def require_suitable(job: Job) -> None:
    """Refuse options that the loaded model does not fit, before it is pruned.

    Raises:
        ValueError: Naming the option.
    """
    scope, options = job.scope, job.options
    anatomy = Anatomy.of(scope.model)
    pruned = anatomy.prunable(options.pruning.exclude) if options.prunes and not _has_masks(job) else {}
    if options.pattern is not None:
        require_fit(pruned, options.pattern, options.pruning)
    if isinstance(options.pattern, Experts) and pruned:
        assert options.criterion is not None
        require_of_experts(options.criterion, options.pattern, options.pruning)
        require_removable(scope.model, anatomy, options.pattern)
        require_recoverable(scope, job.trainer)
    require_matrices(scope, anatomy, pruned)


def require_matrices(scope: Scope, anatomy: Anatomy, pruned: Mapping[str, Matrix]) -> None:
    """Refuse matrices that the options of a scope do not fit.

    Args:
        scope: The scope.
        anatomy: The blocks of the model.
        pruned: Name of the weight -> matrix to be pruned.

    Raises:
        ValueError: Naming the option.
    """
    if vars(scope).get("which_parameters") == "lora":
        require_linear_maps(pruned.values())
    scope.require_model(anatomy, pruned)


def require_room(job: Job) -> None:
    """Refuse a disk with clearly too few free bytes for what the run is predicted to write.

    What an earlier start has written is there already. Without a prediction nothing is refused.

    Raises:
        ValueError: Naming the directory, with both numbers.
    """
    predicted = dict(job.options.prediction.get("disk", {}))
    if "checkpoints" in predicted:
        predicted["checkpoints"] = predicted["checkpoints"] // 2 * min(2, _num_checkpoints(job))
    if (part := job.options.part) is not None and "windows" in predicted:
        predicted = {**predicted, "windows": predicted["windows"] // part.of, "model": 0}
    require_free(job.run.path, predicted)


def require_free(directory: Path, predicted: Mapping[str, int]) -> None:
    """Refuse a disk with clearly too few free bytes, but for those that are in the directory already.

    Args:
        directory: Of the run; it need not exist.
        predicted: What is written there -> its bytes.

    Raises:
        ValueError: Naming the directory, with both numbers.
    """
    needed = sum(predicted.values()) - sum(one.stat().st_size for one in directory.rglob("*") if one.is_file())
    place = _existing(directory)
    free = shutil.disk_usage(place).free
    if free < CLEARLY * needed:
        largest = ", ".join(f"{name} {readable(size)}" for name, size in predicted.items() if size > 0)
        raise ValueError(
            f"a run needs room for what it writes, predicted {readable(needed)} more ({largest}), got "
            f"{readable(free)} free in {place}; free space, or name a run_dir on another disk"
        )


def _num_checkpoints(job: Job) -> int:
    """How many regular checkpoints full retraining writes, as the prediction knows it."""
    every = [one.every_n_steps for one in job.trainer.callbacks if isinstance(one, Checkpoints)]  # pyright: ignore[reportAttributeAccessIssue]
    return job.options.prediction["steps"] // every[0] if every else 0


def _existing(path: Path) -> Path:
    """The directory, or the first one above it that is there."""
    return next(one for one in (path, *path.absolute().parents) if one.is_dir())


def require_complete(job: Job) -> None:
    """Refuse to put windows together that are not all there.

    Raises:
        ValueError: Naming the first missing one.
    """
    scope, run = job.scope, job.run
    if not scope.by_window:
        raise ValueError(f"merge needs a run of a local scope, got {run.path} of the {scope.scope} scope")
    if missing := scope.missing(scope.windows):
        raise ValueError(
            f"merge needs all {len(scope.windows)} windows of the run, got {run.path}, which lacks {len(missing)}, "
            f"{missing[0].name} the first; run the parts that have not ended again, or recon fit without --windows"
        )


def require_interleavable(job: Job) -> None:
    """Refuse to choose masks along with recovery where they cannot be.

    Raises:
        ValueError: If the scope has no windows or dense inputs, masks were given, or the pattern ranks across the
            model.
    """
    scope, options = job.scope, job.options
    assert options.pattern is not None
    if not scope.by_window or options.masks is not None or options.pattern.across_model:
        across = f"a pattern {options.pattern}" if options.pattern.across_model else scope.scope
        got = f"--masks {options.masks}" if options.masks is not None else across
        raise ValueError(
            f"pruning.inputs: recovered chooses masks block by block along with recovery, which needs a local scope, a "
            f"pattern per row, matrix or group, and no masks made before, got {got}; choose pruning.inputs: dense"
        )
    assert isinstance(scope, LocalScope)
    require_recovered_inputs(scope.propagation)


def _require_divisible(job: Job, part: Share) -> None:
    scope, processes = job.scope, job.trainer.num_devices * job.trainer.num_nodes
    if not scope.by_window:
        raise ValueError(
            f"--windows {part} needs a scope that has windows, got the {scope.scope} scope; choose scopes/submodule, "
            f"scopes/block or scopes/matrix"
        )
    if processes > 1:
        raise ValueError(
            f"--windows {part} recovers its windows in one process, got trainer.devices and trainer.num_nodes that "
            f"make {processes}; set both to 1, or leave out --windows"
        )
    scope.require_independent(f"--windows {part}")
