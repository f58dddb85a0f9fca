"""The fit of a scope: from its last checkpoint or its missing windows to the end, timed and with its peaks."""

import logging
from dataclasses import dataclass
from typing import Any

from recon.distributed import ranks
from recon.experiment import checkpoints
from recon.experiment.consolidation import load_file, require_weights
from recon.experiment.job import Job
from recon.experiment.peaks import peaks_of
from recon.experiment.requirements import require_complete
from recon.profiling.phases import PhaseName

log = logging.getLogger("recon")

OF_LIGHTNING = (
    "state_dict",
    "loops",
    "callbacks",
    "optimizer_states",
    "lr_schedulers",
    "epoch",
    "global_step",
    "pytorch-lightning_version",
)
"""What Lightning needs of a checkpoint to go on."""


@dataclass(frozen=True)
class Training:
    """The cost of a fit.

    Args:
        seconds: Wall time of all starts of the run, an exact start of the weights included.
        at_least: Whether an earlier start was killed, so that its seconds after its last record are missing.
        resumed: Whether an earlier start had done a part of it.
        peaks: Peak memory of each process.
        layout: Processes, strategy and precision.
    """

    seconds: float
    at_least: bool
    resumed: bool
    peaks: list[dict[str, Any]]
    layout: dict[str, Any]


def train(job: Job, resumed: bool) -> Training:
    """Fit the scope, which is prepared; all processes come here.

    Args:
        job: The recovery.
        resumed: Whether the run's directory held parts of a recovery when this process began.

    Raises:
        ValueError: If the last checkpoint is that of another run, or windows to merge are missing.
    """
    scope, run = job.scope, job.run
    if job.options.merge:
        require_complete(job)
    num_own, num_missing = len(scope.own_windows), len(scope.missing(scope.own_windows))
    checkpoint = checkpoints.last(run.checkpoints)
    if checkpoint is not None:
        checkpoints.require_intact(checkpoint)
        checkpoints.require_same(checkpoint, checkpoints.identity(job.trainer, scope.masks))
        if checkpoint.is_file():
            require_weights(checkpoint, load_file(checkpoint, OF_LIGHTNING)["state_dict"], scope.state_dict())
        log.info(f"go on from {checkpoint}")
        scope.tally.at_least = False  # what was before, it knows
    scope.recall(scope.windows if job.options.part is None else scope.own_windows)
    scope.phases.enter(PhaseName.TRAIN)
    ranks.meet()  # or the first would count how long the others load
    _begin(job)
    try:
        job.trainer.fit(scope, datamodule=scope.fit_data(job.data), ckpt_path=checkpoint, weights_only=True)
    except BaseException:
        _break_off(job)
        raise
    seconds = scope.start_seconds + scope.tally.seconds
    scope.phases.leave()
    peaks = ranks.gathered(peaks_of(run.peaks(ranks.rank(), job.options.part)))
    if job.options.part is not None:
        if num_missing:  # a job that finds its windows done measures nothing
            cost = {"seconds": seconds, "at_least": scope.tally.at_least}
            measured = {**cost, "resumed": num_missing < num_own, "peaks": peaks[0]}
            run.write_part(job.options.part, measured)
    elif not num_missing and job.is_first and (parts := run.read_parts()):
        return _of_parts(job, parts)
    return Training(seconds, scope.tally.at_least, resumed, peaks, ranks.layout(job.trainer))


def _begin(job: Job) -> None:
    """Let the time run, and note in the run's directory that it does."""
    scope, begun = job.scope, job.run.measurements(job.options.part).begun
    left = len(scope.missing(scope.own_windows)) if scope.by_window else 1
    scope.tally.at_least |= begun.exists() and left > 0
    if job.is_first:
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.touch()
    scope.tally.start()


def _break_off(job: Job) -> None:
    """Note if a checkpoint of the last step has the seconds until now."""
    checkpoint = checkpoints.last(job.run.checkpoints)
    if job.is_first and checkpoint is not None and checkpoints.step_of(checkpoint) == job.trainer.global_step:
        job.run.begun.unlink(missing_ok=True)


def _of_parts(job: Job, parts: list[dict[str, Any]]) -> Training:
    """The cost of windows that jobs of their own have recovered, which may have run at the same time."""
    return Training(
        seconds=max(part["seconds"] for part in parts),
        at_least=any(part["at_least"] for part in parts) or len(parts) < len([*job.run.parts.iterdir()]),
        resumed=any(part["resumed"] for part in parts),
        peaks=[part["peaks"] for part in parts],
        layout=ranks.layout(job.trainer) | {"processes": len(parts), "strategy": "jobs"},
    )
