"""The report of a finished recovery."""

from dataclasses import asdict

import lightning as L

from recon.experiment.environment import environment
from recon.experiment.job import Job
from recon.experiment.measurement import Measurement
from recon.experiment.peaks import largest
from recon.experiment.sizes import written_sizes
from recon.experiment.training import Training
from recon.pruning.masks import Masks
from recon.pruning.prune import FEW_ROWS, LEFT_DENSE, noted
from recon.report import Report
from recon.scopes.base import Scope


def build_report(job: Job, training: Training, measured: Measurement) -> Report:
    """The report of a run from its cost and its quality."""
    scope, masks, baselines = job.scope, job.scope.masks, measured.baselines
    made_by = Masks.read_metadata(job.run.masks) if masks else {}
    chosen, found = {"criterion": "none", "pattern": "none"} | made_by, noted(made_by)
    return Report(
        scope=scope.scope,
        label=" after ".join([scope.label, *(one["label"] for one in measured.parents)]),
        model=scope.source.name,
        criterion=chosen["criterion"],
        pattern=chosen["pattern"],
        seed=job.data.seed,
        perplexity=measured.recovered.perplexity,
        dense_perplexity=baselines and baselines.dense.perplexity,
        pruned_perplexity=baselines and baselines.pruned.perplexity,
        sparsity=masks.sparsity if masks else 0.0,
        **written_sizes(job.run.model),
        references=baselines.references if baselines else {},
        mask_violations=measured.violations,
        seconds=training.seconds,
        train_tokens=scope.train_tokens,
        protocol=measured.recovered.protocol | job.data.carving(job.options.evaluate_on),
        run_dir=str(job.run.path),
        environment=environment(job.device) | _starts(training) | training.layout,
        ranks=training.peaks,
        prediction=dict(job.options.prediction),
        windows=_errors(scope),
        starts={name: one["start"] for name, one in scope.results.items() if "start" in one},
        few_rows=found[FEW_ROWS] | scope.experts.few,
        left_dense=found[LEFT_DENSE],
        rates=scope.rates,
        throughput=_throughput(job.trainer),
        parents=measured.parents,
        drift=asdict(measured.drift) if measured.drift else {},
        densities=masks.densities if masks else {},
        losses=_losses(measured),
        tasks=measured.tasks,
        peak_host_bytes=largest(training.peaks, "peak_host_bytes"),
        peak_device_bytes=largest(training.peaks, "peak_device_bytes"),
        baseline_host_bytes=largest(training.peaks, "baseline_host_bytes"),
    )


def _starts(training: Training) -> dict[str, bool]:
    """Whether the run had several starts, and whether seconds of them are missing."""
    return {"resumed": training.resumed, "seconds_at_least": training.at_least}


def _errors(scope: Scope) -> dict[str, dict[str, float]]:
    """The held-out errors of each window; none in a scope without windows."""
    kept = ("before", "after", "discarded")
    return {name: {key: one[key] for key in kept if key in one} for name, one in scope.results.items()}


def _losses(measured: Measurement) -> dict[str, list[float]]:
    """The losses of the recovered model, and of those that it is compared with, by sequence."""
    baselines = measured.baselines
    others = {"dense": baselines.dense.losses, "pruned": baselines.pruned.losses} if baselines else {}
    return {"model": measured.recovered.losses, **others}


def _throughput(trainer: L.Trainer) -> dict[str, float | None]:
    """The speed of training, as a callback with a `summary` has measured it."""
    summaries = [one.summary() for one in trainer.callbacks if hasattr(one, "summary")]  # pyright: ignore
    return summaries[0] if summaries else {}
