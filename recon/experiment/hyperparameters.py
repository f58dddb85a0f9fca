"""Hyperparameters of a finished run against its results, for whichever loggers there are."""

import inspect
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger

from recon.basics.units import UNITS
from recon.report import Report
from recon.report.task_scores import main_of
from recon.scopes import FullRetraining, Scope
from recon.scopes.distillation import Distillation


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
        logger.save()
        logger.finalize("success")  # again: the fit has closed what these lines opened


def _log(logger: Logger, hyperparameters: dict[str, Any], metrics: dict[str, float], step: int) -> None:
    if "metrics" in inspect.signature(logger.log_hyperparams).parameters:
        logger.log_hyperparams(hyperparameters, metrics)  # pyright: ignore[reportCallIssue]
    else:
        logger.log_hyperparams(hyperparameters)
        logger.log_metrics(metrics, step)


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
