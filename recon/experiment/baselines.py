"""The two rows that no scope makes: the dense model, and the pruned one before recovery."""

import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from transformers import PreTrainedModel

from recon.data import TokenData
from recon.evaluation.drift import measure_drift
from recon.evaluation.perplexity import evaluate
from recon.experiment.directory import RunDirectory, save_model
from recon.experiment.environment import environment
from recon.models.linear import is_matrix, weight_out_in
from recon.models.loading import ModelSource
from recon.profiling.process_memory import PeakMeter, resident_bytes
from recon.pruning.criteria import Criterion
from recon.pruning.masks import Masks
from recon.pruning.patterns import Pattern
from recon.pruning.prune import Pruning, moved_with, prune_to
from recon.pruning.start_weights import apply
from recon.report import Report


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
    baseline, meter = resident_bytes(), PeakMeter()
    meter.start()
    model, data.tokenizer = source.load(device)
    data.require(["test"], model)
    if masks is not None:
        masks.validate_for(model)
        masks.apply(model)
    evaluation = evaluate(model, data.test_dataloader())
    peaks = meter.stop()
    kept = masks if masks is not None else promised
    return Report(
        scope="dense" if masks is None else "pruned",
        model=source.name,
        criterion="none" if masks is None else "given masks",
        pattern="none" if masks is None else "given masks",
        seed=data.seed,
        perplexity=evaluation.perplexity,
        sparsity=share_of_zeros(model) if masks is None else masks.sparsity,
        mask_violations=0 if kept is None else kept.violations(model),
        peak_host_bytes=peaks.host_bytes,
        peak_device_bytes=peaks.device_allocated_bytes,
        baseline_host_bytes=baseline,
        protocol=evaluation.protocol | data.carving("test"),
        environment=environment(device),
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
    criterion: Criterion,
    pattern: Pattern,
    pruning: Pruning | None,
    run: RunDirectory,
    device: torch.device,
    keep_model: bool = False,
    drift: bool = True,
    say: Callable[[str], None] = print,
) -> Report:
    """Prune a model, write its masks, and measure the pruned model; a finished run is only read.

    The pruned model of a criterion that moves weights has the moved ones, which are written beside the masks.

    Args:
        source: The model.
        data: Calibration and test tokens.
        criterion: How much a weight matters.
        pattern: Which zeros are allowed.
        pruning: How the model is walked.
        run: Where masks and report go.
        device: Where to compute.
        keep_model: Write the pruned model too.
        drift: Measure how far the pruned model is from the dense one, which is loaded again beside it.
        say: Is told what is going on, in lines.

    Returns:
        The report; its seconds and peaks are those of pruning.
    """
    if run.report.exists():
        say(f"{run.path} holds this run, finished: nothing to do")
        return Report.load(run.report)
    baseline, meter = resident_bytes(), PeakMeter()
    meter.start()
    say(f"load {source.name}")
    model, data.tokenizer = source.load(device)
    data.require(("train", "test", "validation") if drift else ("train", "test"), model)
    tokens = data.tokens("train")
    started = time.monotonic()
    masks = prune_to(run.masks, model, tokens, criterion, pattern, pruning, say)
    seconds = time.monotonic() - started
    peaks = meter.stop()
    apply(model, masks, moved_with(run.masks, masks))
    if keep_model:
        save_model(model, data.tokenizer, run.model)
    evaluation = evaluate(model, data.test_dataloader())
    drifted = measure_drift(source.model(device), model, data.val_dataloader()) if drift else None
    report = Report(
        scope="pruned",
        model=source.name,
        criterion=str(criterion),
        pattern=(pruning or Pruning()).describe(pattern),
        seed=data.seed,
        perplexity=evaluation.perplexity,
        sparsity=masks.sparsity,
        mask_violations=masks.violations(model),
        peak_host_bytes=peaks.host_bytes,
        peak_device_bytes=peaks.device_allocated_bytes,
        baseline_host_bytes=baseline,
        seconds=seconds,
        run_dir=str(run.path),
        protocol=evaluation.protocol | data.carving("test"),
        environment=environment(device),
        drift=asdict(drifted) if drifted else {},
    )
    report.save(run.report)
    return report
