"""The two rows that no scope makes: the dense model, and the pruned one before recovery."""

import logging
import time
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel

from recon.data import TokenData
from recon.evaluation.drift import measure_drift
from recon.evaluation.perplexity import Evaluation, evaluate
from recon.experiment.directory import RunDirectory
from recon.experiment.environment import environment
from recon.experiment.options import RunOptions
from recon.experiment.writing import save_model
from recon.models.linear import is_matrix, weight_out_in
from recon.models.loading import ModelSource
from recon.profiling.process_memory import PeakMeter, resident_bytes
from recon.pruning.masks import Masks
from recon.pruning.prune import moved_with, prune_to
from recon.pruning.start_weights import apply
from recon.report import Report

log = logging.getLogger("recon")


def measure(
    source: ModelSource,
    data: TokenData,
    device: torch.device,
    masks: Masks | None = None,
    promised: Masks | None = None,
) -> Report:
    """Perplexity of a model as it is, or under masks, and the peak memory of measuring it.

    Args:
        source: The model.
        data: Test tokens.
        device: Where to compute.
        masks: Applied first, if given; the report then calls the model pruned, otherwise dense.
        promised: Masks that the model should keep as it is; the report counts what violates them.

    Raises:
        ValueError: If the masks belong to another model.
    """
    costs = _Costs(device)
    model, data.tokenizer = source.load(device)
    data.require(["test"], model)
    if masks is not None:
        masks.validate_for(model)
        masks.apply(model)
    evaluation = evaluate(model, data.test_dataloader())
    costs.stop()
    kept = masks if masks is not None else promised
    given = "none" if masks is None else "given masks"
    return costs.report(
        source,
        data,
        evaluation,
        scope="dense" if masks is None else "pruned",
        criterion=given,
        pattern=given,
        sparsity=share_of_zeros(model) if masks is None else masks.sparsity,
        mask_violations=0 if kept is None else kept.violations(model),
    )


def share_of_zeros(model: PreTrainedModel) -> float:
    """Zeros among the weights of all linear maps but the head, in any model, recovered by recon or not."""
    head = model.get_output_embeddings()
    weights = [weight_out_in(module) for module in model.modules() if is_matrix(module) and module is not head]
    zeros = sum(weight.numel() - int(weight.count_nonzero()) for weight in weights)
    return zeros / max(1, sum(weight.numel() for weight in weights))


def measure_pruned(
    source: ModelSource,
    data: TokenData,
    run: RunDirectory,
    options: RunOptions,
    device: torch.device,
    keep_model: bool = False,
) -> Report:
    """Prune a model, write its masks, and measure the pruned model; a finished run is only read.

    The pruned model of a criterion that moves weights has the moved ones, which are written beside the masks.

    Args:
        source: The model.
        data: Calibration and test tokens.
        run: Where masks and report go.
        options: Criterion, pattern, how the model is walked, and whether to measure drift, for which the dense model
            is loaded again beside the pruned one.
        device: Where to compute.
        keep_model: Write the pruned model too.

    Returns:
        The report; its seconds and peaks are those of pruning.

    Raises:
        ValueError: If there is no criterion.
    """
    if options.criterion is None or options.pattern is None:
        raise ValueError("recon prune needs a criterion and a pattern, got null")
    if run.report.exists():
        log.info(f"{run.path} holds this run, finished: nothing to do")
        return Report.load(run.report)
    costs = _Costs(device)
    log.info(f"load {source.name}")
    model, data.tokenizer = source.load(device)
    data.require(("train", "test", "validation") if options.drift else ("train", "test"), model)
    tokens = data.tokens("train")
    started = time.monotonic()
    masks = prune_to(run.masks, model, tokens, options.criterion, options.pattern, options.pruning, run.moved)
    seconds = time.monotonic() - started
    costs.stop()
    apply(model, masks, moved_with(run.masks, masks))
    if keep_model:
        save_model(model, data.tokenizer, run.model)
    evaluation = evaluate(model, data.test_dataloader())
    drift = measure_drift(source.model(device), model, data.val_dataloader()) if options.drift else None
    report = costs.report(
        source,
        data,
        evaluation,
        scope="pruned",
        criterion=str(options.criterion),
        pattern=options.pruning.describe(options.pattern),
        sparsity=masks.sparsity,
        mask_violations=masks.violations(model),
        seconds=seconds,
        run_dir=str(run.path),
        drift=asdict(drift) if drift else {},
    )
    report.save(run.report)
    return report


class _Costs:
    """The peaks of this process from now on, and the report that they go into.

    Args:
        device: Where it computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline, self._meter = resident_bytes(), PeakMeter()
        self._meter.start()

    def stop(self) -> None:
        """Measure no further."""
        self._peaks = self._meter.stop()

    def report(self, source: ModelSource, data: TokenData, evaluation: Evaluation, **more: Any) -> Report:
        """The report of a model, with `more` of its fields."""
        return Report(
            model=source.name,
            seed=data.seed,
            perplexity=evaluation.perplexity,
            protocol=evaluation.protocol | data.carving("test"),
            peak_host_bytes=self._peaks.host_bytes,
            peak_device_bytes=self._peaks.device_allocated_bytes,
            baseline_host_bytes=self._baseline,
            environment=environment(self._device),
            **more,
        )
