"""One run from the dense model to the report: load, prune, recover, save, evaluate.

Every step leaves a file in the run directory, so a run that was killed goes on where it was, and a
finished one is not repeated.
"""

import logging

import lightning as L

from recon.basics.refusals import refusals
from recon.data import TokenData
from recon.data.sources import Split
from recon.distributed import ranks
from recon.distributed.part import Share
from recon.experiment.carding import write_card
from recon.experiment.data_hooks import begin
from recon.experiment.directory import RunDirectory
from recon.experiment.environment import versions
from recon.experiment.hyperparameters import log_hyperparameters
from recon.experiment.job import Job
from recon.experiment.measurement import measure, measure_baselines
from recon.experiment.options import RunOptions
from recon.experiment.reporting import build_report
from recon.experiment.requirements import require_feasible, require_suitable
from recon.experiment.selection import Selection, select
from recon.experiment.training import train
from recon.experiment.writing import write
from recon.models.author import DenseAuthor
from recon.models.fewer_experts import route_among
from recon.profiling.phases import PhaseName, Phases
from recon.pruning.removal import kept_in
from recon.pruning.whole_slices import removes_slices
from recon.report import Report
from recon.scopes.base import Scope
from recon.scopes.removal import require_recoverable

log = logging.getLogger("recon")


def recover(scope: Scope, data: TokenData, trainer: L.Trainer, run: RunDirectory, options: RunOptions) -> Report | None:
    """Prune a model, recover it at one scope, save and evaluate it.

    With several processes, every one of them calls this. Rank 0 alone prunes, saves and evaluates; `run` is
    a directory that all of them see. Jobs that do not know of each other may each recover a part of the windows in
    one directory, at the same time or not; the last call, without a part, finds all of them there.

    Args:
        scope: The recovery scope; names the model.
        data: Calibration, validation and test tokens.
        trainer: Runs the scope's fit; its callbacks are told the phases.
        run: Where everything goes.
        options: See `RunOptions`.

    Returns:
        The report, also written to the run directory; None on ranks other than 0, and of a part.

    Raises:
        UsageError: If options do not fit together; nothing has been loaded.
        ValueError: If masks and model do not fit together, or a pruned weight is not zero in the end; the model is then
            not saved.
    """
    if run.is_finished:
        return _finished(run, options)
    if options.part is None:
        run.reopen(scope.by_window)
        if ranks.rank() == 0:
            run.drop_report()
    job, resumed = Job(scope, data, trainer, run, options), run.has_begun
    with refusals():
        require_feasible(job)
    _connect(job)
    with scope.phases.run(run.measurements(options.part).path, job.device):
        with ranks.rank_zero_first():
            _load(job)
            with refusals():
                require_suitable(job)
            selection = select(job)
            baselines = measure_baselines(job, selection.masks, selection.moved)
            _prepare(job, selection)
            del selection  # it may hold the model's matrices
        training = train(job, resumed)
        if options.part is not None or not job.is_first:
            return None
        write(job)
        measured = measure(job, baselines)
    report = build_report(job, training, measured)
    report.save(run.report, run.manifest.writing)
    write_card(run, scope.masks)
    log_hyperparameters(trainer, scope, report)
    data.teardown("test")
    run.clean()
    return report


def _finished(run: RunDirectory, options: RunOptions) -> Report:
    report = Report.load(run.report)
    if report.protocol["split"] != options.evaluate_on:
        raise ValueError(
            f"--evaluate_on {options.evaluate_on} needs a run that was evaluated there, got {run.path}, finished on "
            f"the {report.protocol['split']} split; name another --run_dir, or delete its report.json"
        )
    log.info(f"{run.path} holds this run, finished: nothing to do")
    if ranks.rank() == 0:
        write_card(run)  # that of a start which was killed before it had written it
    return report


def _connect(job: Job) -> None:
    """Start and connect the processes, and say which windows are whose."""
    scope, part = job.scope, job.options.part
    ranks.start(job.trainer, scope)
    scope.divide(part or Share(ranks.rank(), ranks.size()), assembles=part is None and job.is_first)
    begin(job.data, job.trainer)
    scope.phases = Phases(job.trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
    scope.directory = job.run.path
    job.data.evaluate_on = job.options.evaluate_on


def _load(job: Job) -> None:
    job.scope.phases.enter(PhaseName.LOAD)
    job.scope.experts.rows = job.options.pruning.experts
    log.info(f"load {job.scope.source.name}")
    job.scope.load(job.data)
    assert job.data.tokenizer is not None
    job.data.author = DenseAuthor(job.scope.source, job.data.tokenizer, versions(), job.open_dense)
    measured: tuple[Split, ...] = () if job.options.part is not None else (job.options.evaluate_on,)
    job.data.require(("train", "validation", *measured), job.scope.model)
    if job.data.max_tokens is not None:
        job.data.require_stream(job.scope.model)
    if not job.measures_baselines:
        job.data.forget("test")  # not read before recovery has ended


def _prepare(job: Job, selection: Selection) -> None:
    scope = job.scope
    scope.phases.enter(PhaseName.PREPARE)
    if removes_slices(selection.masks):
        require_recoverable(scope, job.trainer)
        scope.start = "pruned"  # the experts that are left have no zeros to make up for
        if scope.by_window:  # finished windows are loaded, and not pruned again
            route_among(scope.model, kept_in(selection.masks, scope.model))
    if job.is_offloaded or (scope.start == "exact" and job.is_first):
        scope.to(job.device)
    scope.prepare(job.data, selection.masks, job.run.path, selection.start, selection.interleaved)
