"""The quality of the dense, the pruned and the recovered model, whole on the device or block by block."""

import logging
from dataclasses import dataclass
from typing import Any

from recon.evaluation.drift import Drift
from recon.evaluation.perplexity import Evaluation
from recon.experiment.job import Job
from recon.experiment.sizes import source_size, sparsities
from recon.experiment.verification import violations_of_model
from recon.profiling.phases import PhaseName
from recon.pruning.masks import Masks
from recon.pruning.start_weights import Start

log = logging.getLogger("recon")


@dataclass(frozen=True)
class Baselines:
    """The two perplexities that recovery is compared with.

    Args:
        dense: Before pruning.
        pruned: After pruning, with the weights as the criterion left them.
        sizes: The zeros of both, and the size of the dense model on disk, as `Report.references` has them.
    """

    dense: Evaluation
    pruned: Evaluation
    sizes: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Measurement:
    """The quality of the recovered model.

    Args:
        recovered: Its perplexity, as it was written.
        violations: Number of its pruned weights that are not zero.
        drift: Its distance from the dense model; None if not measured.
        baselines: None if not measured.
    """

    recovered: Evaluation
    violations: int
    drift: Drift | None
    baselines: Baselines | None


def measure_baselines(job: Job, masks: Masks, moved: Start | None = None) -> Baselines | None:
    """Evaluate the dense and the pruned model, on a copy that does not outlive the call.

    Returns:
        None where they are not asked for, nothing is pruned, masks are not known yet, or another rank measures.
    """
    if not (job.measures_baselines and masks and job.is_first):
        return None
    job.scope.phases.enter(PhaseName.BASELINES)
    split, model = job.data.evaluate_on, job.reopened(job.scope.source)
    dense, zeros = model.evaluate(job.data), [sparsities(model.parameters(), masks)]
    model.apply(masks, moved)
    pruned = model.evaluate(job.data)
    zeros.append(sparsities(model.parameters(), masks))
    log.info(f"{split} perplexity  dense {dense.perplexity:.3f}  pruned {pruned.perplexity:.3f}")
    return Baselines(dense, pruned, {"dense": zeros[0] | source_size(job.scope.source), "pruned": zeros[1]})


def measure(job: Job, baselines: Baselines | None) -> Measurement:
    """Evaluate the model as it was written; the baselines too, if its masks were not known before.

    Args:
        job: The recovery; its model is written.
        baselines: As measured before recovery.
    """
    masks = job.scope.masks
    if job.options.interleaves:
        baselines = measure_baselines(job, masks)
    job.scope.phases.enter(PhaseName.EVALUATE)
    recovered, violations = _measure_written(job, masks)
    drift = None
    if job.options.drift and masks and (job.is_offloaded or job.scope.evaluation is None):
        job.scope.phases.enter(PhaseName.DRIFT)
        drift = _drift(job)
    return Measurement(recovered, violations, drift, baselines)


def _measure_written(job: Job, masks: Masks) -> tuple[Evaluation, int]:
    if job.scope.evaluation is not None:  # too large to be loaded by one process: measured before it was gathered
        return job.scope.evaluation, violations_of_model(masks, job.run.model)
    model = job.reopened(job.written)
    return model.evaluate(job.data), model.violations(masks)


def _drift(job: Job) -> Drift:
    dense, recovered = (job.reopened(source) for source in (job.scope.source, job.written))
    return dense.drift_to(recovered, job.data)
