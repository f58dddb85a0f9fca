"""Hyperparameters of a finished run against its results, for whichever loggers there are."""

import inspect
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from recon.basics.units import UNITS
from recon.report import Report
from recon.report.task_scores import main_of
from recon.scopes import FullRetraining, Scope
from recon.scopes.distillation import Distillation
from recon.scopes.local.module import LocalScope


def log_hyperparameters(trainer: L.Trainer, scope: Scope, report: Report) -> None:
    """Log how a run was made and what came of it, unless `trainer.enable_autolog_hparams` is off.

    TensorBoard's HParams tab needs both in one call. Loggers that take no metrics in it get them by `log_metrics`.

    Args:
        trainer: With the loggers; its fit has ended.
        scope: Of the run.
        report: Of the run.
    """
    if not trainer.enable_autolog_hparams:
        return
    for logger in trainer.loggers:
        _log(logger, _hyperparameters(scope, report), _metrics(report), trainer.global_step)
        if isinstance(logger, TensorBoardLogger):
            _log_by_tokens(logger, scope, report)
        logger.save()
        logger.finalize("success")  # again: the fit has closed what these lines opened


def _log(logger: Logger, hyperparameters: dict[str, Any], metrics: dict[str, float], step: int) -> None:
    if "metrics" in inspect.signature(logger.log_hyperparams).parameters:
        logger.log_hyperparams(hyperparameters, metrics)  # pyright: ignore[reportCallIssue]
    else:
        logger.log_hyperparams(hyperparameters)
        logger.log_metrics(metrics, step)


def _log_by_tokens(logger: TensorBoardLogger, scope: Scope, report: Report) -> None:
    """Log each window's held-out error, and the perplexity, against the tokens seen, an axis that all scopes share."""
    if isinstance(scope, LocalScope):
        for window, found in scope.results.items():
            logger.log_metrics({f"by_tokens/held_out_error/{window}": found["before"]}, 0)
            logger.log_metrics({f"by_tokens/held_out_error/{window}": found["after"]}, found["tokens"])
    if report.pruned_perplexity is not None:
        logger.log_metrics({"by_tokens/perplexity": report.pruned_perplexity}, 0)
    if report.perplexity is not None:
        logger.log_metrics({"by_tokens/perplexity": report.perplexity}, report.train_tokens)


def _hyperparameters(scope: Scope, report: Report) -> dict[str, Any]:
    lr = {"lr": scope.lr} if isinstance(scope, Distillation | FullRetraining) else {}
    return {
        "scope": report.scope,
        "label": report.label,
        "model": report.model,
        "criterion": report.criterion,
        "pattern": report.pattern,
        "seed": report.seed,
        "epochs": scope.epochs,
        **lr,
        **{f"lr_{kind}": rate["lr"] for kind, rate in scope.rates.items()},
    }


def _metrics(report: Report) -> dict[str, float]:
    """Those that were measured, memory in GiB."""
    peak = report.peak_host_bytes if report.peak_device_bytes is None else report.peak_device_bytes
    measured = {
        "perplexity": report.perplexity,
        "recovered": report.recovered,
        "device_gib": report.tracked_device_bytes and report.tracked_device_bytes / UNITS["GiB"],
        "peak_gib": None if peak is None else peak / UNITS["GiB"],
        "seconds": report.seconds,
        **{f"task/{name}": main_of(score)[0] for name, score in report.tasks.items()},
    }
    return {name: float(value) for name, value in measured.items() if value is not None}
