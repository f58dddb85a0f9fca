"""The fit of a scope: from its last checkpoint or its missing windows to the end, timed and with its peaks."""

import logging
import time
from dataclasses import dataclass
from typing import Any

from recon.distributed import ranks
from recon.experiment import checkpoints
from recon.experiment.job import Job
from recon.experiment.peaks import peaks_of
from recon.experiment.requirements import require_complete
from recon.profiling.phases import PhaseName

log = logging.getLogger("recon")


@dataclass(frozen=True)
class Training:
    """The cost of a fit.

    Args:
        seconds: Wall time, an exact start included; of a resumed run, those of its last start.
        resumed: Whether an earlier start had done a part of it.
        peaks: Peak memory of each process.
        layout: Processes, strategy and precision.
    """

    seconds: float
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
        checkpoints.require_same(checkpoint, checkpoints.identity(job.trainer, scope.masks))
        log.info(f"go on from {checkpoint}")
    scope.phases.enter(PhaseName.TRAIN)
    ranks.meet()  # or the first would count how long the others load
    started = time.monotonic()
    job.trainer.fit(scope, datamodule=scope.fit_data(job.data), ckpt_path=checkpoint, weights_only=True)
    seconds = scope.start_seconds + time.monotonic() - started
    scope.phases.leave()
    peaks = ranks.gathered(peaks_of(run.peaks(ranks.rank(), job.options.part)))
    if job.options.part is not None:
        if num_missing:  # a job that finds its windows done measures nothing
            measured = {"seconds": seconds, "resumed": num_missing < num_own, "peaks": peaks[0]}
            run.write_part(job.options.part, measured)
    elif not num_missing and job.is_first and (parts := run.read_parts()):
        return _of_parts(job, parts)
    return Training(seconds, resumed, peaks, ranks.layout(job.trainer))


def _of_parts(job: Job, parts: list[dict[str, Any]]) -> Training:
    """The cost of windows that jobs of their own have recovered, which may have run at the same time."""
    return Training(
        seconds=max(part["seconds"] for part in parts),
        resumed=any(part["resumed"] for part in parts),
        peaks=[part["peaks"] for part in parts],
        layout=ranks.layout(job.trainer) | {"processes": len(parts), "strategy": "jobs"},
    )
