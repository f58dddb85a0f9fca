"""What a recovery needs of its options, asked before anything is loaded."""

from recon.distributed.part import Share
from recon.experiment.job import Job
from recon.scopes.base import NO_MOVED


def require_feasible(job: Job) -> None:
    """Refuse options that do not go together.

    Raises:
        ValueError: With the options that would.
    """
    scope, options = job.scope, job.options
    scope.require_trainer(job.trainer)
    if options.part is not None:
        _require_divisible(job, options.part)
    if not scope.loads_whole and (job.measures_baselines or not (job.run.masks.exists() or options.masks)):
        raise ValueError(
            "model.partitioned needs masks made before, since pruning takes the whole model, and no baselines; give "
            "--masks <masks.safetensors of recon prune> and --baselines false"
        )
    moves = options.criterion is not None and options.criterion.moves_weights
    if scope.start == "moved" and options.masks is None and not moves:
        raise ValueError(NO_MOVED.format(f"and {options.criterion or 'no criterion'} moves none"))


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
        ValueError: If the scope has no windows, masks were given, or the pattern ranks across the model.
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
