"""The quality of the dense, the pruned and the recovered model, whole on the device or block by block."""

import logging
from dataclasses import dataclass, field
from typing import Any

from recon.evaluation.drift import Drift
from recon.evaluation.perplexity import Evaluation
from recon.experiment.job import Job
from recon.experiment.opened import OpenModel
from recon.experiment.sizes import source_size, sparsities
from recon.experiment.tasks import Scores, Subject, score_tasks
from recon.experiment.verification import violations_of_model
from recon.profiling.phases import PhaseName
from recon.pruning.masks import Masks
from recon.pruning.start_weights import Start
from recon.pruning.whole_slices import without_removed

log = logging.getLogger("recon")


@dataclass(frozen=True)
class Baselines:
    """The two perplexities that recovery is compared with.

    Args:
        dense: Before pruning.
        pruned: After pruning, with the weights as the criterion left them.
        references: The zeros of both, their scores on tasks, and the size of the dense model on disk, as
            `Report.references` has them.
    """

    dense: Evaluation
    pruned: Evaluation
    references: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Measurement:
    """The quality of the recovered model.

    Args:
        recovered: Its perplexity, as it was written.
        violations: Number of its pruned weights that are not zero.
        tasks: Its scores on tasks.
        drift: Its distance from the dense model; None if not measured.
        baselines: None if not measured.
        parents: The run that recovery started from, as `Report.parents` has it.
    """

    recovered: Evaluation
    violations: int
    tasks: Scores
    drift: Drift | None
    baselines: Baselines | None
    parents: list[dict[str, Any]] = field(default_factory=list)


def measure_baselines(job: Job, masks: Masks, moved: Start | None = None) -> Baselines | None:
    """Evaluate the dense and the pruned model, on a copy that does not outlive the call.

    Returns:
        None where they are not asked for, nothing is pruned, masks are not known yet, or another rank measures.
    """
    if not (job.measures_baselines and masks and job.is_first):
        return None
    job.scope.phases.enter(PhaseName.BASELINES)
    split, model = job.data.evaluate_on, job.reopened(job.scope.source)
    dense = model.evaluate(job.data)
    of_dense = sparsities(model.parameters(), masks) | source_size(job.scope.source) | _reference(job, model, "dense")
    model.apply(masks, moved)
    pruned = model.evaluate(job.data)
    of_pruned = sparsities(model.parameters(), masks) | _reference(job, model, "pruned")
    log.info(f"{split} perplexity  dense {dense.perplexity:.3f}  pruned {pruned.perplexity:.3f}")
    return Baselines(dense, pruned, {"dense": of_dense, "pruned": of_pruned})


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
    recovered, violations, tasks = _measure_written(job, masks)
    drift = None
    if job.options.drift and masks and (job.is_offloaded or job.scope.evaluation is None):
        job.scope.phases.enter(PhaseName.DRIFT)
        drift = _drift(job)
    return Measurement(recovered, violations, tasks, drift, baselines, _parents(job, recovered))


def _parents(job: Job, recovered: Evaluation) -> list[dict[str, Any]]:
    """The run that recovery started from, with its perplexity: as it has reported it, or else measured now."""
    if (origin := job.options.origin) is None:
        return []
    held = origin.report()
    if held.protocol == recovered.protocol | job.data.carving(job.options.evaluate_on):
        return [origin.as_parent(held.perplexity)]
    if not job.measures_baselines or not job.scope.loads_whole:
        return [origin.as_parent(None)]
    job.scope.phases.enter(PhaseName.BASELINES)
    return [origin.as_parent(job.reopened(job.scope.source.at(origin.run.model)).evaluate(job.data).perplexity)]


def _measure_written(job: Job, masks: Masks) -> tuple[Evaluation, int, Scores]:
    if job.scope.evaluation is not None:  # too large to be loaded by one process: measured before it was gathered
        return job.scope.evaluation, violations_of_model(masks, job.run.model), {}
    model = job.reopened(job.written)
    recovered = model.evaluate(job.data)
    # Counted in the files: the blocks of an offloaded model would go to the device once more.
    violations = (
        violations_of_model(masks, job.run.model) if job.is_offloaded else model.violations(without_removed(masks))
    )
    return recovered, violations, _scores(job, model, "recovered")


def _scores(job: Job, model: OpenModel, subject: Subject) -> Scores:
    assert job.data.tokenizer is not None
    return score_tasks(job.options.suite, model, job.data.tokenizer, subject, job.run)


def _reference(job: Job, model: OpenModel, subject: Subject) -> dict[str, Scores]:
    """The scores on tasks as one of `Report.references` has them."""
    tasks = _scores(job, model, subject)
    return {"tasks": tasks} if tasks else {}


def _drift(job: Job) -> Drift:
    dense, recovered = (job.reopened(source) for source in (job.scope.source, job.written))
    return dense.drift_to(recovered, job.data)
